"""The parameters of a notebook: papermill's -f, -p and -y, the cell itself, and what wins."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from dpo_kit import config
from dpo_kit.errors import ConfigError

PARAMS = Path(__file__).parents[2] / "params"

# What the parameters cell of every notebook holds: everything empty.
CELL: dict = {"config": None, "beta": None, "loss_type": None, "lr": None, "max_steps": None, "overrides": []}


def papermill_file(path: Path) -> dict:
    """The keys of a params file as papermill's -f injects them: YAML 1.1, `5e-6` a string, dates as text."""

    class NoDates(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return yaml.load(path.read_text(encoding="utf-8"), Loader=NoDates)


def notebook(extra=(), **parameters):
    """The configuration and provenance of a notebook whose cell was left empty but for the parameters."""
    return config.from_notebook({**CELL, **parameters}, extra=extra)


def refused(**parameters) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        notebook(**parameters)
    return caught.value.problems


def test_our_emulation_of_papermill_is_papermill():
    iorw = pytest.importorskip("papermill.iorw")
    for path in PARAMS.glob("*.yaml"):
        assert iorw.read_yaml_file(str(path)) == papermill_file(path)


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda p: p.name)
def test_a_file_means_the_same_to_papermill_and_to_config(path):
    given = papermill_file(path)
    assert isinstance(given["actor"]["optimizer"]["lr"], str)  # else this test would not show the coercion
    assert notebook(**given)[0] == config.load(path)
    assert notebook(config=str(path))[0] == config.load(path)


def test_nothing_given_is_the_demo():
    c, lines = notebook()
    assert c == config.load(PARAMS / "demo.yaml")
    assert lines == ["configuration: params/demo.yaml"]


@pytest.mark.parametrize("empty", [None, "", {}, [], "null"])
def test_an_empty_value_is_the_files(empty):
    names = config.parameter_names()
    assert notebook(**dict.fromkeys(names, empty))[0] == config.load(PARAMS / "demo.yaml")


def test_papermill_hands_over_text():
    c, lines = notebook(beta="0.2", loss_type="ipo", lr="5e-7", max_steps="3", seed="0")
    assert (c.actor.beta, c.actor.loss_type, c.actor.optimizer.lr) == (0.2, "ipo", 5e-7)
    assert (c.total_train_steps, c.seed) == (3, 0)
    assert lines == [
        "configuration: params/demo.yaml",
        "actor.beta = 0.2 (from beta)",
        "actor.loss_type = 'ipo' (from loss_type)",
        "actor.optimizer.lr = 5e-07 (from lr)",
        "total_train_steps = 3 (from max_steps)",
        "seed = 0 (from seed)",
    ]


def test_p_wins_over_f():
    c, lines = notebook(**papermill_file(PARAMS / "smoke.yaml"), beta=0.2, loss_type="ipo")
    plain = config.load(PARAMS / "smoke.yaml", ["actor.beta=0.2", "actor.loss_type=ipo"])
    assert c == plain
    assert lines[0].startswith("configuration: the parameters (experiment_name, ")
    assert "actor.beta = 0.2 (from beta)" in lines


def test_later_wins_base_sections_overrides_short_names():
    given = {
        "config": "params/smoke.yaml",
        "evaluator": {"num_samples": 1, "max_new_tokens": 2, "temperature": 3},
        "overrides": ["evaluator.max_new_tokens=4", "evaluator.temperature=5", "seed=6", "actor.beta=0.6"],
        "seed": 7,
    }
    c, lines = notebook(**given)
    base = config.load(PARAMS / "smoke.yaml")
    assert base.evaluator.before_training == c.evaluator.before_training
    assert (c.evaluator.num_samples, c.evaluator.max_new_tokens, c.evaluator.temperature) == (1, 4, 5.0)
    assert (c.seed, c.actor.beta, c.train_dataset) == (7, 0.6, base.train_dataset)
    assert lines == [
        "configuration: params/smoke.yaml",
        "evaluator.num_samples = 1 (from the parameter evaluator)",
        "evaluator.max_new_tokens = 4 (from overrides)",
        "evaluator.temperature = 5.0 (from overrides)",
        "actor.beta = 0.6 (from overrides)",
        "seed = 7 (from seed)",
    ]


