"""One run from start to end: `python -m dpo_kit.supervise.supervisor RUN_DIR [--owner PID[@START]]...`.

    prepare (models, pairs)  ->  ranks (reference pass, training, export)  ->  samples

The ranks are started beside prepare, import what they need, and wait to be let go. Everything heavy is a child
process; the supervisor imports neither torch nor datasets. It alone writes `status.json`, so that whatever happens to
a child, the state of the run is told:

    asked to stop (stop.json, SIGINT, SIGTERM), owner gone  ->  SIGTERM to the children; SIGKILL after
                                     cluster.grace_s, or at a second signal; `stopped` or `preempted`
    a rank runs out of memory    ->  the others are killed; all start again with half the micro-batch, three
                                     times at most (`restarts`): that does not change a step's result
    a rank fails                 ->  the others are killed; with `recover.mode: auto` all start again from the last
                                     whole checkpoint, until `recover.retries` failures in a row brought no new
                                     step; else `failed` with that rank's cause in one line
    the supervisor is killed     ->  the children end with it (`processes.die_with_parent`)

Deliberately not here: what a rank does (engine/worker), making run folders (launch), checkpoints (engine).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit import config as config_module
from dpo_kit.errors import ExitStatus, UserError
from dpo_kit.records import durations, facts, lock, manifest, metrics, run_folder
from dpo_kit.records.checkpoint_folders import steps
from dpo_kit.records.status import (
    add_seconds,
    clear_stop,
    one_line,
    read_status,
    update_status,
    write_progress,
)
from dpo_kit.redaction import guard_output
from dpo_kit.supervise import nodes, restarts
from dpo_kit.supervise.children import Session, ask, look, merge, wait_for
from dpo_kit.supervise.ranks import LocalRanks, Share, waiting
from dpo_kit.system import files, folders
from dpo_kit.system.processes import identify, popen

if TYPE_CHECKING:
    from dpo_kit.view.progress import Lines


# What has no state to save (prepare, samples) need not be waited for.
_CHILD_GRACE_S = 5.0
# `timeout` sends its signal to the process and to the group: two signals at once are one request.
_SECOND_SIGNAL_S = 0.5


def supervise(
    run_dir: Path | str,
    owners: Sequence[dict[str, Any]] = (),
    foreground: bool = False,
    lines: Lines | None = None,
    *,
    prepare_module: str = "dpo_kit.dataset.prepare",
    worker_module: str = "dpo_kit.engine.worker",
    samples_module: str = "dpo_kit.tools.samples",
    starter_module: str | None = None,
    bring: Callable[[str], subprocess.Popen] | None = None,
    second_signal_s: float = _SECOND_SIGNAL_S,
) -> ExitStatus:
    """Runs a run folder to its end.

    Args:
        run_dir: a folder made by `run_folder.create`.
        owners: identities (`processes.identify`) of processes whose end ends the run as `preempted`.
        foreground: remove the new folder when the data are a user's mistake.
        lines: where progress is told.
        prepare_module: what is run as `python -m ... RUN_DIR` to build models and pairs.
        worker_module: what every rank runs.
        samples_module: what answers the prompts after training.
        starter_module: what starts the agents of a run on other machines; by `scheduler.type` when left out.
        bring: has agents of one rank each instead (see `nodes.Nodes`).
        second_signal_s: a signal that comes later than this after the first one leaves at once.

    Returns:
        The exit status.

    Raises:
        UserError: another process runs this folder; or, in the foreground, a user's mistake was found before
            any rank was started, or before a fork's first step: the run folder is removed, and nothing is left.
    """
    run_dir = Path(run_dir)
    config = config_module.load(run_dir / "config.yaml")
    session = Session(run_dir, config, list(owners), lines)
    session.known = durations.expected_seconds(Path(config.cluster.fileroot), session.kind)
    modules = (prepare_module, worker_module, samples_module)
    with lock.lock(run_dir), _signals(session, second_signal_s):
        run_folder.reserve_room(run_dir)
        (run_dir / "logs").mkdir(exist_ok=True)
        try:
            if config.scheduler.type != "local":
                session.nodes = nodes.of(session, bring, starter_module)
            state, message, mistake = _run(session, *modules)
        except nodes.NodeError as error:
            state, message, mistake = "failed", str(error), error.mistake
        except Exception as error:  # of our own: a failed run, too
            traceback.print_exc()
            state, message, mistake = "failed", f"supervisor: {one_line(error)}", False
        finally:
            if session.nodes is not None:
                session.nodes.close()
        if foreground and mistake and _leaves_nothing(session):
            run_folder.remove_folder(run_dir)
            raise UserError(re.sub(r" \(logs/\S+\)$", "", message))  # the log is gone, too
        _finish(session, state, message, mistake)
    return ExitStatus.MISTAKE if mistake else ExitStatus.of(state)


def _leaves_nothing(session: Session) -> bool:
    """Whether a mistake came so early that a new folder goes: before the ranks, or a fork's before their first step."""
    is_first = read_status(session.run_dir).get("attempt") == 1
    is_early = not session.started_ranks or bool(manifest.parent(session.run_dir))
    return is_first and is_early and facts.is_spare(session.run_dir)


