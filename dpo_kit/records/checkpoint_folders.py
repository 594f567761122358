"""The checkpoints of a run as folders: which steps there are, the newest whole one, how many stay. No torch.

Not here: how a folder becomes whole (system/folders), what is in a checkpoint (engine/checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dpo_kit.system import folders

STATE = "state.json"  # of a checkpoint: the step, and the identity of what it is of (engine/checkpoint)
_STEP = re.compile(r"step-(\d+)")


def steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order; not verified."""
    if not checkpoints.is_dir():
        return []
    found = [_STEP.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def newest(checkpoints: Path, damage: Callable[[Path], str] = folders.damage) -> tuple[int | None, list[str]]:
    """The latest step whose checkpoint is whole, and a line on each damaged one that was passed over."""
    told: list[str] = []
    for step in reversed(steps(checkpoints)):
        problem = damage(checkpoints / f"step-{step}")
        if not problem:
            return step, told
        told.append(f"checkpoint step-{step} is damaged: {problem}")
    return None, told


# --- removing ---------------------------------------------------------------------------------------------------


def retain(checkpoints: Path, keep: int, written: int) -> list[int]:
    """Removes all but the newest `keep` checkpoints that look whole; the steps removed. Idempotent.

    A damaged one is no reason to remove a whole one: it does not count, and goes when as many whole ones are newer.

    Args:
        checkpoints: the folder.
        keep: how many stay, at least one.
        written: the step just sealed, which always stays. Those of later steps were passed over when the run went on
            from before them, because they are damaged in ways that sizes do not show.
    """
    removed, whole = [], 0
    for step in reversed(steps(checkpoints)):
        folder = checkpoints / f"step-{step}"
        if whole >= max(1, keep) or step > written:
            folders.discard(folder)
            removed.append(step)
        elif not folders.committed(folder)[1]:
            whole += 1
    return removed
