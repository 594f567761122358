"""The checkpoints of one run, seen from its ranks: which one to go on from, writing new ones, removing old ones.

A checkpoint is only taken for a run of the same data, weights and settings (`identity`): anything else is refused with
what differs. Not here: a checkpoint's content (`checkpoint`), the files' protocol (`commit`), restarts (`supervisor`).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from dpo_kit import checkpoint, commit, history, identity, manifest, schedule
from dpo_kit import config as config_module
from dpo_kit.engine import Engine
from dpo_kit.errors import UserError
from dpo_kit.files import read_json
from dpo_kit.recorder import Recorder


class Keeper:
    """One instance a rank; every method is a collective.

    Args:
        run_dir: the run folder.
        state: the engine, its models loaded.
        optimizer: of the policy, new.
        recorder: of the run; says what is wrong with checkpoints.
    """

    def __init__(self, run_dir: Path, state: Engine, optimizer: torch.optim.Optimizer, recorder: Recorder):
        self.run_dir, self.recorder = run_dir, recorder
        self.folder, self.state, self.optimizer = run_dir / "checkpoints", state, optimizer
        self.manifest = run_dir / "manifest.json"
        self.best = math.inf  # least held-out loss, of `exports/best`
        self.saved = 0  # step of the newest checkpoint that this run wrote or came from

    def resume(self) -> dict[str, Any]:
        """Loads the newest whole checkpoint; `step` (0 without any) and `owes_evaluation`.

        Raises:
            UserError: it is of other data, weights or settings, or past the last step; or no one is whole.
        """
        state = self.state
        if commit.steps(self.folder):
            self.recorder.progress("checkpoint")
        step, damaged = checkpoint.newest(self.folder, state.world)
        if step is None:
            self._check_nothing_is_lost(damaged)
            return {"step": 0, "owes_evaluation": False}
        if damaged:
            self.recorder.tell(f"{'; '.join(damaged)}; falling back to step-{step}")
        folder = self.folder / f"step-{step}"
        self._check(step, read_json(folder / checkpoint.STATE))
        facts = checkpoint.load(folder, state.policy, self.optimizer, state.world)
        self.saved = step
        # A fork has no `exports/best` yet, and its losses may be of another kind.
        is_fork = self._parent().get("step") == step
        self.best = math.inf if facts["best"] is None or is_fork else facts["best"]
        if state.world.is_main:
            ranks = facts["num_ranks"]
            other = f", written by {ranks} rank{'s' * (ranks > 1)}" if ranks != state.world.size else ""
            print(f"resumed from checkpoint step-{step}{other}", flush=True)
        return facts

    def _check_nothing_is_lost(self, damaged: list[str]) -> None:
        """To begin at the first step is right for a run that has no checkpoint, and for no other."""
        parent = self._parent()
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}; nothing was changed. Put them back, or"
                " remove that folder to start anew"
            )
        if parent:
            raise UserError(
                f"this run is a fork of {manifest.fork_text(parent)}, and {self.folder} is empty; fork again"
            )

    def save(self, step: int, owes_evaluation: bool = False) -> None:
        """Writes the checkpoint of a step, and removes those that `recover.keep` leaves no room for."""
        if step == self.saved:
            return
        state = self.state
        self.recorder.progress("checkpoint")
        if state.world.is_main:
            history.sync_metrics(self.run_dir)
        facts = {
            "step": step,
            "owes_evaluation": owes_evaluation,
            "best": None if math.isinf(self.best) else self.best,
            "identity": self._identity(),
        }
        checkpoint.save(self.folder / f"step-{step}", state.policy, self.optimizer, state.world, facts)
        self.saved = step
        keep = state.config.recover.keep
        if keep != "all" and state.world.is_main:
            commit.retain(self.folder, int(keep), step)

    def _parent(self) -> dict[str, Any]:
        """What a fork is of; empty for a run that is none."""
        return read_json(self.manifest, {}).get("parent") or {}

    def _identity(self) -> dict[str, Any]:
        state = self.state
        weights = read_json(self.manifest, {}).get("weights", {}) if state.world.is_main else {}
        return {
            "train": state.train.fingerprint,
            "valid": state.valid.fingerprint if state.valid is not None else None,
            "weights": {name: made["fingerprint"] for name, made in weights.items()},
            "config": config_module.to_tree(state.config),
        }

    def _check(self, step: int, facts: dict[str, Any]) -> None:
        then, now = facts["identity"], self._identity()
        different = identity.changed(_with_defaults(then.pop("config")), now.pop("config"))
        if self._parent().get("step") == step:  # a fork: its settings are its own from here on
            different, then["valid"] = {}, now["valid"]
        if self.state.world.is_main:
            marks = identity.differences(_short(then), _short(now))
            different |= {f"the content of {key}": text for key, text in marks.items()}
        problem = ""
        if different:
            problem = (
                f"checkpoint step-{step} is of another run: {identity.told(different)}; put that back, use another"
                " trial_name, or fork it (dpo-kit runs fork)"
            )
        total = schedule.num_steps(self.state.config, len(self.state.train))
        if step > total:
            problem = (
                f"checkpoint step-{step} is past the last step, {total}; raise total_train_steps, or fork"
            )
        problems = checkpoint.gathered(self.state.world, problem)
        if any(problems):
            raise UserError(next(text for text in problems if text))


def _short(marks: Any) -> Any:
    """Fingerprints as people compare them."""
    if isinstance(marks, dict):
        return {key: _short(mark) for key, mark in marks.items()}
    return marks[:12] if isinstance(marks, str) else marks


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as this version understands it: keys that came later have their defaults."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return config_module.to_tree(config_module.from_tree(tree))
    except UserError:
        return tree
