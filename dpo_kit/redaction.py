"""Keeps secrets out of whatever a run writes or says.

A secret is the value of an environment variable whose name says so (`HF_TOKEN`, `WANDB_API_KEY`,
`AWS_SECRET_ACCESS_KEY`), or text that looks like one wherever it is from: a token with a known prefix, a password
inside a URL.

Known limits: what C++ code writes to a log itself, secrets of fewer than 8 characters, plain words, and data: a row
that holds a token is data, and its text is shown. The notebook that papermill writes holds the parameters as given.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

SHOWN = "[redacted]"
_MIN_LENGTH, _LONG = 8, 20
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|(API|ACCESS|PRIVATE|SECRET)_KEY)$", re.IGNORECASE
)
_PREFIXED = re.compile(
    r"\b(hf_[A-Za-z0-9]{34,}|sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{40,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def redact(text: str) -> str:
    """`text` with `[redacted]` in place of every secret."""
    for _, value in _environment():
        if value in text:
            text = _whole(value).sub(SHOWN, text)
    return _URL_PASSWORD.sub(SHOWN, _PREFIXED.sub(SHOWN, text))


def found_in(text: str) -> str | None:
    """Which secret a text holds, in words that do not show it; None for none."""
    name = next(
        (name for name, value in _environment() if value in text and _whole(value).search(text)), None
    )
    if name:
        return f"what the environment variable {name} holds"
    if _PREFIXED.search(text):
        return "what looks like an access token"
    return "a password inside a URL" if _URL_PASSWORD.search(text) else None


def _environment() -> Iterator[tuple[str, str]]:
    """Name and value of the variables that hold a secret, and neither a path nor a plain word."""
    for name, value in os.environ.items():
        if len(value) < _MIN_LENGTH or not _SECRET_NAME.search(name) or os.path.exists(value):
            continue
        is_word = not re.search(r"\d", value) or not re.search(r"[A-Za-z]", value)
        if len(value) >= _LONG or not is_word:
            yield name, value


def _whole(value: str) -> re.Pattern[str]:
    """The value where it is no part of a longer word."""
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])")


class _Filtered:
    """A text stream whose text goes through functions first, write by write."""

    def __init__(self, stream: TextIO, *filters: Callable[[str], str]):
        self._stream, self._filters = stream, filters

    def write(self, text: str) -> int:
        size = len(text)
        for function in self._filters:
            text = function(text)
        self._stream.write(text)
        return size

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output(*filters: Callable[[str], str]) -> None:
    """From here on, what this process prints (its log) shows no secret, and goes through `filters`."""
    streams = [_Filtered(stream, redact, *filters) for stream in (sys.stdout, sys.stderr)]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]


@contextlib.contextmanager
def guarded_output(*filters: Callable[[str], str]) -> Iterator[None]:
    """`guard_output` for a while."""
    before = sys.stdout, sys.stderr
    guard_output(*filters)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
