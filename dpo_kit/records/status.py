"""Where a run is: `status.json` (the supervisor's word), `progress.json` (the working process's), `stop.json`, errors.

Every file is replaced as a whole, so a reader never sees half of one.

Deliberately not here: making and clearing the folder (records/run_folder), the state in words (view/progress).
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError
from dpo_kit.records import durations
from dpo_kit.redaction import redact
from dpo_kit.system.files import atomic_write, read_json, to_json
from dpo_kit.system.processes import is_alive

ENDED = ("stopped", "preempted", "failed", "done")
STATES = ("queued", "running", *ENDED)
PHASES = tuple(durations.GUESSES_S)
# A supervisor answers within a second or two; a queued run without one after this long never will.
_QUEUED_S = 60.0
# How old another machine's heartbeat may be while its run counts as live.
_REMOTE_HEARTBEAT_S = 60.0
_MISSING = object()


# ---------------------------------------------------------------- status


def reset_status(run_dir: Path, **fields: Any) -> dict[str, Any]:
    """Writes the status of a run that waits for its supervisor; `fields` are what it knows already."""
    now, before = time.time(), read_status(run_dir)
    attempt = before.get("attempt")
    status: dict[str, Any] = {
        "state": "queued",
        "step": 0,
        "total_steps": None,
        "phase": None,
        "phase_done": 0,
        "phase_total": None,
        "phase_started_at": None,
        "phase_expected_s": None,
        "created_at": now,
        "attempt": attempt + 1 if isinstance(attempt, int) else 1,
        "started_at": None,
        "updated_at": now,
        "ended_at": None,
        "owner": None,
        "supervisor": None,
        "ranks": [],
        "message": "",
        "mistake": False,  # a user's mistake ended it: the same again would end the same
        "phases": [],
        **fields,
    }
    atomic_write(run_dir / "status.json", to_json(status, indent=1))
    return status


def read_status(run_dir: Path) -> dict[str, Any]:
    """What the supervisor wrote last, as it stands (see `settle` for a run whose supervisor is gone).

    A file that is damaged is the status of a failed run: what else is in the folder can still be used.
    """
    path = Path(run_dir) / "status.json"
    try:
        status = read_json(path, _MISSING)
    except UserError as error:
        return {"state": "failed", "message": str(error)}
    if status is _MISSING:
        return {}
    if not (isinstance(status, dict) and status.get("state") in STATES and _is_well_typed(status)):
        message = f"{path} holds no state of a run; it was changed outside the kit"
        return {"state": "failed", "message": message}
    return status


def _is_well_typed(status: dict[str, Any]) -> bool:
    numbers = ("created_at", "updated_at", "started_at", "ended_at", "step", "total_steps", "attempt")
    return (
        all(
            value is None or (isinstance(value, (int, float)) and abs(value) < 1e12)
            for value in (status.get(key) for key in numbers)
        )
        and all(isinstance(status.get(key) or {}, dict) for key in ("supervisor", "owner"))
        and all(isinstance(status.get(key) or [], list) for key in ("phases", "ranks"))
        and all(
            isinstance(phase, dict) and {"name", "seconds"} <= phase.keys()
            for phase in status.get("phases") or []
        )
    )


def update_status(run_dir: Path, **fields: Any) -> dict[str, Any]:
    """Changes fields of `status.json`; only the supervisor does, or the launcher before it starts one."""
    status = {**read_status(run_dir), **fields, "updated_at": time.time()}
    durable = fields.get("state") in ENDED
    atomic_write(Path(run_dir) / "status.json", to_json(status, indent=1), durable=durable)
    return status


def is_live(status: dict[str, Any]) -> bool:
    """True while a supervisor works on the run (or is just being started)."""
    if status.get("state") not in ("queued", "running"):
        return False
    if supervisor := status.get("supervisor"):
        return is_at_work(supervisor, status)
    return _age_s(status) < _QUEUED_S


def is_at_work(process: dict[str, Any], status: dict[str, Any]) -> bool:
    """Whether a process of the run lives; one of another machine is believed while its heartbeat is fresh."""
    if process.get("host") not in (None, socket.gethostname()):
        return _age_s(status) < _REMOTE_HEARTBEAT_S
    return is_alive(process)


def _age_s(status: dict[str, Any]) -> float:
    return time.time() - float(status.get("updated_at") or 0.0)


def effective(status: dict[str, Any]) -> dict[str, Any]:
    """The status as a reader should take it: a run whose supervisor is gone has failed."""
    if status.get("state") in ENDED or not status or is_live(status):
        return status
    supervisor = status.get("supervisor") or {}
    if supervisor:
        cause = f"its supervisor (pid {supervisor.get('pid')}) ended without a word, killed from outside"
    else:
        cause = "its supervisor never started; see logs/supervisor.log"
    before = f"; before that: {status['message']}" if status.get("message") else ""
    return {**status, "state": "failed", "message": cause + before}


def write_progress(
    run_dir: Path,
    *,
    phase: str,
    done: int = 0,
    total: int | None = None,
    expected_s: float | None = None,
    step: int | None = None,
    total_steps: int | None = None,
    note: str | None = None,
) -> None:
    """Says where the work is; the process that does the work calls it (rank 0, prepare, samples).

    A new phase starts a new clock; the time of the one before is added to `phases`. In the phase
    `training`, `done` and `total` are the steps, and stand for `step` and `total_steps` when those are
    left out.

    Args:
        run_dir: the run folder.
        phase: one of `PHASES`.
        done: how much of the phase is done, in units of `total`.
        total: the whole of it; None where it is not known.
        expected_s: expected seconds of the whole phase; None leaves that to earlier runs.
        step: optimizer steps done.
        total_steps: optimizer steps of the run.
        note: what whoever watches the run should know, in one line.
    """
    assert phase in PHASES, phase
    path = Path(run_dir) / "progress.json"
    now = time.time()
    old = read_json(path, {})
    phases = old.get("phases", [])
    started_at, started_done = old.get("started_at", now), old.get("started_done", 0)
    if old.get("phase") == phase:
        expected_s = old.get("expected_s") if expected_s is None else expected_s
    else:
        phases = add_seconds(phases, old.get("phase"), now - started_at)
        started_at, started_done = now, done
    if phase == "training":
        step = done if step is None else step
        total_steps = total if total_steps is None else total_steps
    progress = {
        "phase": phase,
        "done": done,
        "total": total,
        "expected_s": expected_s,
        "step": old.get("step") if step is None else step,
        "total_steps": old.get("total_steps") if total_steps is None else total_steps,
        "started_at": started_at,
        "started_done": started_done,
        "updated_at": now,
        "phases": phases,
        "note": old.get("note") if note is None else note,
    }
    atomic_write(path, to_json(progress), durable=False)


def add_seconds(phases: list[dict], name: str | None, seconds: float) -> list[dict]:
    """Adds to the phase's total: `evaluation` and `training` take turns, each is listed once."""
    if name is None:
        return phases
    old = next((phase for phase in phases if phase["name"] == name), {"seconds": 0.0, "times": 0})
    new = {"name": name, "seconds": round(old["seconds"] + seconds, 3), "times": old["times"] + 1}
    return [new if phase is old else phase for phase in phases] + ([] if old in phases else [new])