def test_sections_are_merged_deeply_and_may_be_text():
    demo = config.load(PARAMS / "demo.yaml")
    c, _ = notebook(train_dataset="{batch_size: 4}", experiment_name="mine")
    assert (c.train_dataset.batch_size, c.experiment_name) == (4, "mine")
    assert c.train_dataset.path == demo.train_dataset.path
    assert c.actor == demo.actor


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.beta=0.3", "trial_name=001"],
        ("actor.beta=0.3", "trial_name=001"),
        "[actor.beta=0.3, trial_name=001]",
        "['actor.beta=0.3', \"trial_name=001\"]",
    ],
)
def test_overrides_are_a_list_or_the_text_of_one(overrides):
    c, _ = notebook(overrides=overrides)
    assert (c.actor.beta, c.trial_name) == (0.3, "001")


def test_overrides_may_be_a_single_one():
    assert notebook(overrides="trial_name=no")[0].trial_name == "no"
    assert notebook(overrides="valid_dataset=null")[0].valid_dataset is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"betta": 0.1}, "betta is not a parameter of this notebook; did you mean beta?"),
        ({"learning_rate": 1}, "learning_rate is not a parameter of this notebook; did you mean lr?"),
        ({"actr": {}}, "actr is not a parameter of this notebook; did you mean actor?"),
        (
            {"actor.beta": 1},
            "actor.beta is not a parameter of this notebook, dotted names go into overrides; "
            """give -p beta 1 or -p overrides "['actor.beta=1']\"""",
        ),
        ({"actor.bta": 1}, "did you mean actor.beta in overrides?"),
        ({"max-steps": 1}, "max-steps is not a parameter of this notebook; did you mean max_steps?"),
        ({"epochs": 1}, "epochs is not a parameter of this notebook; did you mean total_train_epochs?"),
        ({"warmup_ratio": 1}, "did you mean actor.optimizer.warmup_steps_proportion in overrides?"),
        ({"zzzz": 1}, "zzzz is not a parameter of this notebook; parameters: config, beta, loss_type, lr, "),
        ({"beta": "strong"}, "actor.beta = 'strong' is text; give a number greater than 0"),
        ({"beta": float("nan")}, "actor.beta = nan is not a finite number"),
        ({"beta": True}, "actor.beta = true is a boolean"),
        ({"max_steps": 0}, "total_train_steps = 0 is out of range; give a whole number at least 1"),
        ({"overrides": {"a": 1}}, "overrides = {'a': 1} is not a list; give ['actor.beta=0.2', ...]"),
        ({"overrides": [3]}, "override 3 is not text; write key=value"),
        ({"overrides": ["actor.bta=1"]}, "actor.bta is not a known key; did you mean actor.beta?"),
        ({"config": "params/none.yaml"}, "config 'params/none.yaml' does not exist; looked for "),
        ({"evaluator": {"num_sample": 1}}, "evaluator.num_sample is not a known key; did you mean"),
        ({"evaluator": "none"}, "evaluator = 'none' is not a section"),
        (
            {"trial_name": 1},
            "trial_name = 1 is a number, not text; put it in quotes (an override, and papermill -r",
        ),
    ],
)
def test_a_wrong_parameter_is_one_line(parameters, message):
    found = refused(**parameters)
    assert len(found) == 1
    assert message in found[0]


def test_the_way_that_is_shown_for_dotted_names_works():
    dotted = {"saver.best": True, "ref.path": "it's", "train_dataset.name": "${actor.path}", "actor.beta": 3}
    (line,) = refused(**dotted)
    assert line.startswith("saver.best, ref.path, train_dataset.name, actor.beta are not parameters of this ")
    *short, option, name, value = shlex.split(line.rpartition("; give ")[2])
    assert (short, option, name) == ([], "-p", "overrides")  # -p beta 3 alone would leave the others out
    c, _ = notebook(overrides=value, evaluator={"num_samples": 0})
    assert (c.saver.best, c.ref.path, c.train_dataset.name, c.actor.beta) == (True, "it's", c.actor.path, 3.0)


def test_short_names_are_shown_where_they_say_all_of_it():
    (line,) = refused(**{"actor.beta": 0.2, "actor.optimizer.lr": 1e-5})
    *short, option, name, value = shlex.split(line.rpartition("; give ")[2])
    assert (short, option, name) == (["-p", "beta", "0.2", "-p", "lr", "1e-05", "or"], "-p", "overrides")
    c, _ = notebook(overrides=value)
    assert (c.actor.beta, c.actor.optimizer.lr) == (0.2, 1e-5)


def test_wrong_values_from_every_place_are_shown_together():
    found = refused(beta=0, evaluator={"num_samples": -1}, overrides=["seed=x", "foo=1"])
    assert [line.split(" ")[0] for line in found] == ["foo", "seed", "actor.beta", "evaluator.num_samples"]


