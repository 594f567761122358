"""Folders that are whole or not there: written beside, hashed, renamed; verified before anything reads them. No torch.

    checkpoints/.tmp-step-8-4711/      being written by process 4711
    checkpoints/step-8/                whole: COMMIT.json names every other file with its size and sha256,
                                       and its last line is the sha256 of the lines before
    checkpoints/.trash-step-4-4711/    being removed

A rename makes a folder and a rename unmakes it, so that a process killed at any moment leaves either. Flipped
bits, cut and missing files are found by hash. Exports (`model/`, `exports/`) are for others and have no
`COMMIT.json`; they too are written beside and renamed in (`replaced`).

Not here: which folders are checkpoints and how many stay (records/checkpoints), what is in one (engine/checkpoint).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

COMMIT = "COMMIT.json"
_ABANDONED_S = 3600.0


# --- writing ----------------------------------------------------------------------------------------------------


def stage(folder: Path) -> Path:
    """An empty folder beside `folder` to write into; what killed writers left there is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    made = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    made.mkdir()
    return made


def seal(staged: Path, folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Turns a staged folder into `folder`, which a damaged one of that name makes room for.

    Args:
        staged: from `stage`, everything written and flushed.
        folder: its name from now on.
        files: size and sha256 of each of its files, from `hashes`.
    """
    text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
    with open(staged / COMMIT, "w", encoding="utf-8") as file:
        file.write(_commit_text(text).decode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folders(staged)
    if folder.exists():
        folder.rename(_trash(folder))
    staged.rename(folder)
    sync_folder(folder.parent)
    remove_leftovers(folder.parent)


def _commit_text(text: str) -> bytes:
    return (text + hashlib.sha256(text.encode()).hexdigest() + "\n").encode()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of some files of a folder, read from the disk."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            found[name] = {
                "size": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return found


def file_names(folder: Path) -> list[str]:
    """Every file below a folder but `COMMIT.json`, as relative names in order."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path != folder / COMMIT
    )


def _sync_folders(top: Path) -> None:
    """`sync_folder` of a folder and all below it."""
    for inner in {top, *(path.parent for path in top.rglob("*"))}:
        sync_folder(inner)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's own entries, so that renames in it survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of `folder`, flushed to the disk.

    Between two renames the old folder has another name; `mend` finds it after a kill just then.
    """
    part = folder.with_name(f".{folder.name}-{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _sync_folders(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}-{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def mend(parent: Path) -> None:
    """Clears away what killed writers of `replaced` left; an old folder gets its name back when that is free."""
    for old in parent.glob(".*.old"):
        if original(old).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(original(old))
    for part in parent.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def original(old: Path) -> Path:
    """The folder that `.NAME-PID.old` was."""
    return old.with_name(old.name[1:].rpartition("-")[0])


def is_abandoned(part: Path) -> bool:
    """Whether nobody has written to an unfinished folder for an hour."""
    try:
        return time.time() - max(path.stat().st_mtime for path in (part, *part.rglob("*"))) > _ABANDONED_S
    except FileNotFoundError:  # it was finished just now
        return False


# --- reading ----------------------------------------------------------------------------------------------------


def committed(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """What `COMMIT.json` says of the files, and what is wrong with it or with their sizes; quick.

    Files that it does not name (a file browser's) are nobody's concern: nothing reads them.
    """
    try:
        text, _, _ = (folder / COMMIT).read_text("utf-8").removesuffix("\n").rpartition("\n")
        if (folder / COMMIT).read_bytes() != _commit_text(text + "\n"):
            return {}, f"{COMMIT} does not match its last line"
        marks = json.loads(text)["files"]
        files = {name: {"size": mark["size"], "sha256": mark["sha256"]} for name, mark in marks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{COMMIT} cannot be read ({type(error).__name__})"
    for name, mark in files.items():
        path = folder / name
        if not path.is_file():
            return files, f"{name} is missing"
        if path.stat().st_size != mark["size"]:
            return files, f"{name} has {path.stat().st_size} bytes instead of {mark['size']}"
    return files, ""


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint, in words; empty when every byte is as it was written.

    Args:
        folder: `checkpoints/step-N`.
        part: ranks share the reading: this one's files, of `parts`.
    """
    files, problem = committed(folder)
    if problem:
        return problem
    for name in sorted(files)[part::parts]:
        try:
            if hashes(folder, [name])[name]["sha256"] != files[name]["sha256"]:
                return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def discard(folder: Path) -> None:
    """Removes a checkpoint: first its name, so that nobody finds half of one."""
    trash = _trash(folder)
    with contextlib.suppress(FileNotFoundError):  # somebody else removed it meanwhile
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what killed writers left. Only the process that owns the run may call it."""
    for path in leftovers(checkpoints):
        shutil.rmtree(path, ignore_errors=True)


def leftovers(checkpoints: Path) -> list[Path]:
    """What `sweep` removes."""
    return [*checkpoints.glob(".tmp-*"), *checkpoints.glob(".trash-*")]


def _trash(folder: Path) -> Path:
    free = folder.parent / f".trash-{folder.name}-{os.getpid()}"
    shutil.rmtree(free, ignore_errors=True)
    return free
