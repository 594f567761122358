"""The configuration: references, broken files, backends, paths, what the module imports."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest

from dpo_kit import config
from dpo_kit.errors import ConfigError
from tests.config.test_config import DATA, PARAMS, problems, small, write

# --- references ------------------------------------------------------------------------------------------


def test_references_resolve(monkeypatch):
    monkeypatch.setenv("DPO_KIT_TEST_LR", "1e-5")
    c = small(
        "ref.mb_spec=${actor.mb_spec}",
        "actor.optimizer.lr=${oc.env:DPO_KIT_TEST_LR}",
        experiment_name="b${actor.beta}-s${seed}",
        valid_dataset="${train_dataset}",
    )
    assert c.experiment_name == "b0.1-s1"
    assert c.actor.optimizer.lr == 1e-5
    assert c.ref.mb_spec == c.actor.mb_spec
    assert (c.valid_dataset.path, c.valid_dataset.split) == ("sample", "train")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${actor.pth}", "there is no actor.pth; did you mean ${actor.path}?"),
        ("${actor.path", "cannot be read: "),
        ("${ref.path}", "Recursive interpolation detected"),
        ("${oc.env:DPO_KIT_NO_SUCH_VARIABLE}", "'DPO_KIT_NO_SUCH_VARIABLE' not found"),
        ("${no_resolver:1}", "Unsupported interpolation type no_resolver"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(reference, message):
    (line,) = problems([f"ref.path={reference}"])
    assert line.startswith(f"ref.path = '{reference}' ")
    assert message in line
    assert "\n" not in line


def test_an_ignored_key_may_refer_to_nothing():
    with pytest.warns(UserWarning, match=r"ignored: stats_logger\.wandb "):
        small(stats_logger={"wandb": {"key": "${oc.env:DPO_KIT_NO_SUCH_VARIABLE}"}})


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n- 2\n", "holds [1, 2], not `key: value` lines"),
        ("just text", "holds 'just text', not"),
        ("actor:\n  path: [a\n", ", line 3, column 1: "),
        ("actor:\n\tpath: x\n", ", line 2, column 1: found character '\\t'"),
        ("seed: 1\nactor: {}\nseed: 2\n", ", line 3, column 1: the key 'seed' is given twice"),
        ("actor:\n  path: a\n  path: b\n", ", line 3, column 3: the key 'path' is given twice"),
        (b"actor:\n  path: caf\xe9\n", ", line 2: byte 0xe9 is not UTF-8; save it as UTF-8"),
        ("seed: 1\n".encode("utf-16"), ", line 1: byte 0xff is not UTF-8"),
        (b"seed: \x00", "special characters are not allowed"),
        ("actor: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: 1\n---\nseed: 2\n", "another document"),
        ("actor: &a\n  path: *a\n", "refers to itself"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n", "has more than 20000 values"),
        ("1: 2\n", "1 is not a known key; keys are text"),
        ("actor.beta: 0.2\n", "'actor.beta' is not a known key; nest sections"),
        ("experiment_name: !!binary aGk=\n", "experiment_name = b'hi' is a bytes"),
    ],
)  # fmt: skip
def test_a_broken_file_is_a_config_error(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert message in str(caught.value)
    assert all("\n" not in line for line in caught.value.problems)


def test_a_missing_file_and_a_folder_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml' does not exist; looked for "):
        config.load(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="is a folder; name the YAML file in it"):
        config.load(tmp_path)


def test_a_byte_order_mark_and_merge_keys_are_read(tmp_path):
    text = (DATA / "seed_fragment.yaml").read_text() + "valid_dataset:\n  <<: {path: sample}\n  split: test\n"
    text += "trial_name: 2024-01-01\n"
    c = config.load(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert c.trial_name == "2024-01-01"
    assert c.valid_dataset.path == "sample"


def test_awkward_texts_survive_the_resolved_yaml(tmp_path):
    for name in ("001", "no", "1:30", "1e3", "null-ish", "~", "[1]", "2024-01-01", "é", "a: b", "'"):
        c = small(f"trial_name={name}", f"train_dataset.name={name}")
        assert config.load(write(tmp_path, config.to_yaml(c))) == c
    c = small("train_dataset.name=\\${kept}")
    assert c.train_dataset.name == "${kept}"
    assert config.load(write(tmp_path, config.to_yaml(c))) == c


# --- backend ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp:d8p1t1", (8, 1, 1)),
        ("fsdp:t2d4", (4, 1, 2)),
        ("fsdp:p1", (1, 1, 1)),
        ("fsdp:p2t3d4", (4, 2, 3)),
    ],
)
def test_backend_sizes_come_in_any_order(text, sizes):
    b = config.parse_backend(text)
    assert (b.d, b.p, b.t) == sizes
    assert b.world_size == math.prod(sizes)
    assert b.explicit
    assert config.parse_backend(str(b)) == b


def test_backend_without_sizes_is_every_device():
    b = config.parse_backend("fsdp")
    assert not b.explicit
    assert str(b) == "fsdp"


@pytest.mark.parametrize(
    "text", ["", "fsdp:", "fsdp:d", "fsdp:d0", "fsdp:d2d4", "fsdp:d-1", "fsdp:x2", "fsdp:d2,p1"]
)
def test_a_wrong_backend_shows_the_form(text):
    with pytest.raises(ConfigError, match="write fsdp, or fsdp:dNpNtN"):
        config.parse_backend(text)


# --- paths -----------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with params/ and notebooks/, the working directory in its root."""
    root = tmp_path / "project"
    for name in ("params", "notebooks", "data"):
        (root / name).mkdir(parents=True)
    (root / "params/x.yaml").write_text((DATA / "seed_fragment.yaml").read_text())
    (root / "data/pairs.jsonl").write_text("")
    monkeypatch.chdir(root)
    return root