def test_a_whole_file_and_config_exclude_each_other():
    (line,) = refused(**papermill_file(PARAMS / "smoke.yaml") | {"config": "params/demo.yaml"})
    assert line.startswith("config = 'params/demo.yaml' and actor are both given")


def test_actor_alone_is_a_whole_file_that_lacks_the_rest():
    found = refused(actor={"beta": 0.2})
    assert [line.split(" ")[0] for line in found[:3]] == ["ref", "train_dataset", "actor.path"]
    assert found[3].startswith("(actor is among the parameters, which makes them the whole configuration; ")


def test_absent_sections_of_a_whole_file_take_package_defaults():
    given = {
        "actor": {"path": "tiny-random"},
        "ref": {"dtype": "float32"},
        "train_dataset": {"path": "sample"},
    }
    c, _ = notebook(**given)
    assert c == config.from_tree(given)
    assert (c.seed, c.evaluator.num_samples, c.valid_dataset) == (1, 8, None)


def test_names_of_the_notebook_itself_and_of_papermill_are_allowed():
    assert notebook(extra=("betas",), betas=[0.1])[0] == notebook()[0]
    assert notebook(PAPERMILL_OUTPUT_PATH="out.ipynb")[0] == notebook()[0]
    assert "did you mean beta?" in refused(betas=[0.1])[0]


def test_ignored_keys_are_named_once():
    full = papermill_file(Path(__file__).parents[1] / "data/seed_full.yaml")
    with pytest.warns(UserWarning, match="^ignored: .*enable_offload.*perf_tracer") as caught:
        c, _ = notebook(**full)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="^ignored: "):
        assert c == config.load(Path(__file__).parents[1] / "data/seed_full.yaml")


def test_the_same_parameters_mean_the_same_in_every_folder(monkeypatch):
    monkeypatch.chdir(PARAMS.parent)
    here = notebook(config="params/smoke.yaml", beta=0.3)
    monkeypatch.chdir(PARAMS.parent / "notebooks")
    assert notebook(config="params/smoke.yaml", beta=0.3) == here


# --- lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "items"),
    [
        ("[0.05,0.1,5e-1]", float, [0.05, 0.1, 0.5]),
        ([1, "2e0"], float, [1.0, 2.0]),
        (0.1, float, [0.1]),
        ("0.1", float, [0.1]),
        ("[sigmoid, ipo]", str, ["sigmoid", "ipo"]),
        ("ipo", str, ["ipo"]),
        ((1, 2), int, [1, 2]),
        (None, float, []),
        ("", str, []),
        ("null", float, []),
        ([], int, []),
    ],
)
def test_lists_of_a_notebook_are_read(value, kind, items):
    found = config.read_list("betas", value, kind)
    assert found == items
    assert all(type(item) is kind for item in found)


def test_a_wrong_item_of_a_list_names_the_list_and_the_item():
    with pytest.raises(ConfigError) as caught:
        config.read_list("betas", "[0.1, big, true]", float)
    assert caught.value.problems == [
        "betas = [0.1, 'big', True]: 'big' is text; give a number",
        "betas = [0.1, 'big', True]: true is a boolean; give a number",
    ]


@pytest.mark.parametrize(
    "parameters",
    [
        {"overrides": ["actor.target_modules=[q_proj, v_proj]"]},
        {"overrides": "['actor.target_modules=[q_proj,v_proj]']"},
        {"overrides": "actor.target_modules=q_proj,v_proj"},
        {"actor": {"target_modules": ["q_proj", "v_proj"]}},
        {"actor": "{target_modules: [q_proj, v_proj]}"},
        {"actor": {"target_modules": "q_proj, v_proj"}},
    ],
    ids=str,
)
def test_a_key_that_is_a_list_is_read_at_every_door(parameters):
    base = papermill_file(PARAMS / "smoke.yaml")
    if isinstance(parameters.get("actor"), str):
        parameters["actor"] = parameters["actor"][:-1] + ", path: tiny-random}"
    elif "actor" in parameters:
        parameters["actor"] = {**base["actor"], **parameters["actor"]}
    found, _ = notebook(**{**base, **parameters})
    assert found.actor.target_modules == ["q_proj", "v_proj"]
    assert config.from_tree(yaml.safe_load(config.to_yaml(found))) == found


def test_a_text_alone_is_a_list_of_it_and_nothing_is_all():
    (one, _), (none, _) = (notebook(overrides=[f"actor.target_modules={text}"]) for text in ("q_proj", "[]"))
    assert (one.actor.target_modules, none.actor.target_modules) == (["q_proj"], [])
