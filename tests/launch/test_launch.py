"""Starting runs: devices, names, owners; over fake processes unless it says otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dpo_kit import launch, runs
from dpo_kit.errors import DataError, RunError, UserError
from dpo_kit.launch import forks, trial
from dpo_kit.model import builtin
from dpo_kit.records import findings, manifest, metrics, run_folder, status
from dpo_kit.system import folders, machine
from dpo_kit.system.files import read_json
from dpo_kit.tools import listing
from tests.fakes import LONG
from tests.supervise.test_supervisor import until

# ---------------------------------------------------------------- devices


@pytest.fixture
def visible(monkeypatch):
    """Sets how many CUDA devices there seem to be."""

    def set_number(number):
        monkeypatch.setattr(machine, "visible_devices", lambda: number)

    set_number(0)
    return set_number


def resolved(config):
    said = []
    config = launch.resolve_world(config, said.append)
    return config.cluster.n_gpus_per_node, config.actor.backend, config.ref.backend, said


def test_auto_takes_every_device_and_else_one_cpu_rank(fakes, visible):
    config = fakes.config("cluster.n_gpus_per_node=auto", "actor.backend=fsdp", "ref.backend=fsdp")
    assert resolved(config)[:3] == (0, "fsdp:d1p1t1", "fsdp:d1p1t1")
    visible(4)
    assert resolved(config)[:3] == (4, "fsdp:d4p1t1", "fsdp:d4p1t1")
    assert resolved(config)[3] == ["4 CUDA ranks (NCCL)"]
    assert config.cluster.n_gpus_per_node == "auto"


def test_zero_means_cpu_ranks_even_beside_devices(fakes, visible):
    visible(4)
    number, backend, _, said = resolved(fakes.config("cluster.n_gpus_per_node=0"))
    assert (number, backend) == (0, "fsdp:d2")
    assert said[0].startswith("2 CPU ranks (gloo), ")


def test_fewer_ranks_than_devices_run_and_say_so_once(fakes, visible):
    visible(4)
    said = resolved(fakes.config("cluster.n_gpus_per_node=auto"))[3]
    assert said == ["2 CUDA ranks (NCCL); 2 of 4 visible devices stay unused"]


@pytest.mark.parametrize(
    ("number", "overrides", "told"),
    [
        (1, ["cluster.n_gpus_per_node=2"], "cluster.n_gpus_per_node = 2 is more than the 1 CUDA devices"),
        (0, ["cluster.n_gpus_per_node=8"], "cluster.n_gpus_per_node = 8 is more than the 0 CUDA devices"),
        (1, ["cluster.n_gpus_per_node=auto"], "needs 2 ranks, more than the 1 devices"),
        (
            0,
            ["cluster.n_gpus_per_node=auto", "actor.backend=fsdp:d4096", "train_dataset.batch_size=4096"],
            "4096 ranks",
        ),
        (
            4,
            ["cluster.n_gpus_per_node=auto", "actor.backend=fsdp", "train_dataset.batch_size=2"],
            "2 is less than 4 data",
        ),
        (0, ["scheduler.type=ray", "cluster.n_nodes=3"], "has 2 ranks for cluster.n_nodes = 3"),
    ],
)
def test_what_cannot_run_is_refused_with_both_numbers_and_nothing_on_disk(
    fakes, visible, number, overrides, told
):
    visible(number)
    overrides = [*overrides, "ref.backend=${actor.backend}"]
    for launcher in (launch.start, launch.run_in_foreground):
        with pytest.raises(UserError, match=told):
            launcher(fakes.config(*overrides))
    assert not fakes.fileroot.exists()


# ---------------------------------------------------------------- a run from start to end


def test_a_run_is_started_at_once_and_ends_done(fakes, capsys):
    fakes.play([["sleep", 1.0], ["train", 3, 0.02]])
    began = time.monotonic()
    run = launch.start(fakes.config())
    assert time.monotonic() - began < 1.0
    assert run.is_live
    run.wait()
    assert run.state == "done"
    assert run.dir == fakes.fileroot / "exp" / run.dir.name
    assert run.config.trial_name == run.dir.name
    owner = run.status["owner"]
    assert (owner["kind"], owner["pid"]) == ("headless", os.getpid())
    out = capsys.readouterr().out
    assert f"run: {run.dir}\n" in out
    assert out.splitlines()[-1].startswith("done after ")
    assert list(run.metrics()["step"]) == [1, 2, 3]


def test_the_manifest_tells_what_the_run_was_made_from(fakes):
    run = launch.start(fakes.config("seed=7", "trial_name=a trial"))
    run.wait()
    made = read_json(run.dir / "manifest.json")
    assert made["versions"].keys() >= {"torch", "transformers", "numpy", "python", "dpo_kit"}
    assert (made["seeds"]["seed"], made["trial_named"], made["started"]) == (7, True, "headless")
    assert made["hardware"]["logical_cores"] == os.cpu_count()
    assert made["git"] is None or len(made["git"]["commit"]) == 40
    assert made["command"] == f"dpo-kit train --config '{run.dir}/config.yaml' trial_name=null"
    resolved_config = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert resolved_config["trial_name"] == "a trial"


def test_start_imports_nothing_heavy(fakes):
    code = (
        "import sys\n"
        "from dpo_kit import config, launch; from tests.fakes import TREE\n"
        "c = config.from_tree(TREE, [f'cluster.fileroot={sys.argv[1]}/runs'], root=sys.argv[1])\n"
        "run = launch.start(c, owner='interactive')\n"
        "heavy = ('torch', 'transformers', 'datasets', 'plotly', 'pandas')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(fakes.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    runs.find("exp/" + fakes.folders()[0].split("/")[1], fakes.fileroot).stop()


def test_data_that_are_plainly_not_there_leave_nothing(fakes):
    with pytest.raises(DataError, match=r"train_dataset.path = 'no.jsonl': no such file"):
        launch.start(fakes.config("train_dataset.path=no.jsonl"))
    (fakes.root / "data.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.jsonl.* empty"):
        launch.start(fakes.config())
    assert not fakes.fileroot.exists()


def test_models_that_are_nowhere_are_told_together(fakes):
    config = fakes.config("actor.path=./no/model", "ref.path=/no/other", "tokenizer_path=./no/model")
    with pytest.raises(UserError) as caught:
        launch.start(config)
    first, second = str(caught.value).splitlines()
    assert first.startswith("actor.path = './no/model' is no folder and no hub id")
    assert second.startswith("ref.path = '/no/other'")
    assert not fakes.fileroot.exists()


def test_adapters_without_peft_are_told_with_the_install_line(fakes, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(
        UserError, match=r'needs peft, which is not installed; run: pip install "dpo-kit\[lora\]"'
    ):
        launch.start(fakes.config("actor.use_lora=true"))
    assert not fakes.fileroot.exists()
    launch.start(fakes.config()).wait()


def test_a_reference_with_another_tokenizer_is_refused(fakes):
    for name, vocabulary in [
        ("own", {"a": 0, "b": 1}),
        ("other", {"a": 0, "c": 1}),
        ("same", {"b": 1, "a": 0}),
    ]:
        shutil.copytree(builtin.ensure("tiny-random"), fakes.root / name)
        text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<e>", "id": 2}]})
        (fakes.root / name / "tokenizer.json").write_text(text)
    own = ["actor.path=own", "tokenizer_path=own"]
    with pytest.raises(
        UserError, match=r"ref.path = '.*other' has another tokenizer than '.*own': 2 of 4 tokens"
    ):
        launch.start(fakes.config(*own, "ref.path=other"))
    assert not fakes.fileroot.exists()
    launch.start(fakes.config(*own, "ref.path=same")).wait()


# ---------------------------------------------------------------- names


def test_a_named_trial_that_exists_is_refused_naming_three_ways(fakes):
    launch.start(fakes.config("trial_name=one")).wait()
    with pytest.raises(UserError) as caught:
        launch.start(fakes.config("trial_name=one"))
    told = str(caught.value)
    way = f"`dpo-kit runs resume {fakes.fileroot}/exp/one`"
    assert f"exp/one exists and is done; use another trial_name, or {way}, or" in told
    assert told.endswith("recover.mode=auto")
    assert "\n" not in told


def test_a_done_trial_is_skipped_with_recover_auto(fakes, capsys):
    first = launch.start(fakes.config("trial_name=one"))
    first.wait()
    ended = first.status["ended_at"]
    again = launch.start(fakes.config("trial_name=one", "recover.mode=auto"))
    assert again.wait().status["ended_at"] == ended
    assert "exp/one is done at step 3: skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"done with another configuration \(actor.beta: 0.1 -> 0.2\)"):
        launch.start(fakes.config("trial_name=one", "recover.mode=auto", "actor.beta=0.2"))


def interrupted(fakes, *overrides, step=2):
    """A stopped run with a checkpoint."""
    fakes.play([["train", 3, 0.02], ["checkpoint", step], ["train", 600, 0.1]])
    run = launch.start(fakes.config("trial_name=one", *overrides))
    until(lambda: len(metrics.read_metrics(run.dir)) >= 4)
    run.stop()
    assert run.checkpoints() == [step]
    return run


def test_an_interrupted_trial_goes_on_from_its_checkpoint(fakes, capsys):
    run = interrupted(fakes)
    fakes.play([["train", 2, 0.02]])
    again = launch.start(fakes.config("trial_name=one", "recover.mode=auto", "total_train_epochs=7"))
    assert again.wait().status["attempt"] == 2
    out = capsys.readouterr().out
    assert "its configuration changes: total_train_epochs: 1 -> 7" in out
    assert "exp/one goes on from its last checkpoint, step-2" in out
    assert len(metrics.read_metrics(run.dir)) > 4  # the ranks cut it, not the launcher
    assert again.config.total_train_epochs == 7


def test_another_configuration_does_not_go_on_from_a_checkpoint(fakes):
    run = interrupted(fakes)
    before = (run.dir / "config.yaml").read_text()
    with pytest.raises(
        UserError, match=r"actor.beta: 0.1 -> 0.2\); use another trial_name, or fork it"
    ) as told:
        launch.start(fakes.config("trial_name=one", "recover.mode=auto", "actor.beta=0.2"))
    assert str(told.value).endswith(f"dpo-kit runs fork {run.dir} --step 2 actor.beta=0.2")
    assert (run.dir / "config.yaml").read_text() == before
    assert run.state == "stopped"


def test_a_done_trial_is_made_longer_only_from_a_checkpoint_that_was_kept(fakes):
    launch.start(fakes.config("trial_name=one")).wait()
    longer = ("trial_name=one", "recover.mode=auto", "total_train_epochs=2")
    with pytest.raises(UserError, match="kept no checkpoint to go on from"):
        launch.start(fakes.config(*longer))
    fakes.play([["train", 3, 0.02], ["checkpoint", 3]])
    launch.start(fakes.config("trial_name=two", "recover.keep=all")).wait()
    fakes.play([["train", 2, 0.02]])
    again = launch.start(fakes.config("trial_name=two", "recover.keep=all", *longer[1:])).wait()
    assert (again.state, again.status["attempt"]) == ("done", 2)


def test_a_fork_is_a_new_run_from_a_checkpoint(fakes):
    parent = interrupted(fakes)
    findings.add(parent.dir, findings.Finding("bad", "first step", "log-probs differ"))
    before = metrics.read_metrics(parent.dir)
    child = forks.fork(parent, 2, ["actor.beta=0.3", "trial_name=child"])
    assert (child.name, child.state, child.config.actor.beta) == ("exp/child", "queued", 0.3)
    assert read_json(child.dir / "manifest.json")["parent"] == {
        "run": "exp/one",
        "folder": str(parent.dir),
        "step": 2,
        "overrides": ["actor.beta=0.3"],
    }
    assert manifest.repeat_command(child.dir) == f"dpo-kit runs fork {parent.dir} --step 2 actor.beta=0.3"
    assert "fork of  exp/one at step 2\n  goes on  from a checkpoint of step 2" in listing.show_text(child)
    assert child.checkpoints() == [2]
    assert findings.read(child.dir) == findings.read(parent.dir) != []
    assert folders.damage(child.dir / "checkpoints" / "step-2") == ""
    assert metrics.read_metrics(child.dir) == [line for line in before if line["step"] <= 2]
    assert (parent.config.actor.beta, metrics.read_metrics(parent.dir)) == (0.1, before)
    # Removing the parent's takes nothing from the child.
    folders.discard(parent.dir / "checkpoints" / "step-2")
    assert folders.damage(child.dir / "checkpoints" / "step-2") == ""


def test_a_fork_takes_the_newest_whole_checkpoint_and_lies_beside_its_parent(fakes, tmp_path):
    """Also when the runs were moved since the parent wrote where its root is."""
    parent = interrupted(fakes)
    step = parent.dir / "checkpoints"
    shutil.copytree(step / "step-2", step / "step-3")
    (step / "step-3" / "data").write_text("x")
    fakes.fileroot.rename(tmp_path / "moved")
    child = forks.fork(runs.open(tmp_path / "moved" / "exp" / "one"))
    assert child.checkpoints() == [2]
    assert child.dir.parent == tmp_path / "moved" / "exp"
    assert not fakes.fileroot.exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train_dataset.batch_size=3", "train_dataset.batch_size: 8 -> 3"),
        ("seed=9", "seed: 1 -> 9"),
        ("total_train_steps=2", "total_train_steps = 2 is not past step 2"),
    ],
)
def test_a_fork_that_could_not_follow_from_its_parent_is_refused(fakes, override, told):
    parent = interrupted(fakes)
    with pytest.raises(UserError, match=told):
        forks.fork(parent, 2, [override])
    assert fakes.folders() == ["exp/one"]


def test_a_run_that_repeats_a_fork_from_the_start_says_so(fakes):
    child = forks.fork(interrupted(fakes), 2, ["trial_name=child"])
    made = read_json(child.dir / "manifest.json")
    again = run_folder.create(
        fakes.fileroot,
        "exp",
        "again",
        config_text=(child.dir / "config.yaml").read_text(),
        manifest={**made, "parent": None, "repeats": str(child.dir)},
    )
    assert "differs in forked from: exp/one at step 2 -> nothing" in manifest.repetition(again)


def test_a_fork_that_is_killed_while_it_copies_leaves_no_run(fakes, monkeypatch):
    parent = interrupted(fakes)
    monkeypatch.setattr(forks, "_link", lambda *_: os._exit(9))
    child = os.fork()
    if child == 0:
        forks.fork(parent, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert fakes.folders() == ["exp/one"]


def test_a_fork_that_lost_its_checkpoint_does_not_begin_at_the_first_step(fakes):
    child = forks.fork(interrupted(fakes), 2, ["trial_name=child"])
    folders.discard(child.dir / "checkpoints" / "step-2")
    status.update_status(child.dir, state="stopped")
    with pytest.raises(
        UserError, match="exp/child is a fork of exp/one at step 2, and has no checkpoint any more"
    ):
        child.resume()


def test_a_run_that_would_end_before_its_checkpoint_is_refused_before_anything_changes(fakes):
    run = interrupted(fakes)
    before = (run.dir / "config.yaml").read_text()
    with pytest.raises(UserError, match="has a checkpoint of step 2, and would have to end at step 1; raise"):
        launch.start(fakes.config("trial_name=one", "recover.mode=auto", "total_train_steps=1"))
    assert (run.dir / "config.yaml").read_text() == before


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "budget.json"])
def test_a_resume_with_a_damaged_file_changes_nothing(fakes, name):
    run = launch.start(fakes.config("trial_name=one")).wait()
    status.update_status(run.dir, state="failed", message="boom")
    (run.dir / name).write_text("seed: [" if name == "config.yaml" else "[1]")
    before = sorted(path for path in run.dir.rglob("*") if path.name != ".lock")
    with pytest.raises(UserError, match=name):
        run.resume()
    assert sorted(path for path in run.dir.rglob("*") if path.name != ".lock") == before
    assert run.status["message"] == "boom"


def test_a_fork_of_a_step_that_is_not_kept_lists_those_that_are(fakes):
    parent = interrupted(fakes)
    with pytest.raises(UserError, match=r"no checkpoint of step 40; it has those of steps 2 "):
        forks.fork(parent, 40)
    file = parent.dir / "checkpoints" / "step-2" / "data"
    file.write_text("x")
    with pytest.raises(UserError, match=r"step-2 of exp/one is damaged: .*; there are others: none"):
        forks.fork(parent, 2)
    with pytest.raises(UserError, match="exp/one has no whole checkpoint: checkpoint step-2 is damaged"):
        forks.fork(parent)
    folders.discard(parent.dir / "checkpoints" / "step-2")
    with pytest.raises(UserError, match=r"has no checkpoint \(recover.freq_steps makes them"):
        forks.fork(parent)
    assert fakes.folders() == ["exp/one"]


def test_an_interrupted_trial_starts_anew_and_says_what_it_removes(fakes, capsys):
    fakes.play(LONG)
    run = launch.start(fakes.config("trial_name=one"))
    until(lambda: len(metrics.read_metrics(run.dir)) >= 2)
    run.stop()
    assert run.state == "stopped"
    with pytest.raises(UserError, match=r"exists and is stopped"):
        launch.start(fakes.config("trial_name=one"))
    fakes.play([["train", 2, 0.02]])
    again = launch.start(fakes.config("trial_name=one", "recover.mode=auto", "actor.beta=0.3"))
    assert again.wait().status["attempt"] == 2
    out = capsys.readouterr().out
    assert "exp/one was stopped; its configuration changes: actor.beta: 0.1 -> 0.3" in out
    assert "has no checkpoint and starts anew" in out
    assert "what it had made is kept in earlier/attempt-1" in out
    assert len(metrics.read_metrics(run.dir)) == 2
    assert again.config.actor.beta == 0.3


def test_a_live_trial_is_refused_and_its_process_named(fakes):
    fakes.play(LONG)
    run = launch.start(fakes.config("trial_name=one"))
    until(lambda: run.state == "running")
    for mode in ("auto", "disabled"):
        with pytest.raises(UserError, match=f"is running, by process {run.status['supervisor']['pid']} on "):
            launch.start(fakes.config("trial_name=one", f"recover.mode={mode}"))


def test_names_that_are_paths_never_get_that_far(fakes):
    with pytest.raises(UserError, match="trial_name"):
        fakes.config("trial_name=../x")


# ---------------------------------------------------------------- attaching


def test_the_launch_cell_run_again_attaches(fakes, capsys):
    fakes.play(LONG)
    first = launch.start(fakes.config(), owner="interactive")
    until(lambda: first.state == "running")
    second = launch.start(fakes.config(), owner="interactive")
    assert second.dir == first.dir
    assert f"attached to the live run {first.dir} (step " in capsys.readouterr().out
    assert first.status["owner"]["kind"] == "interactive"
    other = launch.start(fakes.config("actor.beta=0.5"), owner="interactive")
    third = launch.start(fakes.config(), new=True, owner="interactive")
    assert len({first.dir, other.dir, third.dir}) == 3
    assert [run.dir for run in launch.live(fakes.fileroot)] == [first.dir, other.dir, third.dir]


def test_attaching_by_name_tells_what_differs(fakes, capsys):
    fakes.play(LONG)
    first = launch.start(fakes.config("trial_name=one"), owner="interactive")
    second = launch.start(fakes.config("trial_name=one", "actor.beta=0.5"), owner="interactive")
    assert second.dir == first.dir
    assert "its configuration differs: actor.beta: 0.1 -> 0.5" in capsys.readouterr().out


def test_headless_never_attaches(fakes):
    fakes.play(LONG)
    first = launch.start(fakes.config(), owner="interactive")
    second = launch.start(fakes.config(), owner="headless")
    assert second.dir != first.dir


# ---------------------------------------------------------------- owners

SCRIPT = """
import functools, os, sys
from dpo_kit import config, launch
from dpo_kit.supervise import start
from tests.fakes import TREE
start.spawn_detached = functools.partial(start.spawn_detached, module="tests.fake_supervisor")
c = config.from_tree(TREE, [f"cluster.fileroot={sys.argv[1]}/runs"], root=sys.argv[1])
run = launch.start(c, owner=sys.argv[2] or None)
run.wait()
"""


@pytest.fixture
def script(fakes):
    """A plain script that starts a run and waits, with the run it made, in mid-training."""
    started = []

    def start(owner=""):
        fakes.play(LONG)
        environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(fakes.root), owner],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        started.append(process)
        until(lambda: fakes.folders() and list(fakes.fileroot.glob("*/*/metrics.jsonl")))
        return process, runs.Run(fakes.fileroot / fakes.folders()[0])

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_ended_takes_its_run_along(script, fakes, number):
    process, run = script()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    until(lambda: not run.is_live)
    assert run.state == "preempted"
    assert (run.dir / "saved").exists()
    assert fakes.living() == []
    if number == signal.SIGINT:
        assert "interrupted: exp/" in out


def test_an_interactive_run_outlives_its_kernel(script, fakes):
    process, run = script("interactive")
    process.kill()
    process.wait()
    step = run.status["step"]
    until(lambda: run.status["step"] > step + 2)
    assert runs.open(run.dir).is_live
    assert run.stop().state == "stopped"


def test_an_interrupted_cell_leaves_an_interactive_run_alone(script):
    process, run = script("interactive")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert "goes on; run.wait() shows it again, run.stop() ends it" in out
    time.sleep(0.5)
    assert run.is_live


def test_a_detached_run_belongs_to_nobody(fakes):
    fakes.play([["sleep", 1.0]])
    run = launch.start(fakes.config(), detached=True)
    assert run.state == "running"
    run.wait()
    assert (run.status["owner"]["kind"], run.status["owner"]["pid"]) == ("detached", None)


def test_a_detached_run_that_does_not_start_is_told(fakes, monkeypatch):
    monkeypatch.setattr(trial.config_module, "to_yaml", lambda config: "actor: 1")
    with pytest.raises(RunError, match=r"its supervisor ended with status 2: .*actor"):
        launch.start(fakes.config("trial_name=one"), detached=True)


def test_a_failing_rank_raises_with_cause_logs_and_the_way_on(fakes):
    fakes.play({"0": [["sleep", 60]], "1": [["raise", "ValueError", "boom"]]})
    run = launch.start(fakes.config())
    with pytest.raises(RunError) as caught:
        run.wait(show=False)
    first, logs, way = str(caught.value).splitlines()
    assert first == f"{run.name}: failed: rank 1: ValueError: boom (logs/rank-1.log)"
    assert logs == f"logs: {run.dir}/logs"
    assert way == f"to start anew (it has no checkpoint): dpo-kit runs resume {run.dir}"
    assert (caught.value.run_dir, caught.value.state) == (run.dir, "failed")


# ---------------------------------------------------------------- the foreground


def test_the_foreground_prints_the_run_folder_last(fakes, capsys):
    assert launch.run_in_foreground(fakes.config()) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(fakes.fileroot / fakes.folders()[0])
    assert captured.err == ""


def test_the_foreground_tells_a_failure_on_stderr(fakes, capsys):
    fakes.play({"0": [["sleep", 60]], "1": [["raise", "ValueError", "boom"]]})
    assert launch.run_in_foreground(fakes.config("trial_name=one")) == 1
    captured = capsys.readouterr()
    assert "exp/one: failed: rank 1: ValueError: boom" in captured.err
    assert captured.out.splitlines()[-1] == str(fakes.fileroot / "exp" / "one")


def test_the_foreground_leaves_nothing_of_wrong_data_but_keeps_an_earlier_attempt(fakes):
    fakes.play([], prepare=[["raise", "DataError", "all pairs are identical"]])
    with pytest.raises(UserError, match=r"^all pairs are identical$"):
        launch.run_in_foreground(fakes.config("trial_name=one"))
    assert not fakes.fileroot.exists()
    fakes.play({"0": [["exit", 1]], "1": []})
    assert launch.run_in_foreground(fakes.config("trial_name=one")) == 1
    fakes.play([], prepare=[["raise", "DataError", "all pairs are identical"]])
    assert launch.run_in_foreground(fakes.config("trial_name=one", "recover.mode=auto")) == 2
    assert runs.find("one", fakes.fileroot).status["message"] == "all pairs are identical"


def test_a_done_trial_is_skipped_in_the_foreground(fakes, capsys):
    config = fakes.config("trial_name=one", "recover.mode=auto")
    assert launch.run_in_foreground(config) == 0
    assert launch.run_in_foreground(config) == 0
    assert "skipped" in capsys.readouterr().out


def test_what_checkpoints_need_of_the_disk_is_told(fakes, capsys, model_cache):
    builtin.ensure("tiny-random")
    launch.start(fakes.config()).wait()
    assert "disk:" not in capsys.readouterr().out
    launch.start(fakes.config("recover.freq_steps=1", "seed=2"), new=True).wait()
    assert re.search(
        r"disk: 3 checkpoints and 1 model need [\d.]+ MiB, and [\d.]+ GiB are free", capsys.readouterr().out
    )


DATA = {"train": {"fingerprint": "abc", "num_pairs": 24}}
ZERO = {"run": "exp/zero", "folder": "/runs/exp/zero", "step": 2}


def trained(fakes, *overrides):
    """A run that was killed after its training, while it made the samples."""
    run = launch.start(fakes.config("trial_name=one", *overrides)).wait()
    (run.dir / "model").mkdir()
    (run.dir / "model" / "weights").write_text("x")
    made = read_json(run.dir / "manifest.json")
    (run.dir / "manifest.json").write_text(json.dumps({**made, "data": DATA, "parent": ZERO}))
    status.update_status(run.dir, state="failed", trained=True)
    return run


def test_a_trained_run_keeps_what_it_was_made_from(fakes, capsys):
    run = trained(fakes)
    fakes.play({})  # ranks without a part to play would fail
    again = launch.start(
        fakes.config("trial_name=one", "recover.mode=auto", "evaluator.num_samples=1")
    ).wait()
    assert "exp/one is trained; what is left is done now" in capsys.readouterr().out
    made = read_json(again.dir / "manifest.json")
    assert (made["data"], made["parent"]) == (DATA, ZERO)
    assert (run.dir / "model" / "weights").exists()


def test_a_trained_run_is_not_taken_for_a_longer_one(fakes):
    run = trained(fakes)
    config = fakes.config("trial_name=one", "recover.mode=auto", "total_train_epochs=2")
    trial.open_trial(launch.resolve_world(config), "foreground")
    assert not status.read_status(run.dir).get("trained")
    assert (run.dir / "earlier" / "attempt-1" / "model" / "weights").exists()


def test_a_trained_run_is_not_taken_for_one_of_other_data(fakes):
    run = trained(fakes)
    shutil.copy(fakes.root / "data.jsonl", fakes.root / "other.jsonl")
    with pytest.raises(
        UserError, match=r"exp/one is trained from other data or weights .*the content of train_dataset: abc"
    ):
        launch.start(fakes.config("trial_name=one", "recover.mode=auto", "train_dataset.path=other.jsonl"))
    assert run.status["trained"]
    assert (run.dir / "model" / "weights").exists()


def test_wrong_data_never_remove_a_folder_that_holds_something(fakes):
    run = interrupted(fakes)
    (run.dir / "status.json").write_text("")
    fakes.play([], prepare=[["raise", "DataError", "all pairs are identical"]])
    assert launch.resume_in_foreground(run) == 2
    assert run.checkpoints() == [2]
    assert run.status["attempt"] == 2


def test_a_resume_on_a_machine_with_fewer_devices_is_refused_first(fakes):
    run = interrupted(fakes)
    text = (run.dir / "config.yaml").read_text()
    (run.dir / "config.yaml").write_text(text.replace("n_gpus_per_node: 0", "n_gpus_per_node: 2"))
    with pytest.raises(UserError, match=r"is more than the 0 CUDA devices .* cluster.n_gpus_per_node=auto"):
        launch.resume_in_foreground(run)
    assert run.status["state"] == "stopped"


def test_a_fork_whose_parent_removes_the_checkpoint_meanwhile_says_so(fakes, monkeypatch):
    parent = interrupted(fakes)
    copytree = shutil.copytree

    def late(source, target, **named):
        if source.parent.name == "checkpoints":
            folders.discard(source)
        return copytree(source, target, **named)

    monkeypatch.setattr(forks.shutil, "copytree", late)
    with pytest.raises(UserError, match=r"removed its checkpoint of step 2 meanwhile"):
        forks.fork(parent, 2)
    assert fakes.folders() == ["exp/one"]
