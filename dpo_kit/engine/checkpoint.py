"""What a run needs to go on as if nothing had happened: written by all ranks together, verified, loaded again.

A checkpoint is only taken for a run of the same data, weights and settings: anything else is refused with what differs.

    checkpoints/step-8/
        __0_0.distcp ... .metadata   master weights and optimizer states (torch.distributed.checkpoint)
        rank-0.safetensors ...       each rank's random number generators
        state.json                   the step, what follows from it, and the identity of data, weights, reference
        COMMIT.json                  size and sha256 of all of these (system/folders)

The step alone gives the scheduler and the sampler (`schedule`) and the length of `metrics.jsonl`. A checkpoint may be
loaded by ranks of another number or layout: each takes its part of every tensor; the generators then start anew,
which only dropout and bfloat16 optimizer states can notice. `.metadata` is a pickle: it is read from the run's own
folder only, and only after its hash was found in `COMMIT.json`.

Not here: when a checkpoint is due (`recorder`), how the folders are named (records/checkpoint_folders).
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from dpo_kit import config as config_module
from dpo_kit.engine.optimizer import first_state
from dpo_kit.engine.recorder import Recorder
from dpo_kit.engine.state import Engine
from dpo_kit.errors import UserError
from dpo_kit.model.parallel import World, masters, publish
from dpo_kit.records import checkpoint_folders, manifest, metrics, resuming
from dpo_kit.records.facts import read_facts
from dpo_kit.system import folders, machine
from dpo_kit.system.files import read_json, to_json


def save(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, world: World, facts: dict[str, Any]
) -> None:
    """Writes a checkpoint; a collective. Afterwards it is whole, or there is none and every rank raises.

    Args:
        folder: `checkpoints/step-N`.
        facts: JSON values that `load` gives back; `num_ranks` and `tp_size` are added.

    Raises:
        UserError: it cannot be written; the message names the folder and what is free there.
    """

    def begin() -> str:
        return str(stack.enter_context(folders.staged(folder, "replace"))) if world.is_main else ""

    def write() -> None:
        from safetensors.torch import save_file

        writer = FileSystemWriter(str(part), single_file_per_rank=True)
        dcp.save(_tensors(policy, optimizer), storage_writer=writer)
        save_file(_generators(world.device), part / f"rank-{world.rank}.safetensors")
        if world.is_main:
            text = to_json({**facts, "num_ranks": world.size, "tp_size": world.tp_size}, indent=1)
            (part / checkpoint_folders.STATE).write_text(text, "utf-8")

    def read() -> dict[str, dict[str, Any]]:  # for the hashes, shared: every rank its part of the files
        return folders.hashes(part, folders.file_names(part)[world.rank :: world.size])

    def seal() -> None:
        if world.is_main:
            folders.seal(part, {name: made for found in hashes for name, made in found.items()})
            stack.close()

    try:
        with contextlib.ExitStack() as stack:
            part = Path(_together(world, begin)[0])
            _together(world, write)
            hashes = _together(world, read)
            _together(world, seal)
    except _Failed as failed:
        raise UserError(_why_not_saved(folder, str(failed), policy, optimizer)) from None


def load(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Puts a verified checkpoint into a model and its new optimizer; a collective.

    Args:
        folder: `checkpoints/step-N`, which `damage` has verified.

    Returns:
        The `facts` of `save`, with `num_ranks` and `tp_size`.
    """
    facts = read_json(folder / checkpoint_folders.STATE)
    reader = FileSystemReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    dcp.load(_tensors(policy, optimizer, make=known), storage_reader=reader)
    publish(policy)
    if (facts["num_ranks"], facts.get("tp_size", 1)) == (world.size, world.tp_size):
        _set_generators(folder / f"rank-{world.rank}.safetensors", world.device)
    return facts


def damage(folder: Path, world: World) -> str:
    """What is wrong with a checkpoint, by every hash; empty when it is whole. A collective: each reads its part."""
    problems = world.gather(folders.damage(folder, world.rank, world.size))
    return next((problem for problem in problems if problem), "")


# --- tensors ----------------------------------------------------------------------------------------------------


