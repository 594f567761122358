"""A grid of runs over betas, losses, learning rates, seeds or any other key, one run after the other.

    axes      actor.beta: [0.05, 0.1]   actor.loss_type: [sigmoid, ipo]
    trials    beta0.05-sigmoid   beta0.05-ipo   beta0.1-sigmoid   beta0.1-ipo

All runs write under one `cluster.fileroot`, so that the pair store is built once and the reference's
log-probs are computed once: neither depends on beta, loss_type, lr or seed.

Deliberately not here: widgets (`widgets`), charts (`plots`), search over the results, runs side by side.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_kit import config as configs
from dpo_kit import launch
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, RunError, UserError
from dpo_kit.records import metrics, run_folder, status
from dpo_kit.runs import Run
from dpo_kit.view import analysis, html, tables

SHORT_AXES = {
    "betas": ("actor.beta", float),
    "loss_types": ("actor.loss_type", str),
    "lrs": ("actor.optimizer.lr", float),
    "seeds": ("seed", int),
}
# A comma in these belongs to the name.
_NEVER_SPLIT = ("trial_name", "experiment_name", "cluster.fileroot")
_WAITING, _SKIPPED = "waiting", "not started"
_POLL_S = 0.5

Axes = Mapping[str, Sequence[Any]]


@dataclass
class Trial:
    """One run of a grid: what tells it from the others, its configuration, and the run once it is started."""

    label: str
    config: Config
    run: Run | None = None
    error: str = ""
    state: str = _WAITING

    @property
    def name(self) -> str:
        return str(self.config.trial_name)

    @property
    def records(self) -> list[dict[str, Any]]:
        return metrics.read_metrics(self.run.dir) if self.run else []


def axes(**lists: Any) -> dict[str, list[Any]]:
    """The axes that `betas`, `loss_types`, `lrs` and `seeds` mean; an empty or missing list is no axis.

    Lists may arrive as text ("[0.05,0.1]"), as papermill hands them over.

    Raises:
        ConfigError: a value of another type.
    """
    assert set(lists) <= set(SHORT_AXES), lists
    found = {}
    for name, (key, kind) in SHORT_AXES.items():
        values = configs.read_list(name, lists.get(name), kind)
        if values:
            found[key] = list(dict.fromkeys(values))
    return found


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates `actor.beta=0.05,0.1` (an axis) from plain overrides.

    A value in brackets, braces or quotes is one value; so are names and the fileroot. The later of two axes
    of one key wins.
    """
    plain, found = [], {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or "," not in value or key in _NEVER_SPLIT or value.lstrip()[:1] in "[{'\"":
            plain.append(text)
            continue
        values = [v.strip() for v in value.split(",")]
        if not all(values):
            raise UserError(f"{text!r} names an empty value; write {key}=a,b without a comma at the end")
        found[key] = list(dict.fromkeys(values))
    return plain, found


def expand(base: Config | Callable[[list[str]], Config], axes: Axes) -> list[Trial]:
    """Every combination of the axes as a trial with a readable name.

    Args:
        base: the configuration that the trials share, or a function from overrides to a configuration
            (with it, `${...}` in a params file follows what an axis sets).
        axes: dotted key -> values. No axis gives one trial.

    Raises:
        ConfigError: what is wrong with any of the combinations, each problem once.
    """
    tree = configs.to_tree(base) if isinstance(base, Config) else {}
    make = base if callable(base) else lambda overrides: configs.from_tree(tree, overrides)
    trials: list[Trial] = []
    problems: list[str] = []
    family = ""
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        try:
            config = make([f"{key}={_text(value)}" for key, value in chosen.items()])
        except ConfigError as error:
            problems += error.problems
            continue
        family = family or config.trial_name or run_folder.fresh_trial_name()
        varied = {key: value for key, value in chosen.items() if len(axes[key]) > 1}
        name = "-".join([family, *(_in_name(key, value) for key, value in varied.items())])
        label = ", ".join(_in_label(key, value) for key, value in (varied or chosen).items()) or name
        if wrong := configs.name_problem(name):
            problems.append(f"trial_name = {name!r} {wrong}")
        trials.append(Trial(label, replace(config, trial_name=name)))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return trials


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _in_name(key: str, value: Any) -> str:
    """`beta0.1`, `ipo`, `lr5e-06`; anything a folder name should not hold becomes `_`."""
    leaf = key.rpartition(".")[2]
    text = f"{'' if leaf == 'loss_type' else leaf}{_text(value)}"
    return re.sub(r"[^\w.+-]", "_", text)


def _in_label(key: str, value: Any) -> str:
    leaf = key.rpartition(".")[2]
    return _text(value) if leaf == "loss_type" else f"{leaf} {_text(value)}"


class Sweep:
    """The runs of a grid while they happen: `start` or `run` once, `stop` any time."""

    def __init__(self, trials: Sequence[Trial]):
        self.trials = list(trials)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def start(self) -> Sweep:
        """Works through the trials in a thread of this process and returns at once."""
        assert self._thread is None, "a sweep starts once"
        self._thread = threading.Thread(target=self._work, kwargs={"show": False}, name="sweep", daemon=True)
        self._thread.start()
        return self

    def run(self, show: bool = True) -> Sweep:
        """Works through the trials and returns when they are done.

        Raises:
            RunError: when a run did not end `done`; the other runs were made all the same.
        """
        try:
            self._work(show=show)
        except BaseException:
            self.stop()
            self._until_ended()
            raise
        bad = [t for t in self.trials if t.state != "done"]
        if bad:
            told = "; ".join(f"{t.label}: {t.error or t.state}" for t in bad)
            asked = all(t.state in ("stopped", "preempted", _SKIPPED) for t in bad)
            raise RunError(
                f"{len(bad)} of {len(self.trials)} runs did not end done: {told}",
                state="stopped" if asked else "failed",
            )
        return self

    def stop(self) -> None:
        """Ends the run that is under way, with its state saved, and starts no other."""
        self._stop.set()
        for trial in self.trials:
            if trial.run is not None and status.is_live(trial.run.status):
                status.request_stop(trial.run.dir, "stopped")

    def _until_ended(self) -> None:
        """Waits until the run that was asked to stop has saved, at most its grace period."""
        for trial in self.trials:
            deadline = time.monotonic() + trial.config.cluster.grace_s
            while trial.run and status.is_live(trial.run.status) and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for a started sweep; False when `timeout` seconds were not enough."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_running

    def curves(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(label, metric records) of every trial, for `plots`."""
        return [(trial.label, trial.records) for trial in self.trials]

    def _work(self, show: bool) -> None:
        for number, trial in enumerate(self.trials, start=1):
            if self._stop.is_set():
                trial.state = _SKIPPED
                continue
            if show:
                print(f"run {number} of {len(self.trials)}: {trial.label}", flush=True)
            try:
                self._one(trial, show)
            except Exception as error:  # whatever one run dies of, the others are made and it is told
                trial.state = trial.run.state if trial.run else "failed"
                trial.error = "" if trial.state == "stopped" else status.one_line(error)
                if show and trial.error:
                    print(f"  did not end done: {trial.error}", flush=True)

    def _one(self, trial: Trial, show: bool) -> None:
        trial.state = "running"
        trial.run = launch.start(trial.config)
        if show:
            trial.run.wait(show=True)
        else:
            while trial.run.state in ("queued", "running"):
                if self._stop.is_set():
                    status.request_stop(trial.run.dir, "stopped")
                time.sleep(_POLL_S)
            trial.run.wait(show=False)
        trial.state = trial.run.state


def results(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each run ended with: the last training step, the last evaluation, and the best one."""
    return [_result(trial) for trial in trials]


def _result(trial: Trial) -> dict[str, Any]:
    lines = trial.records
    train, held_out = analysis.training_lines(lines), analysis.evaluation_lines(lines)
    last = held_out[-1] if held_out else {}
    scored = [e for e in held_out if e.get("dpo-eval/reward_accuracy") is not None]
    best = max(scored, key=lambda e: e["dpo-eval/reward_accuracy"], default={})
    return {
        "run": trial.label,
        "state": trial.state,
        "step": train[-1]["step"] if train else 0,
        "loss": train[-1]["dpo/loss"] if train else None,
        **{
            f"held_out_{key}": last.get(f"dpo-eval/{key}")
            for key in ("loss", "chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy")
        },
        "best_accuracy": best.get("dpo-eval/reward_accuracy"),
        "best_step": best.get("step"),
    }


def table(trials: Sequence[Trial]) -> html.Html:
    """`results` as a table: one line a run."""
    header = ["run", "state", "step", "loss"]
    header += ["held-out loss", "chosen", "rejected", "margin", "accuracy", "best at"]
    rows = [
        [
            r["run"],
            r["state"],
            r["step"],
            _number(r["loss"]),
            _number(r["held_out_loss"]),
            _signed(r["held_out_chosen_reward"]),
            _signed(r["held_out_rejected_reward"]),
            _signed(r["held_out_reward_margin"]),
            _number(r["held_out_reward_accuracy"], ".1%"),
            "-" if r["best_step"] is None else f"{r['best_accuracy']:.1%} (step {r['best_step']})",
        ]
        for r in results(trials)
    ]
    caption = "chosen, rejected, margin and accuracy are of the held-out pairs"
    known = tables.findings_list([trial.run for trial in trials if trial.run])
    return html.stack(known, html.table(header, rows, caption=caption))


def phases(trials: Sequence[Trial]) -> html.Html:
    """Which run took how long, and its folder."""
    rows = []
    for trial in trials:
        seconds = [p["seconds"] for p in trial.run.status.get("phases", [])] if trial.run else []
        folder = str(trial.run.dir) if trial.run else "-"
        rows.append([trial.label, trial.state, f"{sum(seconds):.0f} s", folder])
    return html.table(["run", "state", "time", "folder"], rows)


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _signed(value: float | None) -> str:
    return "-" if value is None else html.signed(value)
