"""The run folder on disk: create it, write its records, read them back.

    <fileroot>/<experiment>/<trial>/
        config.yaml  manifest.json        written once, when the run is created
        status.json                       the supervisor's word: state, step, phase, owner
        progress.json                     where the working process is (rank 0, prepare, samples)
        metrics.jsonl                     one line a step
        budget.json                       tokens of a micro-batch, and every halving (halving)
        stop.json                         somebody asks the run to end
        lock.json                         the supervisor that owns the folder (locks)
        logs/rank-N.log  logs/rank-N.error.json

Every file but `metrics.jsonl` is replaced as a whole, so a reader never sees half of one; `metrics.jsonl`
grows by whole lines, and a torn last line is skipped by the reader and cut by the next writer.

Deliberately not here: what the numbers mean, starting or ending processes, the `Run` handle (runs).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dpo_kit import commit
from dpo_kit.errors import UserError
from dpo_kit.files import atomic_write, read_json, to_json
from dpo_kit.processes import is_alive
from dpo_kit.redaction import redact

STATES = ("queued", "running", "stopped", "preempted", "failed", "done")
ENDED = ("stopped", "preempted", "failed", "done")
PHASES = (
    "convert model",
    "build pairs",
    "start ranks",
    "load model",
    "reference pass",
    "evaluation",
    "first step",
    "training",
    "checkpoint",
    "export",
    "samples",
)
# A supervisor answers within a second or two; a queued run without one after this long never will.
_QUEUED_S = 60.0
# How old another machine's heartbeat may be while its run counts as live.
REMOTE_HEARTBEAT_S = 60.0
_ADJECTIVES = "amber bold brave calm clever eager fair gentle keen lively merry quick quiet steady sunny warm"
_ANIMALS = "badger crane falcon finch fox heron lark lynx marten otter owl plover raven robin swift wren"
# Written by a run while it works: set aside or removed when a trial starts anew (see `clear`).
_WORK_FILES = (
    "metrics.jsonl",
    "metrics.jsonl.damaged",
    "progress.json",
    "stop.json",
    "samples.jsonl",
    "data.json",
)
_WORK_FOLDERS = ("logs", "evaluations", "tensorboard", "exports", "model")
# What was trained or measured is set aside there when a trial starts anew, one folder an attempt.
EARLIER = "earlier"
_WORTH_KEEPING = ("metrics.jsonl", "exports", "model")
MADE = (*_WORTH_KEEPING, EARLIER, "checkpoints")  # what would be a loss
_MISSING = object()
# Given up when the disk is full, so that the last word of a run can still be written.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 * 2**10
# Of the work files, what the ranks do not write, or what tells why an attempt ended.
_KEPT_BETWEEN_ATTEMPTS = ("progress.json", "stop.json", "data.json", "logs")


# ---------------------------------------------------------------- creating and finding run folders


def check_name(field: str, name: str) -> str:
    """Returns `name` when it can name a folder of its own and nothing else.

    Raises:
        UserError: it is empty, hidden, a path, starts like an option, or holds control characters.
    """
    problem = ""
    if not name or name != name.strip() or len(name.encode()) > 200:
        problem = "is empty, too long or begins or ends with white space"
    elif any(character in name for character in "/\\") or not name.isprintable():
        problem = "holds a path separator or a control character"
    elif name[0] in ".-~":
        problem = f"begins with {name[0]!r}"
    if problem:
        raise UserError(f"{field} = {name!r} {problem}; use one plain folder name, such as 'beta-0.1'")
    return name


def fresh_trial_name(rng: random.Random | None = None) -> str:
    """A readable name that sorts by time: `2026-11-22_15-30-05-brave-otter`."""
    rng = rng or random.Random()
    words = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_ANIMALS.split())}"
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{words}"


def run_folder(fileroot: Path, experiment: str, trial: str) -> Path:
    """Where the run of these names lies; the folder need not exist.

    Raises:
        UserError: a name is no plain folder name, or one of the two folders is a link.
    """
    folder = Path(fileroot) / check_name("experiment_name", experiment)
    for field, path in (
        ("experiment_name", folder),
        ("trial_name", folder / check_name("trial_name", trial)),
    ):
        if path.is_symlink():
            raise UserError(
                f"{field}: {path} is a link; a run is written to real folders only, use another name"
            )
    return folder / trial


def run_name(run_dir: Path) -> str:
    """`experiment/trial`."""
    return f"{run_dir.parent.name}/{run_dir.name}"


def create(
    fileroot: Path,
    experiment: str,
    trial: str | None,
    *,
    config_text: str,
    manifest: dict,
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Makes a run folder in state `queued`: written beside and renamed, with nothing left behind when that fails.

    Args:
        fileroot: root of all runs; made when it is missing.
        experiment: name of the experiment's folder.
        trial: name of the run's folder; None takes a fresh readable one.
        config_text: the resolved configuration, written as `config.yaml`. `{trial_name}` in it is not
            replaced: name the trial first (`fresh_trial_name`) where the text must carry it.
        manifest: written as `manifest.json`.
        fill: adds to the folder before it gets its name.

    Raises:
        UserError: a name is not allowed, or the folder exists.
    """
    while True:
        folder = run_folder(fileroot, experiment, fresh_trial_name() if trial is None else trial)
        staged = folder.with_name(f".{folder.name[:150]}-{os.getpid()}.part")
        try:
            for left in [staged, *folder.parent.glob(".*.part")]:  # of a launcher that was killed here
                if left == staged or commit.is_abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            staged.mkdir(parents=True)
            (staged / "logs").mkdir()
            atomic_write(staged / "config.yaml", config_text)
            atomic_write(staged / "manifest.json", to_json(manifest, indent=2))
            reset_status(staged)
            if fill is not None:
                fill(staged)
            staged.rename(folder)  # onto an empty folder, too; onto anything else it fails
            return folder
        except BaseException as error:
            remove_folder(staged)
            if not isinstance(error, OSError):
                raise
            if not folder.exists():
                raise UserError(
                    f"cluster.fileroot = {str(fileroot)!r}: {folder} cannot be made ({error.strerror}); give a folder"
                    " that can be written"
                ) from None
            if trial is not None:
                raise UserError(f"trial_name = {trial!r}: {folder} exists; use another name") from None