def _tensors(
    policy: nn.Module, optimizer: torch.optim.Optimizer, make: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Master weights and optimizer states by name; they share their memory with what they are the state of.

    Args:
        make: names of a checkpoint: the states in it are made where the optimizer has none yet.
    """
    found: dict[str, Tensor] = {}
    for name, param in masters(policy).items():
        found[f"model.{name}"] = param.detach()
        if make is not None and f"optimizer.{name}.step" in make:
            dtype = make[f"optimizer.{name}.exp_avg"].properties.dtype
            optimizer.state[param] = first_state(param, dtype)
        for key, value in optimizer.state.get(param, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(file: Path, device: torch.device) -> None:
    from safetensors.torch import load_file

    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# --- ranks that fail together --------------------------------------------------------------------------------------


class _Failed(Exception):
    """A rank could not write; every rank raises it, with the words of the first that failed."""


def _together(world: World, act: Callable[[], Any]) -> list[Any]:
    """What `act` gives on each rank, by rank; raises on all of them when one of them could not."""
    problem, value = "", None
    try:
        value = act()
    except CheckpointException as error:  # raised on every rank, with what each of them said
        problem = next((str(cause) for cause, _ in error.failures.values()), str(error))
    except Exception as error:  # whatever it is (safetensors has errors of its own): the others must not wait
        problem = str(error) or type(error).__name__
    given = world.gather((problem, value))
    for rank, (problem, _) in enumerate(given):
        if problem:
            raise _Failed(f"rank {rank}: {' '.join(problem.split())[:200]}")
    return [value for _, value in given]


def _why_not_saved(folder: Path, cause: str, policy: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(policy, optimizer).values())
    free = machine.free_disk(folder.parent)
    left = checkpoint_folders.steps(folder.parent)
    before = f"step-{left[-1]} stands" if left else "there is no earlier one"
    sizes = f"{machine.size_text(needed)} is needed, {machine.size_text(free)} are free in {folder.parent}"
    prune = f"dpo-kit runs prune --fileroot {shlex.quote(str(folder.parents[3]))}"
    advice = f"Free space ({prune}) or use recover.keep=1" if free < needed else "Mend that"
    return f"checkpoint {folder} was not written ({cause}); {sizes}; {before}. {advice}, then resume the run"


class Keeper:
    """One instance a rank; every method is a collective.

    Args:
        run_dir: the run folder.
        engine: its models loaded.
        optimizer: of the policy, new.
        recorder: of the run; says what is wrong with checkpoints.
    """

    def __init__(self, run_dir: Path, engine: Engine, optimizer: torch.optim.Optimizer, recorder: Recorder):
        self.run_dir, self.recorder = run_dir, recorder
        self.folder, self.engine, self.optimizer = run_dir / "checkpoints", engine, optimizer
        self.best = math.inf  # least held-out loss, of `exports/best`
        self.saved = 0  # step of the newest checkpoint that this run wrote or came from

    def resume(self) -> tuple[int, bool]:
        """Loads the newest whole checkpoint: its step (0 without any), and whether an evaluation is owed after it.

        Raises:
            UserError: it is of other data, weights or settings, or past the last step; or no one is whole.
        """
        engine = self.engine
        if checkpoint_folders.steps(self.folder):
            self.recorder.progress("checkpoint")
        found = read_facts(self.run_dir, engine.config, lambda folder: damage(folder, engine.world))
        # To begin at the first step is right for a run that had no checkpoint, and for no other.
        found, at = replace(found, num_pairs=len(engine.train)), found.at
        content = self._identity() if at else None
        problems = engine.world.gather(resuming.refusal(found, engine.config, content))
        if any(problems):
            raise UserError(next(text for text in problems if text))
        if at is None or at.trained:
            return 0, False
        step = at.step
        if found.passed:
            self.recorder.tell(f"{'; '.join(found.passed)}; falling back to step-{step}")
        facts = load(self.folder / f"step-{step}", engine.policy, self.optimizer, engine.world)
        self.saved = step
        # A fork has no `exports/best` yet, and its losses may be of another kind.
        self.best = math.inf if facts["best"] is None or at.is_fork else facts["best"]
        if engine.world.is_main:
            ranks = facts["num_ranks"]
            other = f", written by {ranks} rank{'s' * (ranks > 1)}" if ranks != engine.world.size else ""
            print(f"resumed from checkpoint step-{step}{other}", flush=True)
        return step, facts["owes_evaluation"]

    def save(self, step: int, owes_evaluation: bool = False) -> None:
        """Writes the checkpoint of a step, and removes those that `recover.keep` leaves no room for."""
        if step == self.saved:
            return
        engine = self.engine
        self.recorder.progress("checkpoint")
        if engine.world.is_main:
            metrics.sync_metrics(self.run_dir)
        facts = {
            "step": step,
            "owes_evaluation": owes_evaluation,
            "best": None if math.isinf(self.best) else self.best,
            "identity": self._identity(),
        }
        save(self.folder / f"step-{step}", engine.policy, self.optimizer, engine.world, facts)
        self.saved = step
        keep = engine.config.recover.keep
        if keep != "all" and engine.world.is_main:
            checkpoint_folders.retain(self.folder, int(keep), step)

    def _identity(self) -> dict[str, Any]:
        engine = self.engine
        found = {
            "train": engine.train.fingerprint,
            "valid": engine.valid.fingerprint if engine.valid is not None else None,
            "config": config_module.to_tree(engine.config),
        }
        if engine.world.is_main:  # who alone has hashed the weights
            weights = manifest.read(self.run_dir).get("weights", {})
            found["weights"] = {name: made["fingerprint"] for name, made in weights.items()}
        return found