def _run(
    session: Session, prepare_module: str, worker_module: str, samples_module: str
) -> tuple[str, str, bool]:
    """State, message, and whether a user's mistake is to blame."""
    status = update_status(
        session.run_dir, state="running", supervisor=identify(), started_at=time.time(), message=""
    )
    # A launcher that did not say who owns the run is this process in the foreground.
    if status.get("owner") is None:
        update_status(session.run_dir, owner={"kind": "foreground", **identify()})
    manifest.write_commands(session.run_dir)  # the numbers of an attempt with another config are void
    look(session)
    if session.stop:
        return session.stop, "before it began", False
    if not status.get("trained"):  # else an earlier attempt was ended while it made the samples
        if ended := _prepare_and_train(session, prepare_module, worker_module):
            return ended
        update_status(session.run_dir, trained=True)
    if session.nodes is not None:
        session.nodes.close()  # samples are made here
    _make_samples(session, samples_module)
    if told := manifest.repetition(session.run_dir):
        update_status(session.run_dir, repetition=told)
        if session.lines:
            session.lines.write(told)
    note = files.read_json(session.run_dir / "progress.json", {}).get("note")
    return "done", restarts.halved_text(session) or note or "", False


def _prepare_and_train(
    session: Session, prepare_module: str, worker_module: str
) -> tuple[str, str, bool] | None:
    """How the run ended, as `_run` gives it; None when the model is trained and written."""
    codes: list[int | None] = []
    try:
        with _waiting_ranks(session, worker_module) as ranks:
            code = None if session.stop else _run_child(session, prepare_module, "prepare")
            if session.stop:
                return session.stop, "before training; nothing was lost", False
            if code != ExitStatus.DONE:
                failure = restarts.child_failure(session.run_dir, "prepare", code)
                return "failed", failure.message, failure.mistake
            codes, failed = _run_ranks(session, ranks)
    except nodes.NodeError as error:
        return "failed", str(error), error.mistake
    while failed and not session.stop and not (failed := _given_up(session, failed)):
        try:
            with _waiting_ranks(session, worker_module) as ranks:
                if session.stop:
                    return session.stop, "before its ranks were started again; nothing was lost", False
                codes, failed = _run_ranks(session, ranks)
        except nodes.NodeError as error:
            failed = restarts.Failure(str(error), cause="lost")
    if failed:
        return "failed", failed.message, failed.mistake
    if codes[0] != ExitStatus.DONE:
        return session.stop or "preempted", _how_stopped(session, codes), False
    return None


def _how_stopped(session: Session, codes: list[int | None]) -> str:
    killed = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
    if killed and session.leave:
        return f"as asked, at once: rank {killed} was killed before its state was saved"
    if killed:
        limit = f"{session.config.cluster.grace_s:g} s"
        return f"as asked; rank {killed} did not end within {limit} and was killed"
    if -signal.SIGTERM in codes or metrics.last_record(session.run_dir) is None:
        return "as asked, before the first step: there was nothing to save"
    return "as asked, with the state saved"


def _finish(session: Session, state: str, message: str, mistake: bool) -> None:
    """Writes the last word, tells it, frees what nobody needs now, and keeps the times for the next run."""
    run_folder.free_reserve(session.run_dir)
    with contextlib.suppress(Exception):  # progress that cannot be read must not hide how the run ended
        merge(session)
    now, progress, phases = time.time(), session.written, []
    if progress:  # the clock of the last phase is still running
        phases = add_seconds(progress["phases"], progress["phase"], now - progress["phase_started_at"])
    ended = {"state": state, "message": message, "mistake": mistake, "ended_at": now}
    status = update_status(session.run_dir, **ended, phases=phases, ranks=[])
    clear_stop(session.run_dir)
    if state == "done" and session.config.recover.keep != "all":  # not before `done` is on the disk
        checkpoints = session.run_dir / "checkpoints"
        for step in steps(checkpoints):
            folders.discard(checkpoints / f"step-{step}")
    if state == "done" and status.get("attempt") == 1:  # the time of broken attempts is nobody's expectation
        durations.remember_seconds(Path(session.config.cluster.fileroot), session.kind, phases)
    if session.lines:
        session.lines.finish(status)


