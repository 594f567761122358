"""Why a run failed, in one line, and whether its ranks start again: halved, from the last checkpoint, or not at all.

When one rank dies, the others fail for want of it; the cause is the rank that failed first.

Deliberately not here: ending the others (supervise/children), tracebacks (they are in the logs).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_kit.errors import ExitStatus
from dpo_kit.records import budget, checkpoint_folders, manifest, run_folder, status
from dpo_kit.supervise.children import ENDED_WELL, Session
from dpo_kit.system import files

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
    error = files.read_json(run_dir / "logs" / f"{name}.error.json")
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
    own = {rank: code for rank, code in enumerate(codes) if code not in (None, *ENDED_WELL)}
    # Who was ended takes its peers along: what they say is no cause.
    if not own or (stopping and (None in codes or -signal.SIGTERM in codes)):
        return None
    errors = {error["rank"]: error for error in reversed(status.read_rank_errors(run_dir))}
    # A rank that the system killed left no word, and the others only say that they lost it.
    silent = [rank for rank, code in own.items() if code is not None and code < 0]
    told = sorted((error["at"], rank) for rank, error in errors.items() if rank in own)
    rank = silent[0] if silent else told[0][1] if told else next(iter(own))
    error = errors.get(rank)
    cause = _cause(error, own[rank], run_dir / "logs" / f"rank-{rank}.log")
    rows = _rows_told(error.get("rows") or []) if error else ""
    mistake = bool(error and error["user_mistake"])
    memory = None
    if own[rank] == ExitStatus.OUT_OF_MEMORY:
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
    said = files.last_line(log)
    return f"ended with status {code}" + (f": {said}" if said else " without a word")


def halve(session: Session, failed: Failure, where: dict[str, Any]) -> Failure | None:
    """Halves the budget and makes ready to start the ranks again; the failure when there is nothing to halve."""
    settled = budget.read(session.run_dir)
    if where["section"] is None or not settled:
        return failed  # micro-batches are not to blame
    if session.halvings == budget.MOST_HALVINGS:
        return replace(failed, message=f"{failed.message}; given up after {session.halvings} halvings")
    entry = budget.halve(
        session.run_dir,
        section=where["section"],
        rank=failed.rank or 0,
        step=where["step"],
        error=failed.cause,
        online=session.config.ref.logps == "online",
    )
    if entry is None:
        return replace(failed, message=_too_long(session, failed, settled["longest_pair"]))
    session.halvings += 1
    manifest.write_commands(session.run_dir)
    told = f"rank {failed.rank} ran out of memory with {entry['from']:,} tokens a micro-batch"
    _rewind(session, told, f"with {entry['to']:,} ({session.halvings} of {budget.MOST_HALVINGS})")
    return None


def retry(session: Session, failed: Failure) -> Failure | None:
    """Makes ready to start the ranks again; the failure when it is not to be mended that way."""
    recover = session.config.recover
    if recover.mode != "auto" or failed.mistake:
        return failed
    step = files.read_json(session.run_dir / "progress.json", {}).get("step") or 0
    if step > session.failed_at:
        session.failed_at, session.failures = step, 0
    session.failures += 1
    if session.failures > recover.retries:
        times = f"{session.failures} failure{'s' if session.failures > 1 else ''}"
        return replace(failed, message=f"{failed.message}; given up after {times} in a row at step {step}")
    _rewind(session, failed.message, f"(failure {session.failures}, {recover.retries} in a row are allowed)")
    return None


def _rewind(session: Session, told: str, how: str) -> None:
    """Brings the folder back to where the next attempt begins: the last checkpoint, or before the first step."""
    found = checkpoint_folders.steps(session.run_dir / "checkpoints")
    run_folder.clear_errors(session.run_dir)
    if not found:
        run_folder.clear_training(session.run_dir)
    step = found[-1] if found else 0
    status.write_progress(session.run_dir, phase="start ranks", step=step, note="")
    told = f"{told}; going on from {f'checkpoint step-{step}' if found else 'the start'} {how}"
    attempt = status.read_status(session.run_dir).get("attempt", 1) + 1
    status.update_status(session.run_dir, attempt=attempt, step=step, ranks=[], message=told)
    if session.lines is None:
        print(told, flush=True)


def _too_long(session: Session, failed: Failure, longest: int) -> str:
    config = session.config
    ways = [f"lower train_dataset.max_length = {config.train_dataset.max_length}"]
    if config.actor.gradient_checkpointing is not True:
        ways.insert(0, "use actor.gradient_checkpointing=true")
    if config.actor.dtype != "bfloat16":
        ways.append("use actor.dtype=bfloat16")
    # Which change what a step does: not from a checkpoint on.
    where = " in another trial" if checkpoint_folders.steps(session.run_dir / "checkpoints") else ""
    return (
        f"rank {failed.rank} ran out of memory, and the longest pair alone ({longest:,} tokens) does not fit;"
        f" {', or '.join(ways)}{where} (logs/rank-{failed.rank}.log)"
    )


def halved_text(session: Session) -> str:
    """What a finished run says of its halvings."""
    if not session.halvings:
        return ""
    first, last = (budget.read(session.run_dir)["halvings"][i] for i in (-session.halvings, -1))
    return f"with {last['to']:,} tokens a micro-batch, after running out of memory with {first['from']:,}"
