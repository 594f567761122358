"""Grids, names and the order of work, with runs that a fake launcher makes."""

from __future__ import annotations

import threading
import time

import pytest

from dpo_kit import config, sweep
from dpo_kit.errors import ConfigError, RunError, UserError
from dpo_kit.records import metrics, run_folder
from dpo_kit.records.status import read_status, stop_requested, update_status

TREE = {"actor": {"path": "tiny-random"}, "ref": {"logps": "cached"}, "train_dataset": {"path": "sample"}}


@pytest.fixture
def base(tmp_path):
    return config.from_tree({**TREE, "cluster": {"fileroot": str(tmp_path / "runs")}})


class FakeRun:
    """Ends in the state that its beta names: 0.666 fails; waits for a stop when `hold` is set."""

    hold = False

    def __init__(self, settings):
        self.config, self.name = settings, settings.trial_name
        root = config.resolve_path(settings.cluster.fileroot, config.project_root())
        self.dir = run_folder.create(root, "dpo", self.name, config_text="", manifest={})
        update_status(self.dir, state="running")
        beta = settings.actor.beta
        metrics.append_metrics(self.dir, {"step": 1, "dpo/loss": 0.7 - beta, "dpo/chosen_reward": beta})
        for step, accuracy in ((0, None), (1, 0.9), (2, 0.8)):
            line = {"step": step, "dpo-eval/loss": 0.6, "dpo-eval/reward_accuracy": accuracy}
            metrics.append_metrics(self.dir, line)
        if not FakeRun.hold:
            update_status(self.dir, state="failed" if beta == 0.666 else "done")

    @property
    def status(self):
        if stop_requested(self.dir):
            update_status(self.dir, state="stopped")
        return read_status(self.dir)

    @property
    def state(self):
        return self.status["state"]

    def wait(self, timeout=None, show=True):
        if self.state != "done":
            raise RunError(f"the run {self.name} ended {self.state}", state=self.state)


@pytest.fixture
def started(monkeypatch):
    runs = []

    def start(settings):
        runs.append(FakeRun(settings))
        return runs[-1]

    monkeypatch.setattr(sweep.launch, "start", start)
    monkeypatch.setattr(FakeRun, "hold", False)
    monkeypatch.setattr(sweep, "_POLL_S", 0.01)
    monkeypatch.setattr(sweep.status, "is_live", lambda status: status["state"] == "running")
    return runs


def test_axes_come_as_lists_or_as_text():
    expected = {"actor.beta": [0.05, 0.1], "actor.loss_type": ["sigmoid", "ipo"], "seed": [1, 2]}
    assert (
        sweep.axes(betas=[0.05, 0.1, 0.05], loss_types=["sigmoid", "ipo"], lrs=None, seeds=(1, 2)) == expected
    )
    assert sweep.axes(betas="[0.05, 0.1]", loss_types="[sigmoid, ipo]", lrs="", seeds="[1,2]") == expected
    assert sweep.axes(betas="0.05,0.1", loss_types="sigmoid, ipo", seeds="1,2") == expected
    assert sweep.axes(betas=0.1) == {"actor.beta": [0.1]}
    with pytest.raises(ConfigError, match="betas"):
        sweep.axes(betas=["much"])


def test_overrides_with_commas_are_axes():
    plain, axes = sweep.split_overrides(
        [
            "actor.beta=0.05,0.1,0.5",
            "actor.loss_type=sigmoid, ipo",
            "seed=3",
            "trial_name=a,b",
            "saver={best: true,freq_steps: 2}",
        ]
    )
    assert plain == ["seed=3", "trial_name=a,b", "saver={best: true,freq_steps: 2}"]
    assert axes == {"actor.beta": ["0.05", "0.1", "0.5"], "actor.loss_type": ["sigmoid", "ipo"]}
    with pytest.raises(UserError, match="empty value"):
        sweep.split_overrides(["actor.beta=0.1,"])


def test_a_grid_is_every_combination_with_readable_names(base):
    trials = sweep.expand(base, sweep.axes(betas=[0.05, 0.1], loss_types=["sigmoid", "ipo"], lrs=[5e-6]))
    assert [t.label for t in trials] == [
        "beta 0.05, sigmoid",
        "beta 0.05, ipo",
        "beta 0.1, sigmoid",
        "beta 0.1, ipo",
    ]
    assert [(t.config.actor.beta, t.config.actor.loss_type) for t in trials][1] == (0.05, "ipo")
    assert all(t.config.actor.optimizer.lr == 5e-6 for t in trials)
    family = trials[0].name.removesuffix("-beta0.05-sigmoid")
    assert [t.name for t in trials] == [f"{family}-{tail}" for tail in
        ("beta0.05-sigmoid", "beta0.05-ipo", "beta0.1-sigmoid", "beta0.1-ipo")]  # fmt: skip
    assert len({t.name for t in trials}) == 4


