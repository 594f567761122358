"""Starting a run's supervisor, for the first time or again: what of an ended run stays, what is set aside.

Deliberately not here: what is decided (records/resuming), the handle (runs), new runs (launch), what a supervisor does
(supervise/supervisor).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import UserError
from dpo_kit.records import lock, manifest, resuming, run_folder, status
from dpo_kit.records.facts import read_facts
from dpo_kit.records.resuming import Decision
from dpo_kit.supervise import fits
from dpo_kit.supervise.owner import is_headless, owners
from dpo_kit.system import machine
from dpo_kit.system.files import atomic_write, last_line
from dpo_kit.system.processes import child_variables

_supervisors: dict[int, subprocess.Popen] = {}  # kept so that Python does not warn about running children


def resume(run_dir: Path, check: Callable[[Config], object] = fits.check) -> Decision:
    """Queues an ended run again with its own settings, and says from where; one that is done or live is left alone.

    Args:
        run_dir: the run folder.
        check: refuses what cannot run here; not asked where all steps are done.

    Raises:
        UserError: it cannot go on; nothing of it was changed.
    """
    run = read_facts(run_dir)
    found = resuming.decide(run, devices=machine.visible_devices())
    if found.act == "refuse":
        raise UserError(found.told)
    if found.act in ("attach", "skip"):
        return found
    if found.act != "finish" and run.config:
        check(run.config)
    return begin(run_dir)


def begin(run_dir: Path, config: Config | None = None, made: dict[str, Any] | None = None) -> Decision:
    """Does what is decided of an ended run: queues it again, and sets aside what it had made where it starts anew.

    Args:
        run_dir: the run folder.
        config: the configuration to go on with; its own when left out.
        made: the manifest that goes with it.

    Raises:
        UserError: it may not, or somebody else is about to run it; nothing was changed.
    """
    clean_up(run_dir)  # before the lock, which a full disk has no room for
    with lock.lock(run_dir):
        run = read_facts(run_dir)
        found, before = resuming.decide(run, config), run.status
        if found.act == "attach":
            show = manifest.command("show", run_dir)
            raise UserError(f"{run.name} is being started by another process; see `{show}`")
        if found.act == "refuse":
            raise UserError(found.told)
        if found.act == "skip":
            return found
        aside = run_folder.clear(run_dir) if found.act == "start anew" else ""
        run_folder.clear_requests(run_dir)
        # First the status: with another configuration the model that is there is not what was asked for.
        fields: dict[str, Any] = {"attempt": int(before.get("attempt") or 1) + 1, "step": found.step}
        if found.act == "finish":
            fields |= {"trained": True, "total_steps": before.get("total_steps")}
        status.reset_status(run_dir, **fields)
        if config is not None:
            goes_on = ("parent", "repeats", "data", "weights") if found.act != "start anew" else ()
            atomic_write(run_dir / "config.yaml", config_module.to_yaml(config))
            manifest.renew(run_dir, made or {}, keep=goes_on)
    how = {
        "finish": "is trained; what is left is done now",
        "go on": f"goes on from its last checkpoint, step-{found.step}",
    }.get(found.act, "has no checkpoint and starts anew")
    lost = f" ({status.steps_text(before)} steps): {aside}" if aside else ""
    print(f"{run.name} {how}{lost}", flush=True)
    return found


def clean_up(run_dir: Path) -> None:
    """Clears away what a killed run left half-written; it may be what fills the disk."""
    with lock.unowned(run_dir) as is_free:
        if is_free and not status.is_live(status.read_status(run_dir)):
            run_folder.sweep(run_dir)


def start_supervisor(run_dir: Path, owner: str | None = None) -> subprocess.Popen:
    """Starts a detached supervisor for a queued run; returns at once.

    Args:
        run_dir: of the run.
        owner: `interactive`, `headless` or `detached`; None finds out.
    """
    kind = owner or ("headless" if is_headless() else "interactive")
    owned_by = owners() if kind == "headless" else []
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
    cause = f": {said}" if said else ""
    return f"its supervisor ended with status {code}{cause} (logs/supervisor.log)"


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
