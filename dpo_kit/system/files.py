"""Small files written as a whole, their hashes, and strict JSON.

Deliberately not here: what a file means (records), large stores (preferences), whole folders (`folders`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError


def atomic_write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces `path` as a whole; a reader sees the old or the new file.

    Args:
        path: the file; its folder must exist.
        content: text (UTF-8) or bytes.
        durable: flush to the disk first, so that the file also survives a loss of power.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise os_error_text(error, path) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def os_error_text(error: OSError, path: Path) -> OSError:
    """The same error with the file it is about, and what is free there when that is the matter."""
    words = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        words += f" ({shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free)"
    return OSError(error.errno, words, str(path))


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, paths and other strangers their text."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        return _finite(value.item())
    return value


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file, or `default` when there is none.

    Raises:
        UserError: the file is not JSON, or holds no object although the default is one.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return default
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}); the file was changed or cut outside the kit: put it back, or remove it"
        ) from None
    if isinstance(default, dict) and not isinstance(content, dict):
        what = "the file was changed outside the kit: put it back, or remove it"
        raise UserError(f"{path} holds no JSON object; {what}")
    return content


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(cache: Path | None, key: str, make: Callable[[], Any]) -> Any:
    """A JSON value that is made once: a file remembers it, where there is a folder for it that can be written.

    Args:
        cache: a JSON object, for all processes.
        key: everything that the value depends on.
        make: makes the value, which is not None; what it raises is not remembered.
    """
    if (value := _held(cache).get(key)) is None:
        value = make()
        if cache:  # read again: making it may have taken minutes, in which others have added theirs
            with contextlib.suppress(OSError):
                atomic_write(cache, json.dumps({**_held(cache), key: value}, indent=1))
    return value


def _held(cache: Path | None) -> dict[str, Any]:
    """What a file remembers; nothing where it is damaged, for it is made again."""
    with contextlib.suppress(UserError, OSError):
        return read_json(cache, {}) if cache else {}
    return {}


def tail(file: Path, most_bytes: int) -> bytes:
    """The end of a file; empty where there is none."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - most_bytes))
            return opened.read()
    except FileNotFoundError:
        return b""


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, cut to 300 characters."""
    lines = tail(log, 8192).decode("utf-8", "replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
