"""Models and pairs before the ranks."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from dpo_kit import config as config_module
from dpo_kit.dataset import builder, prepare, tokens
from dpo_kit.errors import ConfigError
from dpo_kit.model import builtin, model_folder, pair_model
from dpo_kit.preferences import open_store
from dpo_kit.records import findings, resuming, run_folder, status
from dpo_kit.records.facts import Point
from dpo_kit.records.findings import Finding
from dpo_kit.system.files import read_json
from tests.fakes import TREE


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))

    def make(*overrides, answers=("yes", "no")):
        lines = [
            {
                "chosen": f"\n\nHuman: {i}?\n\nAssistant: {answers[0]}",
                "rejected": f"\n\nHuman: {i}?\n\nAssistant: {answers[1]}",
            }
            for i in range(20)
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        overrides = [f"cluster.fileroot={tmp_path}/runs", *overrides]
        config = config_module.from_tree(TREE, overrides, root=tmp_path)
        text = config_module.to_yaml(config)
        return run_folder.create(tmp_path / "runs", "exp", "one", config_text=text, manifest={"seed": 1})

    return make


def test_stores_and_fingerprints_are_left_for_the_ranks(make_run, capsys):
    run_dir = make_run("valid_dataset.from_train=0.2")
    assert prepare.main(run_dir) == 0
    data = read_json(run_dir / "data.json")
    train, valid = open_store(data["train"]), open_store(data["valid"])
    assert len(train) + len(valid) == 20
    made = read_json(run_dir / "manifest.json")
    assert made["seed"] == 1
    assert made["data"]["train"] == {
        "store": data["train"],
        "fingerprint": train.fingerprint,
        "num_pairs": len(train),
        "layout": "raw",
    }
    progress = read_json(run_dir / "progress.json")
    assert progress["phase"] == "build pairs"
    assert [phase["name"] for phase in progress["phases"]] == ["convert model"]
    assert "20" in capsys.readouterr().out


def test_without_a_valid_dataset_there_is_none(make_run):
    run_dir = make_run()
    assert prepare.main(run_dir) == 0
    assert read_json(run_dir / "data.json")["valid"] is None
    assert "valid" not in read_json(run_dir / "manifest.json")["data"]


def test_a_users_mistake_is_left_as_its_message(make_run, capsys):
    run_dir = make_run(answers=("same", "same"))
    assert prepare.main(run_dir) == 2
    (error,) = status.read_rank_errors(run_dir)
    assert (error["rank"], error["user_mistake"]) == ("prepare", True)
    assert "identical" in error["message"]
    assert "Traceback" not in capsys.readouterr().err
    assert not (run_dir / "data.json").exists()


def test_weights_are_read_once_and_for_all_ranks(make_run, tmp_path, monkeypatch):
    run_dir = make_run()
    monkeypatch.setattr(prepare, "_WORTH_TELLING_S", -1.0)  # large ones take longer
    assert prepare.main(run_dir) == 0
    progress = read_json(run_dir / "progress.json")
    assert (progress["phase"], progress["done"], progress["total"]) == ("load model", 100, 100)
    monkeypatch.setattr(model_folder, "_hash", lambda *_: pytest.fail("read again"))
    known = model_folder.known_hashes(tmp_path / "runs")
    assert model_folder.fingerprint(builtin.ensure("tiny-random"), known)


def test_weights_that_are_no_numbers_end_it(make_run, tmp_path):
    folder = shutil.copytree(builtin.ensure("tiny-random"), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"][7, 7] = float("inf")
    save_file(held, folder / "model.safetensors")
    run_dir = make_run(f"actor.path={folder}", "tokenizer_path=tiny-random")
    assert prepare.main(run_dir) == 2
    (error,) = status.read_rank_errors(run_dir)
    assert error["message"].startswith(
        f"actor.path: {folder}/model.safetensors: lm_head.weight holds values that"
    )


def test_adapters_of_no_layer_are_told_with_the_layers_there_are(make_run):
    run_dir = make_run("actor.use_lora=true", "actor.target_modules=[q_proj,qkv,lm_head]")
    assert prepare.main(run_dir) == 2
    assert read_json(run_dir / "logs" / "prepare.error.json")["message"] == (
        "actor.target_modules: qkv, lm_head are no linear layer of the model below its head;"
        " it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )
    for good in ("[]", "[all-linear]", "[self_attn.q_proj]"):
        config = config_module.from_tree(TREE, ["actor.use_lora=true", f"actor.target_modules={good}"])
        prepare.check_models(config)


def test_an_error_of_our_own_is_left_with_its_traceback(make_run, monkeypatch, capsys):
    run_dir = make_run()
    monkeypatch.setattr(prepare, "build_pairs", lambda *a: 1 / 0)
    assert prepare.main(run_dir) == 1
    assert status.read_rank_errors(run_dir)[0]["error"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def work(monkeypatch):
    """What prepare does beyond comparing: names of models that are checked, tokenizers loaded, stores built."""
    prepare._checked.cache_clear()
    tokens._facts.cache_clear()
    tokens._loaded.cache_clear()
    done = []
    for module, name in ((pair_model, "check"), (builtin, "load_tokenizer"), (builder, "collect")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=real: done.append(n) or f(*a))
    return done


def other_weights(folder, _):
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"][7, 7] += 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def other_json(name, **fields):
    def change(folder, _):
        made = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(made | fields))

    return change


def other_tokenizer(folder, _):
    file = folder / "tokenizer.json"
    state = file.stat()
    text = file.read_text()
    for old, new in (('"!"', '"?!"'), ('"#"', '"!"'), ('"?!"', '"#"')):
        text = text.replace(old, new)
    file.write_text(text)
    assert file.stat().st_size == state.st_size
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # small files count by content


def other_data(_, data):
    data.write_text(data.read_text().replace("yes", "yea"))


CHANGES = [
    ("weights", other_weights, (), {"check"}),
    ("config", other_json("config.json", rms_norm_eps=1e-4), (), {"check"}),
    ("tokenizer", other_tokenizer, (), {"load_tokenizer", "collect"}),
    (
        "template",
        lambda f, _: (f / "chat_template.jinja").write_text("other"),
        (),
        {"load_tokenizer", "collect"},
    ),
    ("data", other_data, (), {"collect"}),
    ("length", lambda *_: None, ("train_dataset.max_length=300",), {"collect"}),
    ("tokenizer_path", lambda *_: None, ("tokenizer_path=tiny-random",), {"load_tokenizer"}),
    ("ref.path", lambda *_: None, ("ref.path=tiny-random",), {"check"}),
]


@pytest.mark.parametrize(
    ("change", "overrides", "expected"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES]
)
def test_what_was_checked_is_checked_again_only_when_it_changed(
    make_run, tmp_path, work, capsys, change, overrides, expected
):
    folder = shutil.copytree(builtin.ensure("tiny-random"), tmp_path / "model")
    settings = ("valid_dataset.from_train=0.2", f"actor.path={folder}", f"ref.path={folder}")
    run_dir = make_run(*settings)
    assert prepare.main(run_dir) == 0
    assert set(work) == {"check", "load_tokenizer", "collect"}
    assert work.count("check") == work.count("load_tokenizer") == 1
    first, told = (
        [(run_dir / name).read_text() for name in ("data.json", "findings.json")],
        capsys.readouterr().out,
    )
    work.clear()
    assert prepare.main(run_dir) == 0
    assert work == []
    assert [(run_dir / name).read_text() for name in ("data.json", "findings.json")] == first
    assert capsys.readouterr().out == told
    change(folder, tmp_path / "data.jsonl")
    text = config_module.to_yaml(config_module.load(run_dir / "config.yaml", overrides))
    (run_dir / "config.yaml").write_text(text)
    assert prepare.main(run_dir) == 0
    assert expected <= set(work)


def test_a_refusal_is_not_remembered_as_an_answer(make_run, tmp_path, work):
    folder = shutil.copytree(builtin.ensure("tiny-random"), tmp_path / "model")
    run_dir = make_run(f"actor.path={folder}")
    assert prepare.main(run_dir) == 0
    other_json("config.json", num_hidden_layers=3)(folder, None)
    for _ in range(2):
        assert prepare.main(run_dir) == 2
        assert "weights are missing" in status.read_rank_errors(run_dir)[0]["message"]


def test_a_reference_with_another_vocabulary_is_refused(make_run, tmp_path):
    run_dir = make_run()
    folder = tmp_path / "other"
    tokenizer = builtin.load_tokenizer("tiny-random")
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(folder)
    config = config_module.load(run_dir / "config.yaml", [f"ref.path={folder}"])
    with pytest.raises(
        ConfigError, match=r"has another tokenizer than 'tiny-random': 1 of 26\d tokens differ"
    ):
        prepare.check_tokenizers(config)


def test_what_ranks_found_stays_while_the_run_goes_on_from_their_steps(make_run, monkeypatch):
    run_dir = make_run()
    first, stale = (
        Finding("bad", "first step", "log-probs differ"),
        Finding("look", "dropped", "of other data"),
    )
    findings.write(run_dir, [first, stale])
    read = prepare.read_facts
    monkeypatch.setattr(prepare, "read_facts", lambda *given: replace(read(*given), at=Point(2, {})))
    monkeypatch.setattr(resuming, "refusal", lambda *_: "")
    assert prepare.main(run_dir) == 0
    assert findings.read(run_dir) == [first]
    monkeypatch.setattr(prepare, "read_facts", read)
    assert prepare.main(run_dir) == 0
    assert findings.read(run_dir) == []


def test_what_the_checks_find_is_kept_for_the_reader(make_run):
    run_dir = make_run("actor.optimizer.lr=0", answers=("yes", "yes"))
    assert (
        prepare.main(run_dir) == 2
    )  # identical pairs only: refused, and nothing is found about a run that is none
    assert findings.read(run_dir) == []
