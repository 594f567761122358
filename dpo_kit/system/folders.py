"""Folders that are whole or not there: written beside, flushed, renamed; verified before anything reads them. No torch.

    exports/best/                  whole
    exports/.best-1f0c83ab.part    being written, or being removed
    exports/.best-9b02d7e4.old     what a new `best/` takes the place of, between two renames

A rename makes a folder and a rename unmakes it, so that a process killed at any moment leaves either; what else it
left, `sweep` clears away. A sealed folder (a checkpoint) also holds COMMIT.json, which names every other file with its
size and sha256 and whose last line is the sha256 of the lines before: flipped bits, cut and missing files are found.

Not here: which folders are checkpoints, how many stay (records/checkpoint_folders), what is in one (engine/checkpoint).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from dpo_kit.system.files import sha256

COMMIT = "COMMIT.json"
_ABANDONED_S = 3600.0
# The last two are what versions before this one left.
_LEFT = (".{}-*.part", ".{}-*.old", ".tmp-{}-*", ".trash-{}-*")


# --- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(
    folder: Path,
    if_there: Literal["replace", "keep", "refuse"],
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> Iterator[Path]:
    """An empty folder to write into, which then becomes `folder`, flushed to the disk; nothing is left when that fails.

    Args:
        folder: its name from then on; the parents are made.
        if_there: whether an older one of that name is replaced, kept when it is whole, or a reason to fail.
        is_whole: of an older one that would be kept.

    Raises:
        OSError: it cannot be written, or (`refuse`) there is something of that name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name, abandoned=True)
    part, old = _beside(folder, "part"), _beside(folder, "old")
    try:
        part.mkdir()
        yield part
        for path in (part, *part.rglob("*")):
            _flush(path)
        while not _renamed(part, folder):
            if if_there == "refuse":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
            if if_there == "keep" and is_whole(folder):
                break
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another writer is at it, too
                folder.rename(old)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)


def _renamed(part: Path, folder: Path) -> bool:
    """Whether nothing was in the way but an empty folder."""
    try:
        part.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}-{os.urandom(4).hex()}.{kind}")


def _flush(path: Path) -> None:
    """Flushes a file, or a folder's own entries, so that it survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(part: Path, files: dict[str, dict[str, Any]]) -> None:
    """Adds `COMMIT.json` to a folder that is being written.

    Args:
        part: from `staged`, with everything in it.
        files: size and sha256 of each of its files, from `hashes`.
    """
    text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
    (part / COMMIT).write_bytes(_commit_text(text))


def _commit_text(text: str) -> bytes:
    return (text + hashlib.sha256(text.encode()).hexdigest() + "\n").encode()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of some files of a folder, read from the disk."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def file_names(folder: Path) -> list[str]:
    """Every file below a folder but `COMMIT.json`, as relative names in order."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path != folder / COMMIT
    )


# --- removing ---------------------------------------------------------------------------------------------------


def discard(folder: Path) -> None:
    """Removes a folder: first its name, so that nobody finds half of one."""
    part = _beside(folder, "part")
    with contextlib.suppress(FileNotFoundError):  # somebody else removed it meanwhile
        folder.rename(part)
    shutil.rmtree(part, ignore_errors=True)


def sweep(parent: Path, name: str | None = None, *, abandoned: bool = False) -> None:
    """Clears away what killed writers left; an old folder gets its name back when that is free.

    Args:
        parent: where they wrote.
        name: of the folder that they wrote; any when left out.
        abandoned: leave alone what may be at work; without it nobody else may be writing there.
    """
    for old in parent.glob(_LEFT[1].format(_pattern(name))):
        if _is_only_copy(old):
            old.rename(_original(old))
    for path in leftovers(parent, name):
        if not abandoned or is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """What killed writers left and nobody needs."""
    found = [path for pattern in _LEFT for path in parent.glob(pattern.format(_pattern(name)))]
    return sorted(path for path in found if not _is_only_copy(path))


def _pattern(name: str | None) -> str:
    return "*" if name is None else glob.escape(name)


def _is_only_copy(path: Path) -> bool:
    """Whether the writer was killed between two renames."""
    return path.suffix == ".old" and not _original(path).exists()


def _original(old: Path) -> Path:
    """The folder that `.NAME-TOKEN.old` was."""
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
