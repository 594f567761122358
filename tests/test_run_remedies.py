"""Every command that a message about a run recommends is accepted: read from the message, run as it stands."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil

import pytest

from dpo_kit import launch, runs
from dpo_kit.errors import RunError, UserError
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
STARTS_ANEW = ("stopped without a checkpoint", "failed without a checkpoint", "failed by a mistake")


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
            with contextlib.suppress(RunError):
                run.wait(timeout=60, show=False)
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


class Recommended:
    """A run, and the commands that messages about it hold; each is tried once, on the run as it was."""

    def __init__(self, fakes, run, kept):
        self.fakes, self.run, self.kept = fakes, run, kept
        shutil.copytree(fakes.fileroot, kept, symlinks=True)
        self.checks = {}

    def restore(self):
        shutil.rmtree(self.fakes.fileroot)
        shutil.copytree(self.kept, self.fakes.fileroot, symlinks=True)

    def add(self, text, check=lambda out: None):
        """The commands in a message, to be tried; `check` sees what each prints."""
        found = commands(text)
        for words in found:
            self.checks.setdefault(tuple(words), []).append(check)
        return found

    def add_refusal(self, *overrides):
        """Starting the trial again is refused; the message, and its commands."""
        with pytest.raises(UserError) as caught:
            self.start(*overrides)
        return str(caught.value), self.add(str(caught.value))

    def start(self, *overrides):
        return launch.start(
            self.fakes.config(f"trial_name={self.run.dir.name}", "total_train_steps=3", *overrides)
        )

    def accept_all(self):
        for words, checks in self.checks.items():
            self.restore()
            out = accept(self.fakes, words)
            for check in checks:
                check(out)
        self.restore()


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_recommended_works(fakes, make, kind):
    """What a run says at its end, what starting it again says, and what resuming it with other settings says."""
    run = make(kind)
    recommended = Recommended(fakes, run, fakes.root / "kept")
    if kind in WAYS:
        at_its_end(run, kind, recommended)
    told, found = recommended.add_refusal()
    assert bool(found) == (kind not in ("damaged", "a fork without a checkpoint"))
    goes_on = "recover.mode=auto" in told
    is_refused = another_configuration(run, kind, recommended)
    if kind != "damaged":
        resume_with_other_settings(run, recommended)
    recommended.accept_all()
    fakes.play([["train", 3, 0.02]])
    if goes_on:
        recommended.start("recover.mode=auto").wait(show=False)
        recommended.restore()
    if not is_refused:
        recommended.start("actor.beta=0.2", "recover.mode=auto").wait(show=False)
    if kind == "damaged":  # what it says in words
        shutil.rmtree(run.dir / "checkpoints")
        accept(fakes, ["runs", "resume", str(run.dir)])


def at_its_end(run, kind, recommended):
    told = run.epitaph()
    assert WAYS[kind] in told
    assert all(f"  next     {line}" in listing.show_text(run) for line in told.splitlines()[2:])
    assert len(recommended.add(told)) == {"damaged": 0, "failed by a mistake": 2}.get(kind, 1)


def another_configuration(run, kind, recommended):
    """Whether the trial is refused with another beta: one that has no checkpoint starts anew in its place."""
    if kind in STARTS_ANEW:
        return False
    with pytest.raises(UserError) as caught:
        recommended.start("actor.beta=0.2", "recover.mode=auto")
    told = str(caught.value)
    has_fork = kind in (
        "stopped",
        "failed",
        "done with checkpoints",
        "an orphan",
        "a fork without a checkpoint",
    )
    beta = 0.1 if "without" in kind else 0.2

    def forked(out):
        assert runs.open(out[-1]).config.actor.beta == beta

    found = recommended.add(told, forked)
    assert [words[:3] for words in found] == [["dpo-kit", "runs", "fork"]] * has_fork
    assert ("use another trial_name" in told) == (kind not in ("damaged", "a fork without a checkpoint"))
    # Without recover.mode=auto it is not offered either.
    told, _ = recommended.add_refusal("actor.beta=0.2")
    assert "recover.mode=auto" not in told
    return True


def resume_with_other_settings(run, recommended):
    found = []
    for override in ("actor.beta=0.5", "total_train_steps=5", "seed=7"):
        status, _, err = call("runs", "resume", run.dir, override)
        assert status == 2
        found += [(words, err[0]) for words in commands(err[0])]
    assert len(found) == 3
    here = [(words, text) for words, text in found if "recover.mode=auto" in words]
    for _, text in [pair for pair in found if pair not in here] + here[:1]:
        recommended.add(text)


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