def remove_folder(run_dir: Path) -> None:
    """Removes a run folder, and those of its experiment and of all runs when nothing else is in them."""
    shutil.rmtree(run_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        run_dir.parent.rmdir()
        run_dir.parent.parent.rmdir()


def clear(run_dir: Path) -> str:
    """Clears away what an earlier attempt wrote, so that the trial starts anew; says what became of it.

    What was trained or measured is set aside in `earlier/`. `config.yaml`, `manifest.json`, `budget.json`,
    `checkpoints/` and the lock stay.
    """
    told = _set_aside(run_dir, (*_WORK_FILES, *_WORK_FOLDERS))
    (run_dir / "logs").mkdir(exist_ok=True)
    return told


def clear_requests(run_dir: Path) -> None:
    """Removes what concerns an ended attempt only, so that the next one goes on from a checkpoint."""
    for name in ("progress.json", "stop.json"):
        (run_dir / name).unlink(missing_ok=True)
    clear_errors(run_dir)


def clear_errors(run_dir: Path) -> None:
    """Removes what failed ranks of an earlier attempt left; the logs stay."""
    for error in (run_dir / "logs").glob("*.error.json"):
        error.unlink()


def clear_training(run_dir: Path) -> str:
    """Clears away what the ranks recorded, so that the same supervisor may start them anew; says what became of it.

    Pairs, logs, requests to stop and the time that the phases took stay; the errors of ranks do not.
    """
    names = (*_WORK_FILES, *_WORK_FOLDERS)
    told = _set_aside(run_dir, [name for name in names if name not in _KEPT_BETWEEN_ATTEMPTS])
    clear_errors(run_dir)
    return told


def _set_aside(run_dir: Path, names: Iterable[str]) -> str:
    """Moves what a run wrote to `earlier/attempt-N/`, or removes it when there is nothing in it worth keeping."""
    there = [run_dir / name for name in names if (run_dir / name).exists()]
    full = [path for path in there if not path.is_dir() or any(path.iterdir())]
    if not any(path.name in _WORTH_KEEPING for path in full):
        for path in there:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return ""
    number = read_status(run_dir).get("attempt") or 1
    while (aside := run_dir / EARLIER / f"attempt-{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    for path in there:
        path.rename(aside / path.name)
    return f"what it had made is kept in {EARLIER}/{aside.name}"


def list_runs(fileroot: Path) -> list[Path]:
    """Run folders under `fileroot`, oldest first; linked and hidden folders are not entered."""
    found = []
    for experiment in _plain_folders(Path(fileroot)):
        found += [run for run in _plain_folders(experiment) if (run / "status.json").is_file()]
    return sorted(found, key=lambda run: (_created_at(run), run.name))


def _plain_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
    ]


def _created_at(run_dir: Path) -> float:
    try:
        return float(json.loads((run_dir / "status.json").read_text("utf-8")).get("created_at") or 0.0)
    except (OSError, ValueError, TypeError, AttributeError):
        return 0.0


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
        return {
            "state": "failed",
            "message": f"{path} holds no state of a run; it was changed outside the kit",
        }
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


def reserve_room(run_dir: Path) -> None:
    """Sets some bytes of the disk aside, which `free_reserve` gives back."""
    with contextlib.suppress(OSError):
        (Path(run_dir) / _RESERVE).write_bytes(b"\0" * _RESERVE_BYTES)


def free_reserve(run_dir: Path) -> None:
    """Gives back what `reserve_room` set aside: there is room for a last word on a full disk."""
    (Path(run_dir) / _RESERVE).unlink(missing_ok=True)


def is_live(status: dict[str, Any]) -> bool:
    """True while a supervisor works on the run (or is just being started)."""
    if status.get("state") not in ("queued", "running"):
        return False
    age_s = time.time() - float(status.get("updated_at") or 0.0)
    supervisor = status.get("supervisor")
    if not supervisor:
        return age_s < _QUEUED_S
    if supervisor.get("host") not in (None, socket.gethostname()):
        return age_s < REMOTE_HEARTBEAT_S
    return is_alive(supervisor)


def settle(status: dict[str, Any]) -> dict[str, Any]:
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
    if old.get("phase") != phase:
        phases = add_seconds(phases, old.get("phase"), now - started_at)
        started_at, started_done = now, done
    if phase == "training":
        step = done if step is None else step
        total_steps = total if total_steps is None else total_steps
    progress = {
        "phase": phase,
        "done": done,
        "total": total,
        "expected_s": expected_s
        if expected_s is not None or old.get("phase") != phase
        else old.get("expected_s"),
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
    return (read_json(Path(run_dir) / "stop.json", {}) or {}).get("state")


def clear_stop(run_dir: Path) -> None:
    """Forgets a request to stop."""
    (Path(run_dir) / "stop.json").unlink(missing_ok=True)


# ---------------------------------------------------------------- errors of ranks


def one_line(error: BaseException) -> str:
    """`Type: first line of the message`; a `UserError` is told without its type."""
    text = " ".join(str(error).strip().splitlines()[:1]) or "no message"
    return text if isinstance(error, UserError) else redact(f"{type(error).__name__}: {text}")


def write_rank_error(
    run_dir: Path,
    rank: int | str,
    exc: BaseException,
    out_of_memory: dict[str, Any] | None = None,
) -> None:
    """Leaves the cause of a failure where the supervisor finds it; the traceback goes to the log.

    Args:
        run_dir: the run folder.
        rank: the rank, or the name of another process of the run (`prepare`, `samples`).
        exc: what was raised.
        out_of_memory: `section` and `step` (`budget.OutOfMemory.facts`), when that was the cause.
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
    return sorted(
        (error for error in errors if isinstance(error, dict)), key=lambda error: error.get("at", 0.0)
    )
