"""How long each phase of a run is expected to take.

From the last run like it under the same `cluster.fileroot` (`.cache/phase_seconds.json`), else a stated guess; what
counts its work is told by that (view/progress).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError
from dpo_kit.system.files import atomic_write, read_json, to_json

# Seconds on two CPU cores with the built-in 135M model, where no earlier run tells better.
GUESSES_S = {
    "find nodes": 15.0,
    "convert model": 60.0,
    "build pairs": 15.0,
    "start ranks": 20.0,
    "load model": 10.0,
    "reference pass": 60.0,
    "evaluation": 40.0,
    "first step": 10.0,
    "training": 120.0,
    "checkpoint": 10.0,
    "export": 10.0,
    "samples": 45.0,
}
_MEMORY = "phase_seconds.json"


def expected_seconds(fileroot: Path, kind: str) -> dict[str, float]:
    """Seconds of each phase in the last run of this kind; empty when there was none."""
    known = _memory(fileroot).get(kind)
    if not isinstance(known, dict):
        return {}
    return {name: float(seconds) for name, seconds in known.items() if isinstance(seconds, (int, float))}


def remember_seconds(fileroot: Path, kind: str, phases: list[dict[str, Any]]) -> None:
    """Keeps the seconds of a run's phases for the next one; losing them is harmless."""
    path = Path(fileroot) / ".cache" / _MEMORY
    seconds = {phase["name"]: phase["seconds"] / max(1, _turns(phase)) for phase in phases}
    known = {**expected_seconds(fileroot, kind), **seconds}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, to_json({**_memory(fileroot), kind: known}, indent=1), durable=False)


def _memory(fileroot: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, UserError):
        found = read_json(Path(fileroot) / ".cache" / _MEMORY)
        return found if isinstance(found, dict) else {}
    return {}


def _turns(phase: dict[str, Any]) -> int:
    """Evaluations are expected one by one, every other phase as a whole."""
    return phase.get("times", 1) if phase["name"] == "evaluation" else 1