# ---------------------------------------------------------------- asking a run to stop


def request_stop(run_dir: Path, state: str) -> None:
    """Asks the run to save and end as `stopped` or `preempted`; the first request stands."""
    assert state in ("stopped", "preempted"), state
    if stop_requested(run_dir) is None:
        atomic_write(Path(run_dir) / "stop.json", to_json({"state": state, "at": time.time()}))


def stop_requested(run_dir: Path) -> str | None:
    """The state in which the run was asked to end, or None."""
    return read_json(Path(run_dir) / "stop.json", {}).get("state")


def clear_stop(run_dir: Path) -> None:
    """Forgets a request to stop."""
    (Path(run_dir) / "stop.json").unlink(missing_ok=True)


# ---------------------------------------------------------------- errors of ranks


def one_line(error: BaseException) -> str:
    """`Type: first line of the message`; a `UserError` is told without its type."""
    text = " ".join(str(error).strip().splitlines()[:1]) or "no message"
    return text if isinstance(error, UserError) else redact(f"{type(error).__name__}: {text}")


def write_rank_error(
    run_dir: Path, rank: int | str, exc: BaseException, out_of_memory: dict[str, Any] | None = None
) -> None:
    """Leaves the cause of a failure where the supervisor finds it; the traceback goes to the log.

    Args:
        run_dir: the run folder.
        rank: the rank, or the name of another process of the run (`prepare`, `samples`).
        exc: what was raised.
        out_of_memory: `section` and `step` (`token_budget.OutOfMemory.facts`), when that was the cause.
    """
    record = {
        "rank": rank,
        "error": one_line(exc),
        "message": redact(str(exc)),
        "type": type(exc).__name__,
        "user_mistake": isinstance(exc, UserError),
        "rows": list(getattr(exc, "data_rows", ())),  # of the data, that were being worked on
        "out_of_memory": out_of_memory,
        "at": time.time(),
    }
    name = f"rank-{rank}" if isinstance(rank, int) else rank
    logs = Path(run_dir) / "logs"
    logs.mkdir(exist_ok=True)
    atomic_write(logs / f"{name}.error.json", to_json(record, indent=1))


def read_rank_errors(run_dir: Path) -> list[dict[str, Any]]:
    """What failing processes of the run left, the earliest (the cause of the others) first."""
    errors = [read_json(path) for path in (Path(run_dir) / "logs").glob("*.error.json")]
    told = [error for error in errors if isinstance(error, dict)]
    return sorted(told, key=lambda error: error.get("at", 0.0))


def steps_text(status: dict[str, Any]) -> str:
    """`8 of 48`."""
    total = status.get("total_steps")
    return f"{status.get('step') or 0}" + (f" of {total}" if total else "")
