"""Why a run failed, in one line: which process is to blame, and what it said last.

When one rank dies, the others fail for want of it; the cause is the rank that failed first.

Deliberately not here: ending the others (supervisor), tracebacks (they are in the logs).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit import halving, records

_TAIL_BYTES = 8192
_MOST_ROWS = 8


@dataclass(frozen=True)
class Failure:
    """A message of one line and whether a user's mistake is to blame.

    Of a rank that ran out of memory, also who it was, what it said, and where (`section`, `step`).
    """

    message: str
    mistake: bool = False
    rank: int | None = None
    cause: str = ""
    out_of_memory: dict[str, Any] | None = None


def child_failure(run_dir: Path, name: str, code: int | None) -> Failure:
    """The failure of `prepare` or `samples`; its exit status is None when the supervisor killed it."""
    error = records.read_json(run_dir / "logs" / f"{name}.error.json")
    if error and error["user_mistake"]:
        return Failure(error["message"], True)
    return Failure(f"{name}: {_cause(error, code, run_dir / 'logs' / f'{name}.log')} (logs/{name}.log)")


def rank_failure(run_dir: Path, codes: list[int | None], *, stopping: bool) -> Failure | None:
    """The failure that ended the ranks, or None when they are done or stopped as asked.

    Args:
        run_dir: the run folder.
        codes: exit status of every rank; None for one that the supervisor killed.
        stopping: the ranks had been asked to stop.
    """
    own = {rank: code for rank, code in enumerate(codes) if code not in (None, 0, 3)}
    if stopping and (None in codes or -signal.SIGTERM in codes):
        return None  # who was ended takes its peers along: what they say is no cause
    if not own:
        return None
    errors = {error["rank"]: error for error in reversed(records.read_rank_errors(run_dir))}
    # A rank that the system killed left no word, and the others only say that they lost it.
    silent = [rank for rank, code in own.items() if code is not None and code < 0]
    told = sorted((error["at"], rank) for rank, error in errors.items() if rank in own)
    rank = silent[0] if silent else told[0][1] if told else next(iter(own))
    error = errors.get(rank)
    cause = _cause(error, own[rank], run_dir / "logs" / f"rank-{rank}.log")
    rows = _rows_told(error.get("rows") or []) if error else ""
    mistake = bool(error and error["user_mistake"])
    memory = None
    if own[rank] == halving.OUT_OF_MEMORY:
        memory = (error or {}).get("out_of_memory") or {"section": "actor", "step": None}
    return Failure(f"rank {rank}: {cause}{rows} (logs/rank-{rank}.log)", mistake, rank, cause, memory)


def _rows_told(rows: list[int]) -> str:
    if not rows:
        return ""
    more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
    return f", data row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_MOST_ROWS]))}{more}"


def _cause(error: dict[str, Any] | None, code: int | None, log: Path) -> str:
    if error:
        return error["error"]
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"ended from outside by {name}{memory}"
    said = last_line(log)
    return f"ended with status {code}" + (f": {said}" if said else " without a word")


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, cut to 300 characters."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
