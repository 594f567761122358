"""The kinds of failure that have a remedy, and the exit statuses that tell them apart.

A `UserError` is a user's mistake: its text is the whole story, the command line prints it without a
traceback and exits with status 2. A `RunError` is a run that did not end `done`.

Deliberately not here: invariants of our own code, which are plain `assert`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from dpo_kit.redaction import redact


class ExitStatus(IntEnum):
    """How a process of the kit ended: the command line, a supervisor, a rank, what prepares and what samples."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2  # the user's
    STOPPED = 3  # or preempted: as asked, with the state saved
    OUT_OF_MEMORY = 4  # a rank alone

    @classmethod
    def of(cls, state: str) -> ExitStatus:
        """Of a run that ended in a state."""
        return {"done": cls.DONE, "stopped": cls.STOPPED, "preempted": cls.STOPPED}.get(state, cls.FAILED)


class UserError(ValueError):
    """A mistake in what the user gave: names the thing, what is allowed and the remedy; shows no secret."""

    def __init__(self, message: str):
        super().__init__(redact(message))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the message is the whole story, the stack is ours and not the user's."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError):
    """Everything that is wrong with one configuration, one problem a line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = [redact(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Preference data that cannot be used as it is; names file, line and column."""


class RunError(RuntimeError):
    """A run that ended in another state than `done`."""

    def __init__(self, message: str, *, run_dir: Path | None = None, state: str = "failed"):
        super().__init__(message)
        self.run_dir = run_dir
        self.state = state

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: why the run ended, not where it was waited for."""
        return [f"{type(self).__name__}: {self}"]
