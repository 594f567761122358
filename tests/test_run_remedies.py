"""Every command that a message about a run recommends is accepted: read from the message, run as it stands."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from dpo_kit import launch, runs
from dpo_kit.errors import UserError
from dpo_kit.launch import forks
from dpo_kit.records import manifest, metrics, status
from dpo_kit.system import folders, machine
from dpo_kit.system.files import read_json
from dpo_kit.tools import listing
from tests.supervise.test_supervisor import until
from tests.test_cli import call

_WORD = r"(?:'[^']*'|[^\s;`(),'])+"
RUNS = {
    "stopped": [["train", 3, 0.02], ["checkpoint", 2], ["train", 600, 0.1]],
    "stopped without a checkpoint": [["train", 600, 0.1]],
    "failed": [["train", 3, 0.02], ["checkpoint", 2], ["raise", "ValueError", "boom"]],
    "failed without a checkpoint": [["raise", "ValueError", "boom"]],
    "failed by a mistake": [["raise", "DataError", "no such thing"]],
    "done": [["train", 3, 0.02]],
    "done with checkpoints": [["train", 3, 0.02], ["checkpoint", 2], ["checkpoint", 3]],
    "trained": [["train", 3, 0.02]],
    "damaged": [["train", 3, 0.02], ["checkpoint", 2], ["raise", "ValueError", "boom"]],
    "an orphan": [["train", 3, 0.02], ["checkpoint", 2], ["raise", "ValueError", "boom"]],
    "a fork without a checkpoint": [["train", 3, 0.02], ["checkpoint", 2], ["raise", "ValueError", "boom"]],
}


def commands(text):
    """The commands in a message."""
    return [shlex.split(found) for found in re.findall(rf"dpo-kit(?: {_WORD})+", text)]


def accept(fakes, words):
    """Runs a command that a message recommends, on ranks that end at once, and sees it accepted."""
    words = [
        word.replace("KEY=VALUE", "actor.beta=0.4").replace("dpo-kit", "")
        for word in words
        if word != "dpo-kit"
    ]
    fakes.play([["train", 3, 0.02], ["checkpoint", 3]])
    status, out, err = call(*words)
    assert (status, err) == (0, []), (words, out, err)
    return out


@pytest.fixture
def make(fakes, monkeypatch):
    """Makes a run of each kind under a fileroot that is not the default one and needs quoting."""
    fakes.fileroot = fakes.root / "my runs"
    monkeypatch.setattr(machine, "visible_devices", lambda: 0)

    def run_of(kind):
        fakes.play(RUNS[kind])
        keep = ["recover.keep=all"] if kind == "done with checkpoints" else []
        run = launch.start(fakes.config("trial_name=one", "total_train_steps=3", *keep))
        if kind.startswith("stopped"):
            until(lambda: len(metrics.read_metrics(run.dir)) >= 4)
            run.stop()
        else:
            until(lambda: not run.is_live)
        if kind == "trained":
            (run.dir / "model").mkdir()
            (run.dir / "model" / "weights").write_text("x")
            status.update_status(run.dir, state="failed", trained=True)
        if kind == "damaged":
            (run.dir / "checkpoints" / "step-2" / "data").write_text("")
        if kind in ("an orphan", "a fork without a checkpoint"):
            child = forks.fork(run, overrides=["trial_name=child"])
            status.update_status(child.dir, state="failed")
            if kind == "an orphan":
                shutil.rmtree(run.dir)
            else:
                folders.discard(child.dir / "checkpoints" / "step-2")
            run = child
        return run

    return run_of


WAYS = {
    "stopped": "to continue: dpo-kit runs resume '",
    "stopped without a checkpoint": "to start anew (it has no checkpoint): dpo-kit runs resume '",
    "failed": "to continue: dpo-kit runs resume '",
    "failed without a checkpoint": "to start anew (it has no checkpoint): dpo-kit runs resume '",
    "failed by a mistake": "to start anew (it has no checkpoint) when that is mended: dpo-kit runs resume '",
    "trained": "to continue: dpo-kit runs resume '",
    "damaged": "it cannot go on as it is: no checkpoint in ",
    "an orphan": "to continue: dpo-kit runs resume '",
    "a fork without a checkpoint": "has no checkpoint any more; fork again: dpo-kit runs fork '",
}


@pytest.mark.parametrize("kind", WAYS)
def test_what_a_run_says_at_its_end_works(fakes, make, kind):
    run = make(kind)
    told = run.epitaph()
    assert WAYS[kind] in told
    assert all(f"  next     {line}" in listing.show_text(run) for line in told.splitlines()[2:])
    found = commands(told)
    assert len(found) == {"damaged": 0, "failed by a mistake": 2}.get(kind, 1)
    for words in found:
        accept(fakes, words)
        status.update_status(run.dir, state="failed", trained=False)
    if kind == "damaged":  # what it says in words
        shutil.rmtree(run.dir / "checkpoints")
        accept(fakes, ["runs", "resume", str(run.dir)])


@pytest.mark.parametrize("kind", RUNS)
def test_what_the_same_trial_again_recommends_works(fakes, make, kind):
    run = make(kind)
    with pytest.raises(UserError) as caught:
        launch.start(fakes.config(f"trial_name={run.dir.name}", "total_train_steps=3"))
    told = str(caught.value)
    found = commands(told)
    assert bool(found) == (kind not in ("damaged", "a fork without a checkpoint"))
    for words in found:
        accept(fakes, words)
    if "recover.mode=auto" in told:
        launch.start(
            fakes.config(f"trial_name={run.dir.name}", "total_train_steps=3", "recover.mode=auto")
        ).wait()


@pytest.mark.parametrize("kind", RUNS)
def test_what_another_configuration_recommends_works(fakes, make, kind):
    run = make(kind)
    others = [f"trial_name={run.dir.name}", "total_train_steps=3", "actor.beta=0.2"]
    fakes.play([["train", 3, 0.02]])
    try:
        again = launch.start(fakes.config(*others, "recover.mode=auto"))
    except UserError as error:
        told = str(error)
    else:
        again.wait(show=False)
        assert kind.endswith("without a checkpoint") or kind == "failed by a mistake"
        return
    has_fork = kind in (
        "stopped",
        "failed",
        "done with checkpoints",
        "an orphan",
        "a fork without a checkpoint",
    )
    assert [words[:3] for words in commands(told)] == [["dpo-kit", "runs", "fork"]] * has_fork
    assert ("use another trial_name" in told) == (kind not in ("damaged", "a fork without a checkpoint"))
    for words in commands(told):
        out = accept(fakes, words)
        child = runs.open(out[-1])
        assert child.config.actor.beta == (0.1 if "without" in kind else 0.2)
    # Without recover.mode=auto it is not offered either.
    with pytest.raises(UserError) as caught:
        launch.start(fakes.config(*others))
    assert "recover.mode=auto" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "damaged"])
def test_what_a_resume_with_other_settings_recommends_works(fakes, make, kind):
    run, found = make(kind), []
    for override in ("actor.beta=0.5", "total_train_steps=5", "seed=7"):
        status, _, err = call("runs", "resume", run.dir, override)
        assert status == 2
        found += commands(err[0])
    assert len(found) == 3
    here = [words for words in found if "recover.mode=auto" in words]  # the others leave the run as it is
    for words in [words for words in found if words not in here] + here[:1]:
        accept(fakes, words)


def test_a_shorter_run_is_sent_to_an_earlier_checkpoint(fakes, make):
    run = make("done with checkpoints")
    status.update_status(run.dir, state="stopped", trained=False)
    longer = ("trial_name=one", "recover.mode=auto", "recover.keep=all")
    with pytest.raises(UserError, match="would have to end at step 1; raise") as caught:
        launch.start(fakes.config(*longer, "total_train_steps=1"))
    assert commands(str(caught.value)) == []  # there is none before step 1
    shutil.rmtree(run.dir / "checkpoints" / "step-2")
    staged = run.dir / "checkpoints" / "step-3"
    shutil.copytree(staged, run.dir / "checkpoints" / "step-1")
    with pytest.raises(UserError, match="would have to end at step 2; raise") as caught:
        launch.start(fakes.config(*longer, "total_train_steps=2"))
    (words,) = commands(str(caught.value))
    assert words[-3:] == ["--step", "1", "total_train_steps=2"]
    accept(fakes, words)


def test_a_live_run_names_the_command_that_stops_it(fakes, make):
    fakes.play([["train", 600, 0.1]])
    run = launch.start(fakes.config("trial_name=one"))
    until(lambda: run.state == "running")
    for act in (
        lambda: launch.start(fakes.config("trial_name=one")),
        lambda: runs.remove(run, yes=True),
        lambda: launch.resume_in_foreground(run),
    ):
        with pytest.raises(UserError) as caught:
            act()
        (words,) = commands(str(caught.value))
        if words[2] == "show":
            assert call(*words[1:])[0] == 0
    stop = re.search(r"stop +(dpo-kit .*)", listing.show_text(run))
    assert call(*shlex.split(stop[1])[1:])[0] == 0
    assert run.state == "stopped"


def test_a_resume_on_fewer_devices_names_a_command_that_works(fakes, make):
    """Also where the folder was moved and renamed since."""
    run = make("stopped")
    text = (run.dir / "config.yaml").read_text()
    (run.dir / "config.yaml").write_text(text.replace("n_gpus_per_node: 0", "n_gpus_per_node: 2"))
    fakes.fileroot.rename(fakes.root / "else where")
    moved = fakes.root / "else where" / "exp" / "re named"
    (fakes.root / "else where" / "exp" / "one").rename(moved)
    for resume in (lambda: launch.resume_in_foreground(runs.open(moved)), lambda: runs.open(moved).resume()):
        with pytest.raises(UserError, match=r"is more than the 0 CUDA devices") as caught:
            resume()
    (words,) = commands(str(caught.value))
    out = accept(fakes, words)
    assert out[-1] == str(moved)
    assert runs.open(moved).status["attempt"] == 2
    assert "repeats" not in read_json(moved / "manifest.json")
    assert not fakes.fileroot.exists()


def test_a_fork_whose_parent_lost_its_checkpoint_is_not_told_to_fork_again(fakes, make):
    child = make("a fork without a checkpoint")
    parent = runs.open(child.dir.with_name("one"))
    folders.discard(parent.dir / "checkpoints" / "step-2")
    told = child.epitaph()
    assert "its parent " in told
    assert commands(told) == []
    for start in (child.resume, lambda: launch.start(fakes.config("trial_name=child", "recover.mode=auto"))):
        with pytest.raises(UserError, match="has none of that step either"):
            start()


def test_runs_that_were_moved_together_still_know_their_parent(fakes, make):
    child = make("a fork without a checkpoint")
    fakes.fileroot.rename(fakes.root / "else where")
    moved = runs.open(fakes.root / "else where" / "exp" / "child")
    (words,) = commands(moved.epitaph())
    accept(fakes, words)
    assert child.name == "exp/child"


def test_attaching_recommends_another_name_where_new_would_be_refused(fakes, capsys):
    fakes.play([["train", 600, 0.1]])
    launch.start(fakes.config("trial_name=one"), owner="interactive")
    launch.start(fakes.config("trial_name=one"), owner="interactive")
    assert "another trial_name starts another" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is (queued|running)"):
        launch.start(fakes.config("trial_name=one"), new=True, owner="interactive")


def test_a_mistyped_run_names_the_list_of_that_root(fakes, make):
    make("done")
    status, _, err = call("runs", "show", "nothing-like-it", "--fileroot", fakes.fileroot)
    assert status == 2
    (words,) = commands(err[0].removeprefix("dpo-kit: "))
    assert any("exp/one" in line for line in call(*words[1:])[1])


def test_the_recorded_commands_work(fakes, make):
    run = make("stopped")
    made = read_json(run.dir / "manifest.json")
    for command in (made["command"], made["continue"], manifest.repeat_command(run.dir)):
        (words,) = commands(command)
        accept(fakes, words)
