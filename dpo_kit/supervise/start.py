"""Starting a run's supervisor, for the first time or again: what of an ended run stays, what is set aside.

Deliberately not here: the handle (runs), new runs (launch), what the supervisor does (supervise/supervisor).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config, differences
from dpo_kit.errors import UserError
from dpo_kit.records import budget, checkpoints, lock, manifest, resuming, run_folder, status
from dpo_kit.supervise import headless
from dpo_kit.system import machine
from dpo_kit.system.files import atomic_write, last_line
from dpo_kit.system.processes import child_variables

_supervisors: dict[int, subprocess.Popen] = {}  # kept so that Python does not warn about running children


def begin_anew(run_dir: Path, config: Config | None = None, made: dict[str, Any] | None = None) -> None:
    """Queues an ended run again; without a checkpoint it starts anew, and what it had made is set aside.

    Args:
        run_dir: of a run that is not live.
        config: the configuration to go on with; its own when left out.
        made: the manifest that goes with it.

    Raises:
        UserError: somebody else is about to run it; nothing was changed.
    """
    clean_up(run_dir)  # before the lock, which a full disk has no room for
    with lock.lock(run_dir):
        before = status.read_status(run_dir)
        if status.is_live(before):
            raise UserError(
                f"{run_folder.run_name(run_dir)} is being started by another process; see"
                f" `{manifest.command('show', run_dir)}`"
            )
        kept = checkpoints.steps(run_dir / "checkpoints")
        is_trained = (
            bool(before.get("trained")) and (run_dir / "model").is_dir() and _is_same(run_dir, config)
        )
        told = ""
        if kept or is_trained:
            run_folder.clear_requests(run_dir)
        else:
            told = run_folder.clear(run_dir)
        # First the status: with another configuration the model that is there is not what was asked for.
        fields: dict[str, Any] = {"attempt": int(before.get("attempt") or 1) + 1}
        if is_trained:
            fields |= {"trained": True, "step": before.get("step"), "total_steps": before.get("total_steps")}
        elif kept:
            fields["step"] = kept[-1]
        status.reset_status(run_dir, **fields)
        if config is not None:
            goes_on = ("parent", "repeats", "data", "weights") if kept or is_trained else ()
            atomic_write(run_dir / "config.yaml", config_module.to_yaml(config))
            manifest.renew(run_dir, made or {}, keep=goes_on)
    if is_trained:
        how = "is trained; what is left is done now"
    elif kept:
        how = f"goes on from its last checkpoint, step-{kept[-1]}"
    else:
        how = "has no checkpoint and starts anew" + (
            f" ({status.steps_text(before)} steps): {told}" if told else ""
        )
    print(f"{run_folder.run_name(run_dir)} {how}", flush=True)


def clean_up(run_dir: Path) -> None:
    """Clears away what a killed run left half-written; it may be what fills the disk."""
    with lock.unowned(run_dir) as is_free:
        if is_free and not status.is_live(status.read_status(run_dir)):
            run_folder.sweep(run_dir)


def resume_problem(run_dir: Path) -> str:
    """Why a run that has ended may not go on with its own settings, and what may be done; empty when it may.

    Raises:
        UserError: a file of it is damaged, or no checkpoint is whole.
    """
    config = config_module.load(run_dir / "config.yaml")
    config_module.check(config)
    budget.read(run_dir)
    at = resuming.point(run_dir)
    if at is not None and at.trained:
        return ""
    problem = resuming.refusal(run_dir, at, config) if at else resuming.lost(run_dir, [])
    if not problem and (
        problem := machine.too_many(int(config.cluster.n_gpus_per_node), machine.visible_devices())
    ):
        others = ("cluster.n_gpus_per_node=auto", "actor.backend=fsdp", "ref.backend=fsdp")
        problem += f"; to go on with others: {manifest.train_command(run_dir, *others)}"
    return problem


def _is_same(run_dir: Path, config: Config | None) -> bool:
    """Whether a configuration means the model that the folder holds: it differs in what follows the training only."""
    if config is None:
        return True
    after = ("evaluator.", "stats_logger.", "recover.", "cluster.", "scheduler.")
    changed = differences.between(
        config_module.to_tree(config_module.load(run_dir / "config.yaml")), config_module.to_tree(config)
    )
    return all(key.startswith(after) for key in changed)


def start_supervisor(run_dir: Path, owner: str | None = None) -> subprocess.Popen:
    """Starts a detached supervisor for a queued run; returns at once.

    Args:
        run_dir: of the run.
        owner: `interactive`, `headless` or `detached`; None finds out.
    """
    kind = owner or ("headless" if headless.is_headless() else "interactive")
    owned_by = headless.owners() if kind == "headless" else []
    mine = owned_by[0] if owned_by else {"pid": None, "create_time": None, "host": None}
    status.update_status(run_dir, owner={"kind": kind, **mine})
    started = spawn_detached(run_dir, owned_by)
    for pid in [pid for pid, process in _supervisors.items() if process.poll() is not None]:
        del _supervisors[pid]
    _supervisors[started.pid] = started
    return started


def supervisor_words(run_dir: Path, code: int) -> str:
    """What a supervisor that ended before its first word has said."""
    said = last_line(run_dir / "logs" / "supervisor.log")
    return (
        f"its supervisor ended with status {code}" + (f": {said}" if said else "") + " (logs/supervisor.log)"
    )


def spawn_detached(
    run_dir: Path, owners: Sequence[dict[str, Any]] = (), *, module: str = "dpo_kit.supervise.supervisor"
) -> subprocess.Popen:
    """Starts a supervisor in a session of its own, which outlives this process; returns at once."""
    command = [sys.executable, "-m", module, str(run_dir)]
    for owner in owners:
        command += ["--owner", f"{owner['pid']}@{owner['create_time']}"]
    with open(run_dir / "logs" / "supervisor.log", "ab") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, **child_variables()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
