"""What may not go on from a checkpoint is refused before anything of the run changes; real runs, tiny model."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from dpo_kit import config as config_module
from dpo_kit import launch, runs, sweep
from dpo_kit.errors import RunError, UserError
from dpo_kit.launch import forks
from dpo_kit.model import builtin
from dpo_kit.records import facts, metrics, resuming, run_folder
from dpo_kit.system import machine
from dpo_kit.system.files import read_json
from tests.supervise.test_supervisor import until
from tests.test_cli import call, pair, write_rows

STEPS, EPOCH = 30, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a params file, data, and a fileroot with a space that is not the default one."""
    folder = tmp_path_factory.mktemp("resuming")
    for name, word in [("data", "yes"), ("other", "sure"), ("valid", "well"), ("other_valid", "hm")]:
        write_rows(folder / f"{name}.jsonl", [pair(i, word) for i in range(12)])
    tree = {
        "experiment_name": "exp",
        "total_train_steps": STEPS,
        "total_train_epochs": 100,
        "cluster": {"fileroot": str(folder / "my runs"), "n_gpus_per_node": 0},
        "actor": {"path": "tiny-random", "dtype": "float32", "backend": "fsdp:d1"},
        "ref": {"path": "${actor.path}", "backend": "${actor.backend}"},
        "train_dataset": {"path": str(folder / "data.jsonl"), "batch_size": 4},
        "valid_dataset": {"path": str(folder / "valid.jsonl")},
        "recover": {"freq_steps": 1, "mode": "auto"},
        "evaluator": {"num_samples": 0, "before_training": False},
        "stats_logger": {"tensorboard": False},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    other_models(folder)
    return folder


def other_models(folder):
    """Models with other weights, and with a tokenizer of the same ids that reads text differently."""
    from safetensors.torch import load_file, save_file

    own = Path(builtin.ensure("tiny-random"))
    for name in ("moved", "weights", "tokenizer"):
        shutil.copytree(own, folder / name)
    (file,) = (folder / "weights").glob("*.safetensors")
    tensors = load_file(file)
    save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, file, {"format": "pt"})
    described = read_json(folder / "tokenizer" / "tokenizer.json")
    described["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(described))


def settings(place, *overrides):
    return config_module.load(place / "params.yaml", ["trial_name=one", *overrides])


@pytest.fixture(scope="module")
def stopped(place):
    """A run that was stopped with a checkpoint; tests must leave it as it is."""
    run = launch.start(settings(place), owner="interactive")
    until(lambda: run.checkpoints()[-1:] > [EPOCH], 60)
    assert run.stop().state == "stopped"
    assert EPOCH < run.checkpoints()[-1] < STEPS
    (run.dir / "checkpoints" / ".tmp-step-99-1").mkdir()  # what a killed rank left goes when the run goes on
    (run.dir / "checkpoints" / ".tmp-step-99-1" / "half").write_bytes(b"0" * 100)
    return run


def content(folder):
    """Every file below a folder with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------- compare first, write after

DIFFERENCES = {
    "other data": (["train_dataset.path=PLACE/other.jsonl"], "the content of train_dataset: "),
    "other valid data": (["valid_dataset.path=PLACE/other_valid.jsonl"], "the content of valid_dataset: "),
    "other weights": (["actor.path=PLACE/weights", "ref.path=tiny-random"], "the content of actor.path: "),
    "another reference": (["ref.path=PLACE/weights"], "the content of ref.path: "),
    "another tokenizer": (["tokenizer_path=PLACE/tokenizer"], "the content of train_dataset: "),
    "unusable data": (["train_dataset.path=PLACE/params.yaml"], "params.yaml"),
    "no data": (["train_dataset.path=PLACE/nowhere.jsonl"], "no such file"),
    "another beta": (["actor.beta=0.2"], "actor.beta: 0.1 -> 0.2"),
    "another seed": (["seed=9"], "seed: 1 -> 9"),
    "another dtype": (["actor.dtype=float64", "ref.logps=online"], "actor.dtype: float32 -> float64"),
    "fewer steps": (["total_train_steps=1"], "would have to end at step 1"),
    "fewer epochs": (["total_train_epochs=1", "total_train_steps=null"], f"have to end at step {EPOCH}"),
    "a small micro-batch": (["actor.mb_spec.max_tokens_per_mb=3"], "actor.mb_spec.max_tokens_per_mb = 3"),
    "more ranks": (["cluster.n_gpus_per_node=8"], "cluster.n_gpus_per_node = 8 is more than the 0 CUDA"),
    "no memory": ([], "GiB are free"),
    "no disk": ([], "0.0 MiB are free"),
}


def by_command(place, *overrides):
    status, _, err = call("train", "--config", place / "params.yaml", "trial_name=one", *overrides)
    assert status == 2, err
    return "\n".join(err)


def by_detaching(place, *overrides):
    return by_command(place, "--detach", *overrides)


def by_start(place, *overrides):
    with pytest.raises(UserError) as caught:
        launch.start(settings(place, *overrides), owner="headless")
    return str(caught.value)


def by_sweep(place, *overrides):
    with pytest.raises(RunError) as caught:
        sweep.Sweep([sweep.Trial("one", settings(place, *overrides))]).run(show=False)
    return str(caught.value)


def by_fork(place, *overrides):
    status, _, err = call("runs", "fork", place / "my runs" / "exp" / "one", *overrides)
    assert status == 2, err
    return "\n".join(err)


def by_resume(place, *overrides):
    status, _, err = call("runs", "resume", place / "my runs" / "exp" / "one", *overrides)
    assert status == 2, err
    return "\n".join(err)


@pytest.fixture
def differs(place, monkeypatch):
    """Overrides and the message of a difference; machines are made small for it."""

    def make(name):
        monkeypatch.setattr(machine, "visible_devices", lambda: 0)
        if name == "no memory":
            monkeypatch.setattr("dpo_kit.system.machine.free_host_bytes", lambda: 1000)
        if name == "no disk":
            monkeypatch.setattr("dpo_kit.system.machine.free_disk", lambda _: 1000)
        overrides, told = DIFFERENCES[name]
        return [text.replace("PLACE", str(place)) for text in overrides], told

    return make


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("door", [by_command, by_detaching, by_start, by_sweep])
def test_what_is_refused_changes_nothing_of_the_run(place, stopped, differs, door, name):
    overrides, told = differs(name)
    before = content(stopped.dir)
    assert told in door(place, *overrides)
    assert content(stopped.dir) == before


@pytest.mark.parametrize("name", ["no memory", "no disk", "more ranks"])
def test_a_resume_that_is_refused_changes_nothing(place, stopped, differs, name):
    _, told = differs(name)
    text = (stopped.dir / "config.yaml").read_text()
    if name == "more ranks":
        (stopped.dir / "config.yaml").write_text(text.replace("n_gpus_per_node: 0", "n_gpus_per_node: 8"))
    before = content(stopped.dir)
    try:
        assert told in by_resume(place)
        with pytest.raises(UserError, match=re.escape(told)):
            stopped.resume()
        assert content(stopped.dir) == before
    finally:
        (stopped.dir / "config.yaml").write_text(text)


FORK_DIFFERENCES = [name for name in DIFFERENCES if name not in ("other valid data", "another beta")]


@pytest.mark.parametrize("name", FORK_DIFFERENCES)
def test_a_fork_that_is_refused_leaves_no_folder(place, stopped, differs, name):
    overrides, told = differs(name)
    before = content(place / "my runs" / "exp")
    said = by_fork(place, *overrides)
    assert name != "another dtype" or told in said
    assert content(place / "my runs" / "exp") == before


def test_a_fork_of_data_that_changed_meanwhile_leaves_no_folder(place, stopped):
    """The same path with another content: the prepare step sees it."""
    before = content(place / "my runs" / "exp")
    text = (place / "data.jsonl").read_text()
    (place / "data.jsonl").write_text((place / "other.jsonl").read_text())
    try:
        told = by_fork(place)
    finally:
        (place / "data.jsonl").write_text(text)
    assert "the content of train_dataset: " in told
    assert content(place / "my runs" / "exp") == before


def test_data_that_changed_meanwhile_are_refused_before_the_ranks_and_put_back_they_go_on(place, stopped):
    copied = stopped.dir.with_name("copied")
    shutil.copytree(stopped.dir, copied)
    text = (place / "data.jsonl").read_text()
    (place / "data.jsonl").write_text((place / "other.jsonl").read_text())
    kept = ("config.yaml", "data.json", "metrics.jsonl", "budget.json", "checkpoints/step-")
    before = {name: mark for name, mark in content(copied).items() if name.startswith(kept)}
    made = read_json(copied / "manifest.json")
    try:
        status, _, err = call("runs", "resume", copied)
    finally:
        (place / "data.jsonl").write_text(text)
    assert status == 2
    assert "the content of train_dataset: " in err[0]
    assert {name: mark for name, mark in content(copied).items() if name.startswith(kept)} == before
    now = read_json(copied / "manifest.json")
    assert (now["data"], now["weights"]) == (made["data"], made["weights"])
    assert "to continue when that is mended: dpo-kit runs resume " in "\n".join(err)
    assert call("runs", "resume", copied)[0] == 0
    assert metrics.read_metrics(copied)[-1]["step"] == STEPS


# ---------------------------------------------------------------- what is the same goes on


def test_moved_files_of_the_same_content_go_on(place, stopped):
    copied = stopped.dir.with_name("moved")
    shutil.copytree(stopped.dir, copied)
    shutil.copy(place / "data.jsonl", place / "moved.jsonl")
    step = runs.Run(copied).checkpoints()[-1]
    moved = (f"train_dataset.path={place / 'moved.jsonl'}", f"actor.path={place / 'moved'}")
    length = f"total_train_steps={step + 1}"
    status, out, err = call(
        "train", "--config", place / "params.yaml", "trial_name=moved", "ref.path=tiny-random", *moved, length
    )
    assert (status, err) == (0, [])
    assert any(f"goes on from its last checkpoint, step-{step}" in line for line in out)
    assert runs.Run(copied).status["step"] == step + 1
    assert runs.Run(copied).config.train_dataset.path == str(place / "moved.jsonl")


def test_a_refused_run_can_be_forked(place, stopped, differs):
    """With the very command that its refusal recommends."""
    told = by_start(place, "actor.beta=0.2")
    command = shlex.split(told[told.index("dpo-kit runs fork") :])
    assert command[-1] == "actor.beta=0.2"
    step = stopped.checkpoints()[-1]
    status, _, err = call(*command[1:], f"total_train_steps={step + 1}", "trial_name=child")
    assert (status, err) == (0, [])
    child = runs.find("child", place / "my runs")
    assert (child.state, child.config.actor.beta, child.status["step"]) == ("done", 0.2, step + 1)


def test_a_fork_that_the_ranks_refuse_before_their_first_step_leaves_no_folder(place, stopped, monkeypatch):
    """A micro-batch that the launcher let pass."""
    monkeypatch.setattr("dpo_kit.records.resuming.micro_batch_problem", lambda *_: "")
    before = content(place / "my runs" / "exp")
    told = by_fork(place, "actor.mb_spec.max_tokens_per_mb=3")
    assert "is less than the longest pair" in told
    assert "logs/" not in told
    assert content(place / "my runs" / "exp") == before


def test_a_fork_that_made_a_step_of_its_own_stays(place, stopped):
    """Its checkpoint alone is nothing that its parent has not; a step of its own is."""
    child = forks.fork(stopped, overrides=["trial_name=own"])
    step = child.checkpoints()[-1]
    assert facts.is_spare(child.dir)
    metrics.append_metrics(child.dir, {"step": step + 1, "dpo/loss": 0.5})
    assert not facts.is_spare(child.dir)
    metrics.cut_records(child.dir, step)
    assert facts.is_spare(child.dir)
    parent = read_json(child.dir / "manifest.json")["parent"]
    made = read_json(child.dir / "manifest.json") | {"parent": {**parent, "folder": "/gone"}}
    (child.dir / "manifest.json").write_text(json.dumps(made))
    shutil.move(stopped.dir, place / "elsewhere")
    try:  # the only copy of that checkpoint
        assert not facts.is_spare(child.dir)
    finally:
        shutil.move(place / "elsewhere", stopped.dir)
    run_folder.remove_folder(child.dir)


def test_every_value_of_a_configuration_can_be_written_as_an_override(place):
    config = settings(
        place, "actor.optimizer.lr=1e-7", "actor.mb_spec.max_tokens_per_mb=auto", "experiment_name=no"
    )
    tree = config_module.to_tree(config)

    def keys(node, prefix=""):
        for key, value in node.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    overrides = [resuming.override(key, tree) for key in keys(tree)]
    assert len(overrides) > 50
    base = {section: tree[section] for section in ("actor", "ref", "train_dataset")}
    assert config_module.from_tree(base, overrides) == config
