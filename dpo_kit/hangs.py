"""Ranks that hang: which one it is, told from what each of them is doing, and where its stack is.

Ranks wait for each other, so one that hangs stops all. Every rank answers SIGUSR1 with the stacks of its threads in its
log (`faulthandler`, which needs neither the interpreter's lock nor a free thread). Those that stand in
`torch.distributed` wait; the one that does not, or that gives no answer because it is stopped, is the one to name.

Not here: when a run is overdue (`attend`), what follows (`supervisor`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Phases in which the ranks go from micro-batch to micro-batch; others may take long in one piece.
PHASES = ("reference pass", "evaluation", "first step", "training")
_ANSWER_S = 3.0
_WAITING = ("torch/distributed/", "torch\\distributed\\")
_HEADS = ("Thread 0x", "Current thread 0x")


def answer_requests() -> None:
    """Lets this process write its threads' stacks to stderr when it gets SIGUSR1."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=False)


def told(ranks: Sequence[subprocess.Popen], logs: Path, waited_s: float, phase: str) -> tuple[int, str]:
    """The rank that hangs and one line about it.

    Args:
        ranks: the processes, by rank; those that have ended are left out.
        logs: the folder with their logs.
        waited_s: how long nothing has moved.
        phase: what the run was doing.
    """
    stacks = _stacks(ranks, logs)
    silent = [rank for rank, stack in stacks.items() if not stack]
    busy = [rank for rank, stack in stacks.items() if stack and not _is_waiting(stack)]
    rank = (silent or busy or list(stacks) or [0])[0]
    if silent:
        how = "does not answer (stopped, or stuck in the system)"
    elif busy:
        how = f"hangs {_top(stacks[rank])}"
    else:
        how = "and all others wait for each other"
    return (
        rank,
        f"rank {rank}: {how}; nothing moved for {waited_s:.0f} s in phase {phase!r} (cluster.step_timeout_s;"
        f" stacks in logs/rank-{rank}.log)",
    )


def _stacks(ranks: Sequence[subprocess.Popen], logs: Path) -> dict[int, list[str]]:
    """What each living rank writes into its log when asked; empty for one that does not answer."""
    asked = {}
    for rank, process in enumerate(ranks):
        if process.poll() is None:
            log = logs / f"rank-{rank}.log"
            asked[rank] = (log, log.stat().st_size if log.exists() else 0)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
    found: dict[int, list[str]] = {key: [] for key in asked}
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline and not all(found.values()):
        time.sleep(0.1)
        for rank, (log, start) in asked.items():
            if log.exists():
                new = log.read_bytes()[start:].decode("utf-8", "replace").split("\n")
                found[rank] = new if any(line.startswith(_HEADS) for line in new) else []
    time.sleep(0.1)  # the rest of an answer that has begun
    return found


def _is_waiting(stack: list[str]) -> bool:
    return any(place in line for line in stack for place in _WAITING)


def _top(stack: list[str]) -> str:
    """Where the main thread stands; it is the last one that faulthandler writes."""
    heads = [i for i, line in enumerate(stack) if line.startswith(_HEADS)]
    frames = [line.strip() for line in stack[heads[-1] + 1 :] if line.strip().startswith("File ")]
    if not frames:
        return ""
    file, _, rest = frames[0].removeprefix("File ").partition(", line ")
    number, _, name = rest.partition(" in ")
    return f"in {name} ({Path(file.strip(chr(34))).name}:{number})"
