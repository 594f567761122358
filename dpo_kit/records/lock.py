"""One owner for a run folder: `lock.json` names the process that runs it.

The lock is a statement about a process, not a held file: it survives a copy of the folder (the copy is
free) and ends with its process, however that one ended.

Deliberately not here: waiting for a lock, locks of caches.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import UserError
from dpo_kit.records.status import is_at_work, read_status
from dpo_kit.system.files import atomic_write, read_json, to_json
from dpo_kit.system.processes import identify

if TYPE_CHECKING:
    from filelock import FileLock


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this process; what a dead process left is taken over.

    Raises:
        UserError: another live process holds it; names that process.
    """
    take_lock(run_dir)
    try:
        yield
    finally:
        release_lock(run_dir)


def take_lock(run_dir: Path) -> None:
    """Writes `lock.json` for this process (see `lock`)."""
    mine = {**identify(), "inode": Path(run_dir).stat().st_ino}
    with _guard(run_dir):
        owner = lock_owner(run_dir)
        if owner is not None and not _is_mine(owner):
            raise UserError(
                f"{run_dir} belongs to process {owner['pid']} on {owner['host']}, which is running it; stop that run"
                f" first (dpo-kit runs stop {shlex.quote(str(run_dir))}) or use another trial_name"
            )
        atomic_write(Path(run_dir) / "lock.json", to_json(mine))


def release_lock(run_dir: Path) -> None:
    """Gives the folder up, when this process holds it."""
    if not Path(run_dir).is_dir():
        return
    with _guard(run_dir):
        owner = lock_owner(run_dir)
        if owner is not None and _is_mine(owner):
            (Path(run_dir) / "lock.json").unlink(missing_ok=True)


def lock_owner(run_dir: Path) -> dict[str, Any] | None:
    """The live process that holds the folder, or None. A copied folder's lock is its original's."""
    try:
        owner = read_json(Path(run_dir) / "lock.json", {})
    except UserError:  # who was killed by a full disk or a loss of power holds nothing
        return None
    if not isinstance(owner.get("pid"), int) or owner.get("inode") != Path(run_dir).stat().st_ino:
        return None
    return owner if is_at_work(owner, read_status(run_dir)) else None


@contextlib.contextmanager
def unowned(run_dir: Path) -> Iterator[bool]:
    """Whether nobody holds the folder; nobody can take it meanwhile. Needs no room on the disk."""
    with _guard(run_dir):
        yield lock_owner(run_dir) is None


def _is_mine(owner: dict[str, Any]) -> bool:
    """Whether it is this process: containers on several machines often share small pids."""
    mine = identify()
    return all(owner.get(key) == mine[key] for key in ("host", "pid", "create_time"))


def _guard(run_dir: Path) -> FileLock:
    """One process at a time looks at the lock and writes it; the system frees it when that one dies."""
    from filelock import FileLock  # a hundredth of a second, for who only looks

    return FileLock(Path(run_dir) / ".lock")
