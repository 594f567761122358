"""Watching over the children of a supervisor: requests to stop, owners, progress, ends, and ranks that hang.

    session = Session(run_dir, config, owners, lines)
    codes = wait_for(session, ranks, grace_s)      # returns when all have ended

Ranks wait for each other, so one that hangs stops all. Every rank answers SIGUSR1 with the stacks of its threads in its
log (`faulthandler`, which needs neither the interpreter's lock nor a free thread). Those that stand in
`torch.distributed` wait; the one that does not, or that gives no answer because it is stopped, is the one to name.

Deliberately not here: what is started and in which order (supervisor), whose failure it was (restarts).
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ExitStatus
from dpo_kit.records import durations
from dpo_kit.records.status import read_status, request_stop, stop_requested, update_status
from dpo_kit.system import files
from dpo_kit.system.processes import identify, is_alive

if TYPE_CHECKING:
    from dpo_kit.supervise.nodes import NodeRanks, Nodes
    from dpo_kit.supervise.ranks import LocalRanks
    from dpo_kit.view.progress import Lines


ENDED_WELL = (ExitStatus.DONE, ExitStatus.STOPPED)
_POLL_S = 0.1
_OWNERS_POLL_S = 0.5
_HEARTBEAT_S = 5.0
# The ranks that lose a failed one are failing themselves: time to write that into their logs.
_LAST_WORDS_S = 0.3


@dataclass
class Session:
    """What a supervisor knows about its run."""

    run_dir: Path
    config: Config
    owners: list[dict[str, Any]]
    lines: Lines | None
    stop: str | None = None
    stop_at: float = 0.0
    leave: bool = False
    started_ranks: bool = False
    halvings: int = 0  # of this supervisor, after ranks that ran out of memory
    failures: int = 0  # in a row that brought no step beyond `failed_at`
    failed_at: int = -1
    owners_at: float = 0.0
    known: dict[str, float] = field(default_factory=dict)  # seconds of each phase in an earlier run
    written: dict[str, Any] = field(default_factory=dict)
    written_at: float = 0.0
    moved_at: float = field(default_factory=time.monotonic)  # when the progress last changed
    hung: tuple[int, str] | None = None  # the rank that hangs, and a line about it
    nodes: Nodes | None = None  # of a run on other machines

    @property
    def num_ranks(self) -> int:
        return config_module.parse_backend(self.config.actor.backend).world_size

    @property
    def device(self) -> str:
        return "cuda" if self.config.cluster.n_gpus_per_node else "cpu"

    @property
    def kind(self) -> str:
        """What makes the times of two runs comparable, as far as a key can tell."""
        return f"{self.config.actor.path} on {self.num_ranks} {self.device} ranks"


def wait_for(session: Session, ranks: LocalRanks | NodeRanks, grace_s: float) -> list[int | None]:
    """Waits until all ranks (or a child of another kind) have ended or are lost, and passes on requests to stop.

    Returns:
        Exit status of each child; None for one that was killed here: too slow to stop, told to leave at
        once, or in want of a child that failed.
    """
    told = False
    done_at: float | None = None
    try:
        while True:
            look(session)
            codes = ranks.codes()
            if None not in codes or ranks.lost:
                return codes
            now = time.monotonic()
            if ExitStatus.STOPPED in codes and not session.stop:  # somebody else told a rank to stop
                ask(session, stop_requested(session.run_dir) or "preempted")
            if session.stop and not told:
                told = True
                ranks.send(signal.SIGTERM)
            if codes[0] == ExitStatus.DONE:
                # Rank 0 has written everything: who hangs in his good-byes is not waited for.
                done_at = done_at or now
            waited, phase = now - session.moved_at, session.written.get("phase", "")
            is_overdue = phase in PHASES and waited > session.config.cluster.step_timeout_s
            if is_overdue and session.stop is None:
                session.hung = find_hung(ranks, session.run_dir / "logs", waited, phase)
                return codes
            failed = any(code not in (None, *ENDED_WELL) for code in codes)
            if failed and not session.stop:
                time.sleep(_LAST_WORDS_S)
                return ranks.codes()
            if session.leave or any(since and now - since > grace_s for since in (session.stop_at, done_at)):
                return codes
            time.sleep(_POLL_S)
    finally:
        ranks.end()


def look(session: Session) -> None:
    """Everything that may ask the run to stop, and what the children have written."""
    now = time.monotonic()
    if session.stop is None and (asked := stop_requested(session.run_dir)):
        ask(session, asked)
    if now - session.owners_at > _OWNERS_POLL_S:
        session.owners_at = now
        gone = [owner["pid"] for owner in session.owners if not is_alive(owner)]
        if gone and session.stop is None:
            print(f"owner {gone[0]} is gone: saving and ending", flush=True)
            ask(session, "preempted")
    if session.nodes is not None:
        session.nodes.look()
    merge(session)


def ask(session: Session, state: str) -> None:
    session.stop, session.stop_at = state, time.monotonic()
    request_stop(session.run_dir, state)


def merge(session: Session) -> None:
    """Takes what the working child wrote into `status.json`; a heartbeat when nothing changed.

    A disk that is full is no reason to end a run: it may have room again when a checkpoint needs it.
    """
    progress = files.read_json(session.run_dir / "progress.json", {})
    fields = _status_fields(session, progress) if progress.get("phase") else {}
    now = time.monotonic()
    status, has_moved = None, fields != session.written
    if has_moved:
        session.moved_at = now
    if has_moved or now - session.written_at >= _HEARTBEAT_S:
        session.written, session.written_at = fields, now
        with contextlib.suppress(OSError):
            # The state, too: somebody may have damaged the file meanwhile.
            status = update_status(session.run_dir, state="running", supervisor=identify(), **fields)
    if session.lines:
        session.lines.update(status or read_status(session.run_dir))


def _status_fields(session: Session, progress: dict[str, Any]) -> dict[str, Any]:
    """What `status.json` says of a child's progress."""
    name = progress["phase"]
    fields = {
        "phase": name,
        "phase_done": progress["done"],
        "phase_total": progress["total"],
        "phase_started_at": progress["started_at"],
        "phase_started_done": progress["started_done"],
        "phase_expected_s": progress["expected_s"],
        "phase_expected_from": "the phase itself",
        "phases": progress["phases"],
    }
    if progress["expected_s"] is None:
        fields["phase_expected_s"] = session.known.get(name, durations.GUESSES_S.get(name))
        fields["phase_expected_from"] = "earlier run" if name in session.known else "guess"
    if progress.get("note"):
        fields["message"] = progress["note"]
    fields |= {key: progress[key] for key in ("step", "total_steps") if progress[key] is not None}
    return fields


# Phases in which the ranks go from micro-batch to micro-batch; others may take long in one piece.
PHASES = ("reference pass", "evaluation", "first step", "training")
_ANSWER_S = 3.0
_WAITING = ("torch/distributed/", "torch\\distributed\\")
_HEADS = ("Thread 0x", "Current thread 0x")


def find_hung(ranks: LocalRanks | NodeRanks, logs: Path, waited_s: float, phase: str) -> tuple[int, str]:
    """The rank that hangs and one line about it.

    Args:
        ranks: those that have ended are left out.
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
    since = f"nothing moved for {waited_s:.0f} s in phase {phase!r}"
    return rank, f"rank {rank}: {how}; {since} (cluster.step_timeout_s; stacks in logs/rank-{rank}.log)"


def _stacks(ranks: LocalRanks | NodeRanks, logs: Path) -> dict[int, list[str]]:
    """What each living rank writes into its log when asked; empty for one that does not answer."""
    asked = {}
    for rank, code in enumerate(ranks.codes()):
        if code is None:
            log = logs / f"rank-{rank}.log"
            asked[rank] = (log, log.stat().st_size if log.exists() else 0)
            ranks.send(signal.SIGUSR1, rank)
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
