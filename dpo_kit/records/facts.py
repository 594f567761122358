"""What the folder of a run says of whether and from where it may go on, read once. Reads only.

Under the run's lock where something follows from it. Deliberately not here: what is decided (records/resuming), torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_kit.config import Config, differences, load, to_tree
from dpo_kit.errors import UserError
from dpo_kit.records import checkpoint_folders, manifest, metrics, run_folder
from dpo_kit.records.checkpoint_folders import STATE
from dpo_kit.records.status import effective, read_status
from dpo_kit.system import folders
from dpo_kit.system.files import read_json


@dataclass(frozen=True)
class Point:
    """Where a run would go on."""

    step: int
    of: dict[str, Any]
    """What it is of, as `differences.refused` takes it: `config`, and the fingerprints that are known."""
    trained: bool = False
    """All steps are done and the model is written; there is no checkpoint."""
    is_fork: bool = False
    """What comes after is a fork's."""

    def forked(self, config: Config) -> Point:
        """The same for a fork, whose settings and held-out pairs are its own from here on, and its pairs are not."""
        tree, then = to_tree(config), self.of["config"]
        for section, key in (place.split(".") for place in differences.PLACES if "." in place):
            if tree.get(section) and then.get(section):
                tree[section][key] = then[section][key]
        known = {key: mark for key, mark in self.of.items() if key != "valid"}
        tree["tokenizer_path"] = then["tokenizer_path"]
        return replace(self, of=known | {"config": tree}, is_fork=True)

    def moved(self, config: Config) -> bool:
        """Whether a configuration names other places, so that their content must be compared."""
        changed = differences.between(self.of["config"], to_tree(config))
        return any(key in differences.PLACES for key in changed)


@dataclass(frozen=True)
class Facts:
    """What the folder of a run says."""

    folder: Path
    status: dict[str, Any]
    """As a reader should take it (`status.effective`)."""
    config: Config | None = None
    """Its own; None where a file is damaged."""
    damaged: str = ""
    """Which file is damaged, or that no checkpoint is whole and what may be done, in words."""
    lost: str = ""
    """That it is a fork and its checkpoint is gone, and what may be done."""
    at: Point | None = None
    """The newest checkpoint that looks whole, else the trained model that the run made last."""
    passed: tuple[str, ...] = ()
    """A line on each newer checkpoint that is damaged."""
    whole: tuple[int, ...] = ()
    """Steps of the checkpoints that look whole, newest first."""
    trained: bool = False
    """All steps are done and the model is written."""
    num_pairs: int | None = None
    longest_pair: int = 0

    @property
    def name(self) -> str:
        """`experiment/trial`."""
        return run_folder.run_name(self.folder)


def read_facts(
    run_dir: Path, config: Config | None = None, damage: Callable[[Path], str] | None = None
) -> Facts:
    """Reads a run's folder, once for all that is asked of it; what is damaged is told and not raised.

    Args:
        run_dir: the run folder.
        config: its configuration, where it is at hand.
        damage: what is wrong with a checkpoint; by default sizes are compared, and the hash of what is read here. The
            ranks compare every hash.
    """
    now, folder = effective(read_status(run_dir)), run_dir / "checkpoints"
    try:
        step, passed = checkpoint_folders.newest(folder, damage or _quick_damage)
        config = config or load(run_dir / "config.yaml")
        made, settled = manifest.read(run_dir), read_json(run_dir / "budget.json", {})
        if step is None and passed:
            return Facts(run_dir, now, config, damaged=_lost(run_dir, passed))
        trained = bool(now.get("trained")) and (run_dir / "model").is_dir()
        at = None
        if step is not None:
            at = at_step(run_dir, step, config)
        elif trained:
            at = Point(now.get("step") or 0, {**_content(made), "config": to_tree(config)}, trained=True)
        there = [other for other in reversed(checkpoint_folders.steps(folder)) if other <= (step or 0)]
        return Facts(
            run_dir,
            now,
            config,
            lost="" if at else _lost(run_dir, []),
            at=at,
            passed=tuple(passed),
            whole=tuple(n for n in there if n == step or not _quick_damage(folder / f"step-{n}")),
            trained=trained,
            num_pairs=made.get("data", {}).get("train", {}).get("num_pairs"),
            longest_pair=settled.get("longest_pair", 0),
        )
    except (UserError, OSError) as error:  # a live run removes checkpoints while they are looked at
        return Facts(run_dir, now, damaged=str(error))


def _content(made: dict[str, Any]) -> dict[str, Any]:
    """The fingerprints of a manifest."""
    found: dict[str, Any] = {split: stored["fingerprint"] for split, stored in made.get("data", {}).items()}
    if "weights" in made:
        found["weights"] = {name: stored["fingerprint"] for name, stored in made["weights"].items()}
    return found


def _quick_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, as far as that is seen without reading all of it."""
    files, problem = folders.committed(folder)
    if problem or STATE not in files:
        return problem or f"it has no {STATE}"
    is_same = folders.hashes(folder, [STATE])[STATE] == files[STATE]
    return "" if is_same else f"{STATE} has other bytes than were written"


def at_step(run_dir: Path, step: int, config: Config) -> Point:
    """What the checkpoint of a step, which is whole, says that it is of; `config` is the run's own."""
    facts = read_json(run_dir / "checkpoints" / f"step-{step}" / STATE)
    if not facts:
        raise UserError(f"{run_dir} removed its checkpoint of step {step} meanwhile (recover.keep)")
    at = Point(step, facts["identity"])
    parent = manifest.parent(run_dir)
    return at.forked(config) if parent.get("step") == step else at


def _lost(run_dir: Path, damaged: list[str]) -> str:
    """That a run had checkpoints and none is left to go on from, and what may be done; empty for a run that had none.

    Args:
        damaged: a line on each checkpoint that is there and not whole.
    """
    parent, folder = manifest.parent(run_dir), run_dir / "checkpoints"
    if damaged:
        told = f"no checkpoint in {folder} is whole: {'; '.join(damaged)}; nothing was changed. Put them back, or"
        return f"{told} {_fork_again(parent) if parent else 'remove that folder to start anew'}"
    if not parent:
        return ""
    return (
        f"{run_folder.run_name(run_dir)} is a fork of {manifest.fork_text(parent)}, and has no checkpoint any more;"
        f" {_fork_again(parent)}"
    )


def _fork_again(parent: dict[str, Any]) -> str:
    folder = Path(parent["folder"])
    if _quick_damage(folder / "checkpoints" / f"step-{parent['step']}"):
        return f"its parent {folder} has none of that step either: start another run"
    return f"fork again: {manifest.fork_again_command(parent)}"


def is_spare(run_dir: Path) -> bool:
    """Whether a folder holds nothing that would be a loss: nothing made, or what a fork's parent has as well."""
    parent = manifest.parent(run_dir)
    names = [*run_folder.MADE]
    if parent and (Path(parent["folder"]) / "checkpoints" / f"step-{parent['step']}").is_dir():
        last = max((record["step"] for record in metrics.readable_metrics(run_dir)), default=0)
        own = set(checkpoint_folders.steps(run_dir / "checkpoints")) - {parent["step"]}
        if own or last > parent["step"]:
            return False
        names = [name for name in names if name not in ("metrics.jsonl", "checkpoints")]
    return not any((run_dir / name).is_file() or any((run_dir / name).glob("*")) for name in names)
