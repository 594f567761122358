"""The checkpoints of one run, seen from its ranks: which one to go on from, writing new ones, removing old ones.

A checkpoint is only taken for a run of the same data, weights and settings (`identity`): anything else is refused with
what differs. Not here: a checkpoint's content (`checkpoint`), the files' protocol (`commit`), restarts (`supervisor`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dpo_kit import checkpoint, commit, identity, schedule
from dpo_kit import config as config_module
from dpo_kit.engine import Engine
from dpo_kit.errors import UserError
from dpo_kit.files import read_json


class Keeper:
    """One instance a rank; every method but `finish` is a collective.

    Args:
        run_dir: the run folder.
        state: the engine, its models loaded.
        optimizer: of the policy, new.
    """

    def __init__(self, run_dir: Path, state: Engine, optimizer: torch.optim.Optimizer):
        self.folder, self.state, self.optimizer = run_dir / "checkpoints", state, optimizer
        self.manifest = run_dir / "manifest.json"
        self.best = math.inf  # least held-out loss, of `exports/best`
        self.saved = 0  # step of the newest checkpoint that this run wrote or came from

    def resume(self) -> dict[str, Any]:
        """Loads the newest whole checkpoint; `step` (0 without one) and `owes_evaluation`.

        Raises:
            UserError: it is of other data, weights or settings, or past the last step.
        """
        state = self.state
        step = checkpoint.newest(self.folder, state.world)
        if step is None:
            return {"step": 0, "owes_evaluation": False}
        folder = self.folder / f"step-{step}"
        self._check(step, read_json(folder / checkpoint.STATE))
        facts = checkpoint.load(folder, state.policy, self.optimizer, state.world)
        self.best, self.saved = facts["best"] if facts["best"] is not None else math.inf, step
        if state.world.is_main:
            ranks = facts["num_ranks"]
            other = f", written by {ranks} rank{'s' * (ranks > 1)}" if ranks != state.world.size else ""
            print(f"resumed from checkpoint step-{step}{other}", flush=True)
        return facts

    def save(self, step: int, owes_evaluation: bool = False) -> None:
        """Writes the checkpoint of a step, and removes those that `recover.keep` leaves no room for."""
        if step == self.saved:
            return
        state = self.state
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
            commit.retain(self.folder, int(keep))

    def finish(self) -> None:
        """The run is done and its model written: checkpoints are removed unless all are to stay."""
        if self.state.world.is_main and self.state.config.recover.keep != "all":
            for step in commit.steps(self.folder):
                commit.discard(self.folder / f"step-{step}")

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
        different = identity.changed(then.pop("config"), now.pop("config"))
        parent = read_json(self.manifest, {}).get("parent") or {}
        if parent.get("step") == step:  # a fork: its settings are its own from here on
            different = {}
        if self.state.world.is_main:
            marks = identity.differences(then, now)
            different |= {f"{key} (fingerprint)": text for key, text in marks.items()}
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
