"""The checkpoints of one run, seen from its ranks: which one to go on from, writing new ones, removing old ones.

A checkpoint is only taken for a run of the same data, weights and settings (`identity`): anything else is refused with
what differs. Not here: a checkpoint's content (`checkpoint`), the files' protocol (`commit`), restarts (`supervisor`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dpo_kit import checkpoint, commit, history, manifest, resuming, schedule
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
            # To begin at the first step is right for a run that had no checkpoint, and for no other.
            if lost := resuming.lost(self.run_dir, damaged):
                raise UserError(lost)
            return {"step": 0, "owes_evaluation": False}
        if damaged:
            self.recorder.tell(f"{'; '.join(damaged)}; falling back to step-{step}")
        folder = self.folder / f"step-{step}"
        self._check(resuming.at_step(self.run_dir, step))
        facts = checkpoint.load(folder, state.policy, self.optimizer, state.world)
        self.saved = step
        # A fork has no `exports/best` yet, and its losses may be of another kind.
        is_fork = manifest.parent(self.run_dir).get("step") == step
        self.best = math.inf if facts["best"] is None or is_fork else facts["best"]
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

    def _identity(self) -> dict[str, Any]:
        state = self.state
        found = {
            "train": state.train.fingerprint,
            "valid": state.valid.fingerprint if state.valid is not None else None,
            "config": config_module.to_tree(state.config),
        }
        if state.world.is_main:  # who alone has hashed the weights
            weights = read_json(self.run_dir / "manifest.json", {}).get("weights", {})
            found["weights"] = {name: made["fingerprint"] for name, made in weights.items()}
        return found

    def _check(self, at: resuming.Point) -> None:
        config, content = self.state.config, self._identity()
        total = schedule.num_steps(config, len(self.state.train))
        problem = resuming.refusal(self.run_dir, at, config, content, total=total)
        problems = checkpoint.gathered(self.state.world, problem)
        if any(problems):
            raise UserError(next(text for text in problems if text))
