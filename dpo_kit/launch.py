"""Starting runs: find the devices, refuse what cannot run, make the folder, start the supervisor.

    run = launch.start(settings)                   returns at once; attaches when its run lives
    code = launch.run_in_foreground(settings)      what `dpo-kit train` does
    results = launch.spawn(my_module.fn, 1, 2)     a function on N ranks for a cell

Whether a run outlives this process is a matter of who sits before it (`owners`). Everything that can be told
without building data is checked before the folder is made, so that a mistake leaves nothing on disk; what a run that
exists may not go on with is refused before anything of it changes (`resuming`).

Deliberately not here: what happens to a started run (supervisor, runs), Ray and Slurm (a later module).
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit import devices, findings, identity, manifest, preflight, records, resuming, runs, watch
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, RunError, UserError
from dpo_kit.owners import is_headless
from dpo_kit.processes import physical_cores
from dpo_kit.runs import Run
from dpo_kit.spawn import spawn
from dpo_kit.supervisor import supervise

__all__ = [
    "is_headless",
    "live",
    "resolve_world",
    "resume_in_foreground",
    "run_in_foreground",
    "spawn",
    "start",
]

Say = Callable[[str], None]
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
    config = resolve_world(config)
    if kind == "interactive" and not new and (running := _alike(config)):
        return running
    run, is_done = _open_trial(config, kind)
    if not is_done:
        runs.start_supervisor(run, kind)
        _say(f"run: {run.dir}")
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
    config = resolve_world(config)
    run, is_done = _open_trial(config, "foreground", source)
    return foreground(run, is_done)


def resume_in_foreground(run: Run) -> int:
    """Runs an ended run's folder again with this process as the supervisor, as `run_in_foreground` does.

    Raises:
        UserError: it is live, or somebody else is about to run it.
    """
    if run.is_live:
        show = manifest.command("show", run.dir)
        raise UserError(f"{run.name} is {run.state}; nothing to resume ({show})")
    is_done = run.state == "done"
    if is_done:
        _say(f"{run.name} is done; nothing to resume")
    else:
        if problem := runs.resume_problem(run):
            raise UserError(problem)
        if not run.status.get("trained"):
            preflight.check(run.config)
        runs.begin_anew(run)
    return foreground(run, is_done)


def foreground(run: Run, is_done: bool) -> int:
    """Supervises a queued run in this process; its exit status."""
    code = 0 if is_done else supervise(run.dir, foreground=True)
    if code == 0 and not is_done and (figures := watch.last_figures(run.dir)):
        status = run.status
        if status["ended_at"] - status["started_at"] > _LONG_AGO_S:
            for finding in findings.read(run.dir):  # again, beside the figures
                _say(str(finding))
        _say(figures)
    if code != 0:
        print(run.epitaph(), file=sys.stderr, flush=True)
    _say(str(run.dir))
    return code


def live(fileroot: str | Path) -> list[Run]:
    """Runs under a root that a supervisor is working on, oldest first."""
    found = []
    for folder in records.list_runs(Path(fileroot)):
        with contextlib.suppress(UserError):  # a damaged folder of another run is no reason to start none
            if Run(folder).is_live:
                found.append(Run(folder))
    return found


# ---------------------------------------------------------------- devices


def resolve_world(config: Config, say: Say | None = None) -> Config:
    """Fills in devices and ranks: `cluster.n_gpus_per_node` becomes a number, the backend gets its sizes.

    Args:
        config: loaded; not changed.
        say: where to say what was chosen; prints by default.

    Raises:
        UserError: more ranks or devices than there are (both numbers named), a scheduler that is not built
            yet, or a contradiction that only shows with the numbers filled in.
    """
    say = say or _say
    if config.scheduler.type != "local":
        raise UserError(
            f"scheduler.type = {config.scheduler.type!r} loads, but launching on it comes later;"
            " use scheduler.type=local"
        )
    config = copy.deepcopy(config)
    visible = devices.visible_devices()
    wanted = config.cluster.n_gpus_per_node
    if wanted == "auto":
        config.cluster.n_gpus_per_node = visible
    elif int(wanted) > visible:
        raise ConfigError([devices.too_many(int(wanted), visible)])
    _fill_backend(config, automatic=wanted == "auto")
    config_module.check(config)
    say(_told(config, visible))
    return config


def _fill_backend(config: Config, *, automatic: bool) -> None:
    backend = config_module.parse_backend(config.actor.backend)
    num_devices = int(config.cluster.n_gpus_per_node)
    if not backend.explicit:
        sized = f"{backend.kind}:d{max(1, num_devices)}p1t1"
        if config.ref.backend == config.actor.backend:
            config.ref.backend = sized
        config.actor.backend = sized
        return
    cores = os.cpu_count() or 1
    # `n_gpus_per_node: 0` asks for CPU ranks, however many; `auto` only falls back to them.
    if automatic and num_devices == 0 and backend.world_size > cores:
        raise ConfigError(
            [
                f"actor.backend = {config.actor.backend!r} needs {backend.world_size} ranks, and there are 0 CUDA"
                f" devices and {cores} CPU cores here; use actor.backend=fsdp, or cluster.n_gpus_per_node=0 for"
                f" {backend.world_size} CPU ranks all the same"
            ]
        )


def _told(config: Config, visible: int) -> str:
    num_ranks = config_module.parse_backend(config.actor.backend).world_size
    plural = "s" if num_ranks > 1 else ""
    if not config.cluster.n_gpus_per_node:
        threads = max(1, physical_cores() // num_ranks)
        return f"{num_ranks} CPU rank{plural} (gloo), {threads} thread{'s' if threads > 1 else ''} each"
    spare = f"; {visible - num_ranks} of {visible} visible devices stay unused" if num_ranks < visible else ""
    return f"{num_ranks} CUDA rank{plural} (NCCL){spare}"


# ---------------------------------------------------------------- which folder


def _alike(config: Config) -> Run | None:
    """A live run of the same trial name or configuration, to attach to; says so."""
    for run in reversed(live(config.cluster.fileroot)):
        if run.dir.parent.name != config.experiment_name:
            continue
        try:
            other = run.config
        except UserError:
            continue
        if config.trial_name in (None, run.dir.name):
            differing = _differences(config, other)
            if not differing or config.trial_name is not None:
                note = f"; its configuration differs: {identity.told(differing)}" if differing else ""
                other_way = "another trial_name" if config.trial_name else "launch.start(..., new=True)"
                _say(
                    f"attached to the live run {run.dir} (step {run.status.get('step') or 0}){note}; {other_way}"
                    " starts another"
                )
                return run
    return None


def _open_trial(config: Config, kind: str, source: str | Path | None = None) -> tuple[Run, bool]:
    """The queued run to start, or the done one that there is (True).

    Raises:
        UserError: see `start`.
    """
    named = config.trial_name is not None
    trial = config.trial_name or records.fresh_trial_name()
    config = replace(config, trial_name=trial)
    folder = records.run_folder(Path(config.cluster.fileroot), config.experiment_name, trial)
    run = Run(folder)
    exists = (folder / "status.json").is_file()
    is_done, note = _settled(config, run) if exists else (False, "")
    disk = "" if is_done else preflight.check(config)
    if not is_done and exists and (at := resuming.point(folder)):
        compare_content(folder, at, config)
    for line in filter(None, (note, disk)):
        _say(line)
    if is_done:
        return run, True
    source = None if source and Path(source).absolute().parent == folder else source
    made = manifest.build(config, named=named, owner=kind, source=source)
    made |= {"command": manifest.repeat_command(folder), "continue": manifest.continue_command(folder)}
    if exists:
        runs.begin_anew(run, config, made)
        return run, False
    root, text = Path(config.cluster.fileroot), config_module.to_yaml(config)
    return Run(records.create(root, config.experiment_name, trial, config_text=text, manifest=made)), False


def compare_content(run_dir: Path, at: resuming.Point, config: Config) -> None:
    """Compares what other places hold with what a run was trained on; building pairs may take its time.

    Args:
        run_dir: the run that `at` is of.
        at: where it, or a fork of it (`Point.forked`), would go on.
        config: what that would go on with.

    Raises:
        UserError: it cannot be used, or is something else.
    """
    if not at.moved(config):
        return
    from dpo_kit import prepare  # loads transformers and torch: not for a start on the same places

    if problem := resuming.refusal(run_dir, at, config, prepare.content(config)):
        raise UserError(problem if at.is_fork else _of_trial(run_dir, problem))


def _of_trial(run_dir: Path, problem: str) -> str:
    return f"trial_name = {run_dir.name!r}: {problem}"


def _settled(config: Config, run: Run) -> tuple[bool, str]:
    """Whether a trial is done, else it may go on or start anew; and what to say of that. Changes nothing.

    Raises:
        UserError: it is live, it may not go on with this configuration, or `recover.mode` does not allow to go on.
    """
    status = run.status
    if run.is_live:
        supervisor, stop = status.get("supervisor") or {}, manifest.command("stop", run.dir)
        problem = (
            f"{run.name} is {status['state']}, by process {supervisor.get('pid')} on {supervisor.get('host')}; stop it"
            f" ({stop}) or use another trial_name"
        )
    elif config.recover.mode != "auto":
        ways = ["use another trial_name"]
        if status["state"] == "done" or not runs.resume_problem(run):
            ways.append(f"`{manifest.continue_command(run.dir)}`")
        if not _going_on(config, run, status)[1]:
            ways.append("recover.mode=auto")
        problem = f"{run.name} exists and is {status['state']}; {', or '.join(ways)}"
    else:
        is_done, problem, note = _going_on(config, run, status)
        if not problem:
            return is_done, note
    raise UserError(_of_trial(run.dir, problem))


def _going_on(config: Config, run: Run, status: dict[str, Any]) -> tuple[bool, str, str]:
    """Whether a trial that has ended is done with this configuration, why it may not go on with it, and what to say."""
    differing = _differences(config, run.config)
    told, done_at = identity.told(differing), f"{run.name} is done at step {status.get('step')}"
    if status["state"] == "done" and not differing:
        return True, "", f"{done_at}: skipped"
    is_longer = set(differing) <= set(identity.LENGTH)
    if status["state"] != "done" or (is_longer and run.checkpoints()):
        at = resuming.point(run.dir)
        problem = resuming.refusal(run.dir, at, config) if at else resuming.lost(run.dir, [])
        note = f"{run.name} was {status['state']}; its configuration changes: {told}" if told else ""
        return False, problem, f"{done_at}; going on: {told}" if status["state"] == "done" else note
    only = "; it kept no checkpoint to go on from (recover.keep=all keeps them)" if is_longer else ""
    fork = resuming.fork_command(run.dir, config, list(differing))
    ways = "use another trial_name" + (f", or fork it: {fork}" if fork else "")
    return False, f"{run.name} is done with another configuration ({told}){only}; {ways}", ""


def _differences(config: Config, other: Config) -> dict[str, str]:
    """Keys in which two configurations mean different runs, with both values."""
    found = identity.differences(config_module.to_tree(other), config_module.to_tree(config))
    # Micro-batches do not change a step: a run that halved them is the same run.
    same = ("trial_name", "recover", "max_tokens_per_mb")
    return {
        key: text for key, text in found.items() if not key.startswith(same[:2]) and not key.endswith(same[2])
    }


def _say(text: str) -> None:
    print(text, flush=True)