def test_the_root_is_the_nearest_parent_that_holds_params(project, tmp_path, monkeypatch):
    assert config.project_root() == project
    monkeypatch.chdir(project / "notebooks")
    assert config.project_root() == project
    assert config.project_root(tmp_path) == PARAMS.parent  # an editable install: the source tree


def test_the_same_file_means_the_same_from_any_folder_of_the_project(project, monkeypatch):
    override = ["train_dataset.path=data/pairs.jsonl"]
    here = config.load("params/x.yaml", override)
    monkeypatch.chdir(project / "notebooks")
    assert config.load("params/x.yaml", override) == here
    assert config.load("../params/x.yaml", override) == here
    assert here.cluster.fileroot == str(project / "runs")
    assert here.train_dataset.path == str(project / "data/pairs.jsonl")
    assert here.actor.path == "Qwen/Qwen2.5-7B"


def test_a_path_that_means_two_files_is_refused(project, monkeypatch):
    other = project / "notebooks/data"
    other.mkdir()
    (other / "pairs.jsonl").write_text("")
    (other / "own.jsonl").write_text("")
    monkeypatch.chdir(project / "notebooks")
    with pytest.raises(ConfigError, match="give the absolute path of the one meant") as caught:
        config.load("params/x.yaml", ["train_dataset.path=data/pairs.jsonl"])
    assert str(other / "pairs.jsonl") in str(caught.value)
    assert str(project / "data/pairs.jsonl") in str(caught.value)
    own = config.load("params/x.yaml", ["train_dataset.path=data/own.jsonl"])
    assert own.train_dataset.path == str(other / "own.jsonl")


def test_built_in_names_are_never_folders(project):
    for name in config.BUILTIN_NAMES:
        (project / name).mkdir()
    c = config.load("params/x.yaml", ["actor.path=tiny-random", "train_dataset.path=sample"])
    assert (c.actor.path, c.train_dataset.path) == ("tiny-random", "sample")
    assert config.load("params/x.yaml", ["actor.path=./tiny-random"]).actor.path == str(
        project / "tiny-random"
    )


def test_home_and_a_file_in_place_of_the_runs(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    assert config.load("params/x.yaml", ["cluster.fileroot=~/r"]).cluster.fileroot == str(project / "r")
    with pytest.raises(ConfigError, match="is a file; give a folder for the runs"):
        config.load("params/x.yaml", ["cluster.fileroot=params/x.yaml"])


# --- the module ------------------------------------------------------------------------------------------


def test_config_imports_nothing_heavy():
    code = (
        "import sys, dpo_kit.config; "
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'datasets', 'papermill', 'IPython'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(PARAMS.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_every_default_passes_its_own_rule():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = small("valid_dataset.path=sample")
    names = config.field_names()
    assert len(names) == len(set(names))
    for name in names:
        node = c
        for part in name.split("."):
            node = getattr(node, part)
        assert not (isinstance(node, str) and "${" in node), name
