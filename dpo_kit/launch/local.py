"""Starting runs on this machine, in the background or with this process as the supervisor.

Whether a run outlives this process is a matter of who sits before it (supervise/owner). Everything that can be told
without building data is checked before the folder is made, so that a mistake leaves nothing on disk; what a run that
exists may not go on with is refused before anything of it changes (`resuming`).

Deliberately not here: what happens to a started run (supervise, runs), which folder it gets (`trial`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from dpo_kit.config import Config
from dpo_kit.errors import ExitStatus, RunError, UserError
from dpo_kit.launch import preflight, trial, world
from dpo_kit.records import findings, manifest
from dpo_kit.runs import Run
from dpo_kit.supervise import supervisor
from dpo_kit.supervise.owner import is_headless
from dpo_kit.supervise.start import resume, start_supervisor
from dpo_kit.view import progress

_STARTED_S = 20.0
_LONG_AGO_S = 60.0


def start(config: Config, new: bool = False, *, owner: str | None = None, detached: bool = False) -> Run:
    """Starts a run and returns its handle at once.

    Interactive, a live run with the same configuration or of the same trial name is attached instead of
    started a second time, so that a launch cell can be run again. Headless (papermill, nbconvert, pytest, a
    plain script) the run belongs to this process and ends with it.

    Args:
        config: a loaded configuration.
        new: start another run even while one like it lives.
        owner: `interactive` or `headless`; None finds out (`is_headless`).
        detached: the run belongs to nobody, whoever starts it (`dpo-kit train --detach`); returns when the
            supervisor has taken over, a second later.

    Raises:
        UserError: what cannot run here, or a trial that exists. Nothing is left on disk.
        RunError: detached, and the supervisor did not start.
    """
    kind = "detached" if detached else owner or ("headless" if is_headless() else "interactive")
    assert kind in ("detached", "headless", "interactive"), kind
    if config.scheduler.type == "torchrun":
        raise UserError(
            "scheduler.type = 'torchrun' is for `dpo-kit train` in the foreground; use local, ray or slurm"
        )
    config = world.resolve_world(config)
    if kind == "interactive" and not new and (running := trial.live_alike(config)):
        return running
    run, is_done = trial.open_trial(config, kind)
    if not is_done:
        run._supervisor = start_supervisor(run.dir, kind)
        world.print_line(f"run: {run.dir}")
    if detached:
        _until_started(run)
    return run


def _until_started(run: Run) -> None:
    """Whoever starts a detached run goes away: a supervisor that cannot start is told before that."""
    deadline = time.monotonic() + _STARTED_S
    while run.state == "queued" and time.monotonic() < deadline:
        time.sleep(0.05)
    if run.state == "failed":
        raise RunError(run.epitaph(), run_dir=run.dir, state="failed")


def run_in_foreground(config: Config, source: str | Path | None = None) -> int:
    """Trains with this process as the supervisor; the last line it prints is the run folder.

    The first SIGINT or SIGTERM stops the run with its state saved, the second leaves at once.

    Args:
        config: a loaded configuration.
        source: its params file: with that of another run, what differs from that run is told.

    Returns:
        Exit status: 0 done, 2 a user's mistake in a rank, 3 stopped or preempted, 1 failed.

    Raises:
        UserError: what cannot run, a trial that exists, data that cannot be used. Nothing is left on disk.
    """
    world.check_alone(config)
    if config.scheduler.type == "torchrun":
        from dpo_kit.launch import torchrun  # which ends in `foreground`

        return torchrun.run_in_foreground(config, source)
    config = world.resolve_world(config)
    run, is_done = trial.open_trial(config, "foreground", source)
    return foreground(run, is_done)


def resume_in_foreground(run: Run) -> int:
    """Runs an ended run's folder again with this process as the supervisor, as `run_in_foreground` does.

    Raises:
        UserError: it is live, cannot go on, or somebody else is about to run it.
    """
    found = resume(run.dir, preflight.check)
    if found.act == "attach":
        raise UserError(f"{found.told} ({manifest.command('show', run.dir)})")
    if found.act == "skip":
        world.print_line(found.told)
    return foreground(run, found.act == "skip")


def foreground(run: Run, is_done: bool, **how: Any) -> int:
    """Supervises a queued run in this process; its exit status.

    Args:
        run: of a folder that `trial` or `resume` has made ready.
        is_done: there is nothing to do.
        how: further arguments of `supervisor.supervise`.
    """
    code = ExitStatus.DONE
    if not is_done:
        code = supervisor.supervise(run.dir, foreground=True, lines=progress.Lines(run.dir), **how)
    if code == ExitStatus.DONE and not is_done and (figures := progress.last_figures(run.dir)):
        status = run.status
        if status["ended_at"] - status["started_at"] > _LONG_AGO_S:
            for finding in findings.read(run.dir):  # again, beside the figures
                world.print_line(str(finding))
        world.print_line(figures)
    if code != ExitStatus.DONE:
        print(run.epitaph(), file=sys.stderr, flush=True)
    world.print_line(str(run.dir))
    return code