# ---------------------------------------------------------------- the phases


def _run_child(session: Session, module: str, name: str) -> int | None:
    """Runs `prepare` or `samples`; its exit status, None when it was killed."""
    with open(session.run_dir / "logs" / f"{name}.log", "ab") as log:
        environment = {**os.environ, **nodes.variables(session.config)}
        child = popen([module, str(session.run_dir)], environment, log)
    return wait_for(session, LocalRanks([child]), min(_CHILD_GRACE_S, session.config.cluster.grace_s))[0]


def _waiting_ranks(
    session: Session, module: str
) -> contextlib.AbstractContextManager[LocalRanks | nodes.NodeRanks]:
    """The ranks, here or on the run's nodes, importing what they need until `_run_ranks`."""
    if session.nodes is not None:
        return session.nodes.waiting(module)
    attempt = read_status(session.run_dir).get("attempt", 1)
    share = Share(0, session.num_ranks, session.num_ranks, session.device, module, attempt)
    return waiting(session.run_dir, share)


def _run_ranks(
    session: Session, ranks: LocalRanks | nodes.NodeRanks
) -> tuple[list[int | None], restarts.Failure | None]:
    """Lets the ranks go and waits for all of them: their exit statuses (see `children.wait_for`) and the failure."""
    write_progress(session.run_dir, phase="start ranks")
    session.started_ranks, session.moved_at = True, time.monotonic()
    update_status(session.run_dir, ranks=ranks.pids)
    ranks.let_go()
    codes = wait_for(session, ranks, session.config.cluster.grace_s)
    hung, session.hung = session.hung, None
    if codes[0] == ExitStatus.DONE:  # the model is written: how the others take their leave is no matter
        return codes, None
    if ranks.lost and None in codes:
        return codes, restarts.Failure(ranks.lost, cause="lost")
    if hung:
        return codes, restarts.Failure(hung[1], rank=hung[0], cause="hung")
    return codes, restarts.rank_failure(session.run_dir, codes, stopping=session.stop is not None)


def _given_up(session: Session, failed: restarts.Failure) -> restarts.Failure | None:
    """How the run failed; None where the ranks may start again, and all is ready for that."""
    try:
        if failed.out_of_memory is not None:
            return restarts.halve(session, failed, failed.out_of_memory)
        return restarts.retry(session, failed)
    except OSError:  # a full disk: what made the ranks fail is the better word
        return failed


# ---------------------------------------------------------------- samples


def _make_samples(session: Session, module: str) -> None:
    """Lets the samples be made; whatever happens to them, the run is done."""
    if session.config.evaluator.num_samples == 0:
        return
    write_progress(session.run_dir, phase="samples")
    code = None if session.stop else _run_child(session, module, "samples")
    if code == ExitStatus.DONE:
        note = "made"
    elif session.stop:
        note = "not made: the run was asked to stop"
    else:
        note = f"failed: {restarts.child_failure(session.run_dir, 'samples', code).message}"
    update_status(session.run_dir, samples=note)
    if note != "made" and session.lines:
        session.lines.write(f"samples {note}")


# ---------------------------------------------------------------- signals and the command line


@contextlib.contextmanager
def _signals(session: Session, second_signal_s: float) -> Iterator[None]:
    """SIGINT asks to stop, SIGTERM and SIGHUP to be preempted; the second one leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: Any) -> None:
        if session.stop is None:
            ask(session, "stopped" if number == signal.SIGINT else "preempted")
            if session.lines:
                session.lines.write("stopping with the state saved; a second signal leaves at once")
        elif time.monotonic() - session.stop_at > second_signal_s:
            session.leave = True

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _owner(text: str) -> dict[str, Any]:
    pid, _, started = text.partition("@")
    return {"pid": int(pid), "create_time": float(started) if started else None}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a detached supervisor."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_kit.supervise.supervisor", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--owner", type=_owner, action="append", default=[], metavar="PID[@START]")
    given = parser.parse_args(arguments)
    guard_output()
    try:
        return supervise(given.run_dir, given.owner)
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitStatus.MISTAKE


if __name__ == "__main__":
    sys.exit(main())