def test_a_given_trial_name_leads_and_learning_rates_are_told_apart(tmp_path):
    base = config.from_tree({**TREE, "trial_name": "mine"})
    trials = sweep.expand(base, sweep.axes(lrs=[5e-6, 5.0000001e-6], seeds=[1, 2]))
    assert trials[0].name == "mine-lr5e-06-seed1"
    assert len({t.name for t in trials}) == 4
    assert [t.name for t in sweep.expand(base, {})] == ["mine"]


def test_an_axis_moves_what_refers_to_it():
    def make(overrides):
        return config.from_tree(TREE, overrides)

    trials = sweep.expand(make, {"actor.path": ["tiny-random", "some/model"]})
    assert [t.config.ref.path for t in trials] == ["tiny-random", "some/model"]
    assert trials[1].name.endswith("-pathsome_model")


def test_wrong_combinations_are_told_at_once_and_start_nothing(base):
    with pytest.raises(ConfigError) as caught:
        sweep.expand(base, sweep.axes(betas=[0.1, -1], loss_types=["sigmoid", "IPO"]))
    assert any("actor.beta" in p for p in caught.value.problems)
    assert any("actor.loss_type" in p for p in caught.value.problems)
    assert len(caught.value.problems) == len(set(caught.value.problems))


def test_a_loss_that_is_known_by_another_name_is_told_ours(base):
    with pytest.raises(
        ConfigError, match=r"actor.loss_type = 'dpo' is not one of .*; did you mean sigmoid\?"
    ):
        sweep.expand(base, sweep.axes(loss_types="[dpo]"))


def test_run_makes_all_runs_in_order(base, started, capsys):
    trials = sweep.expand(base, sweep.axes(betas=[0.05, 0.1]))
    sweep.Sweep(trials).run()
    assert [r.name for r in started] == [t.name for t in trials]
    assert [t.state for t in trials] == ["done", "done"]
    assert "run 2 of 2: beta 0.1" in capsys.readouterr().out


def test_one_failing_run_does_not_take_the_others_along(base, started):
    trials = sweep.expand(base, sweep.axes(betas=[0.666, 0.1]))
    with pytest.raises(RunError, match=r"1 of 2 runs did not end done: beta 0.666: .*failed"):
        sweep.Sweep(trials).run()
    assert [t.state for t in trials] == ["failed", "done"]


def test_an_interrupt_stops_the_run_and_waits_for_its_end(base, started, monkeypatch):
    monkeypatch.setattr(FakeRun, "hold", True)

    def interrupted(self, timeout=None, show=True):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRun, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.Sweep(sweep.expand(base, sweep.axes(betas=[0.05, 0.1]))).run()
    (run,) = started
    assert read_status(run.dir)["state"] == "stopped"


def test_an_asked_stop_is_no_failure(base, started, monkeypatch):
    monkeypatch.setattr(FakeRun, "hold", True)
    running = sweep.Sweep(sweep.expand(base, sweep.axes(betas=[0.05, 0.1])))

    def wait(self, timeout=None, show=True):
        running.stop()
        raise RunError("stopped", state=self.state)

    monkeypatch.setattr(FakeRun, "wait", wait)
    with pytest.raises(RunError, match=r"beta 0\.1: not started") as caught:
        running.run()
    assert caught.value.state == "stopped"


def test_a_run_that_cannot_start_is_told(base, monkeypatch, capsys):
    monkeypatch.setattr(sweep.launch, "start", lambda settings: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivisionError"):
        sweep.Sweep(sweep.expand(base, {})).run()


def test_stop_ends_the_run_under_way_and_starts_no_other(base, started, monkeypatch):
    monkeypatch.setattr(FakeRun, "hold", True)
    trials = sweep.expand(base, sweep.axes(betas=[0.05, 0.1, 0.5]))
    running = sweep.Sweep(trials).start()
    deadline = time.monotonic() + 10
    while not started and time.monotonic() < deadline:
        time.sleep(0.01)
    running.stop()
    assert running.wait(10)
    assert [t.state for t in trials] == ["stopped", "not started", "not started"]
    assert len(started) == 1
    assert [t.error for t in trials] == ["", "", ""]
    assert not any(t.name == "sweep" for t in threading.enumerate())


def test_results_and_table(base, started):
    trials = sweep.expand(base, sweep.axes(betas=[0.05, 0.1]))
    sweep.Sweep(trials[:1]).run(show=False)
    first, second = sweep.results(trials)
    assert first["run"] == "beta 0.05"
    assert first["loss"] == pytest.approx(0.65)
    assert (first["held_out_reward_accuracy"], first["best_accuracy"], first["best_step"]) == (0.8, 0.9, 1)
    assert (second["state"], second["loss"], second["held_out_loss"]) == ("waiting", None, None)
    text = sweep.table(trials).text
    assert "80.0%" in text
    assert "90.0% (step 1)" in text
    folders = sweep.phases(trials).text.split("\n")
    assert str(trials[0].run.dir)[:40] in folders[1]
    assert folders[2].split() == ["beta", "0.1", "waiting", "0", "s", "-"]
    assert sweep.Sweep(trials).curves()[0][0] == "beta 0.05"
