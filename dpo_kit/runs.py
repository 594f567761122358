"""The handle of a run: its state, its records, waiting, stopping, starting it again; lists of runs.

    run = runs.open("runs/demo/2026-11-22_15-30-05-brave-otter")
    run.state, run.status["step"]; run.metrics(); run.wait(); run.stop()

A handle holds a folder and no process: any process that sees the folder has the same run.

Deliberately not here: starting new runs (launch), charts (plots), what the records mean (view/analysis).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import RunError, UserError
from dpo_kit.records import lock, manifest, resuming, run_folder
from dpo_kit.records.checkpoint_folders import steps
from dpo_kit.records.facts import read_facts
from dpo_kit.records.metrics import read_metrics
from dpo_kit.records.status import ENDED, effective, read_status, request_stop, steps_text
from dpo_kit.supervise import owner, start
from dpo_kit.system.machine import size_of, size_text
from dpo_kit.view import progress
from dpo_kit.view.html import table

if TYPE_CHECKING:
    import pandas as pd


_POLL_S = 0.25
# From the last rank's end until the supervisor has written the state.
_STOP_SLACK_S = 15.0


class Run:
    """One run folder. Every property reads the disk, so that it is never stale."""

    def __init__(self, folder: Path):
        self.dir = folder
        self._supervisor: subprocess.Popen | None = None

    def __repr__(self) -> str:
        return f"Run({self.name}: {progress.describe(self.status)})"

    def _repr_html_(self) -> str:
        status = self.status
        rows = [["state", progress.describe(status)], ["step", steps_text(status)], ["folder", str(self.dir)]]
        if status.get("samples"):
            rows.append(["samples", status["samples"]])
        return table(["run", self.name], rows)._repr_html_()

    @property
    def name(self) -> str:
        """`experiment/trial`."""
        return run_folder.run_name(self.dir)

    @property
    def status(self) -> dict[str, Any]:
        """What `status.json` says now; a run whose supervisor is gone has failed."""
        status = read_status(self.dir)
        process = self._supervisor
        if status.get("state") == "queued" and process is not None and process.poll() is not None:
            status = read_status(self.dir)
            if status.get("state") == "queued":
                message = start.supervisor_words(self.dir, process.returncode)
                return {**status, "state": "failed", "message": message}
        return effective(status)

    @property
    def state(self) -> str:
        """queued | running | stopped | preempted | failed | done."""
        return self.status.get("state", "unknown")

    @property
    def is_live(self) -> bool:
        """True while a supervisor works on it."""
        return self.state not in ENDED

    @property
    def config(self) -> Config:
        """The resolved configuration of the run."""
        return config_module.load(self.dir / "config.yaml")

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that there are, in order; whether they are whole is seen when one is loaded."""
        return steps(self.dir / "checkpoints")

    def metrics(self) -> pd.DataFrame:
        """`metrics.jsonl` as a table: one row a line (training steps and evaluations), one column a name."""
        try:
            import pandas
        except ImportError as error:
            raise UserError('run.metrics() needs pandas; run: pip install "dpo-kit[notebook]"') from error
        return pandas.DataFrame.from_records(read_metrics(self.dir))

    def wait(self, timeout: float | None = None, show: bool = True) -> Run:
        """Waits for the end, showing progress: bar and live chart in a notebook, else plain lines.

        An interrupt leaves an interactive run alone; a headless one, which belongs to this process, is asked
        to save and end as `preempted`.

        Args:
            timeout: seconds; None waits as long as it takes.
            show: whether to show anything.

        Raises:
            RunError: the run did not end `done`; the message holds cause, logs and what to do.
            TimeoutError: it did not end in time; it goes on.
        """
        try:
            status = self._follow(timeout, show)
        except KeyboardInterrupt:
            if _belongs_here(read_status(self.dir)):
                request_stop(self.dir, "preempted")
                print(f"interrupted: {self.name} saves and ends", flush=True)
            elif show:
                print(f"{self.name} goes on; run.wait() shows it again, run.stop() ends it", flush=True)
            raise
        if status.get("state") != "done":
            raise RunError(self.epitaph(), run_dir=self.dir, state=status.get("state", "failed"))
        return self

    def watch(self) -> None:
        """Shows progress until the end and raises nothing: in a notebook beside the cells that follow.

        In a notebook this returns at once (a thread keeps bar and chart up to date, and other cells and
        buttons stay usable); headless it prints lines and returns at the end of the run.
        """
        if owner.in_notebook() and not owner.is_headless():
            view = _view(self)
            view.open()
            threading.Thread(target=self._follow, args=(None, True, view), name="watch", daemon=True).start()
        else:
            self._follow(None, True)

    def stop(self, timeout: float | None = None) -> Run:
        """Asks the run to save and end as `stopped`, and waits for that; one that has ended is left alone.

        Args:
            timeout: seconds; None takes `cluster.grace_s` and some.

        Raises:
            TimeoutError: it did not end in time.
        """
        if not self.is_live:
            return self
        request_stop(self.dir, "stopped")
        limit = self.config.cluster.grace_s + _STOP_SLACK_S if timeout is None else timeout
        self._follow(limit, False)
        return self

    def resume(self) -> Run:
        """Starts the supervisor on this folder again, from the last whole checkpoint; without one it starts anew.

        A run that is done or live is left as it is, and so says.

        Raises:
            UserError: it cannot go on, or does not fit here any more; nothing of it was changed.
        """
        found = start.resume(self.dir)
        if found.act in ("attach", "skip"):
            print(found.told, flush=True)
        else:
            self._supervisor = start.start_supervisor(self.dir)
        return self

    def epitaph(self) -> str:
        """What ended the run, where its logs are, and what may be done now (`resuming.way_on`)."""
        status = self.status
        where = f" at step {steps_text(status)}" if status.get("step") else ""
        lines = [f"{self.name}: {status.get('state')}{where}"]
        if status.get("message"):
            lines[0] += f": {status['message']}"
        if status.get("state") != "done":
            lines += [f"logs: {self.dir / 'logs'}", resuming.way_on(read_facts(self.dir))]
        return "\n".join(lines)

    def _follow(self, timeout: float | None, show: bool, view: Any = None) -> dict[str, Any]:
        """Shows the run until it ends; its last status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        view = view or (_view(self) if show else None)
        status = self.status
        try:
            while status.get("state") not in ENDED:
                if view is not None:
                    view.update(status)
                if deadline is not None and time.monotonic() > deadline:
                    still = progress.describe(status)
                    raise TimeoutError(f"{self.name} is still {still} after {timeout:g} s")
                time.sleep(_POLL_S)
                status = self.status
        finally:
            if view is not None:
                view.close(status)
        if self._supervisor is not None:  # it ends a moment after its last word
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(_STOP_SLACK_S)
        return status


def open(path: str | Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: there is no run.
    """
    folder = Path(path).expanduser().absolute()
    if not (folder / "status.json").is_file():
        ways = "`dpo-kit runs list` shows those there are"
        raise UserError(f"{folder} is no run folder (no status.json); {ways}")
    return Run(folder)


def find(text: str, fileroot: str | Path) -> Run:
    """The run that a path, `experiment/trial`, or a trial's name alone means.

    Raises:
        UserError: none, or several.
    """
    runs = [Run(folder) for folder in run_folder.list_runs(Path(fileroot))]
    named = [run for run in runs if text in (run.name, run.dir.name)]
    exact = [run for run in named if run.name == text]
    if len(exact or named) == 1:
        return (exact or named)[0]
    if named:
        names = ", ".join(run.name for run in named)
        raise UserError(f"{text!r} names {len(named)} runs: {names}; give one of them")
    if (Path(text).expanduser() / "status.json").is_file():
        return open(text)
    listed = shlex.join(["dpo-kit", "runs", "list", "--fileroot", str(fileroot)])
    near = difflib.get_close_matches(text, [name for run in runs for name in (run.name, run.dir.name)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; `{listed}` shows those there are"
    raise UserError(f"{text!r} is no run under {fileroot} and no run folder{hint}")


def remove(run: Run, yes: bool = False) -> bool:
    """Removes a run's folder, when told so; says what it removes and how large that is.

    Returns:
        Whether it was removed.

    Raises:
        UserError: the run is live.
    """
    if run.dir.is_symlink() or not manifest.is_there(run.dir):
        raise UserError(f"{run.dir} is a link, or holds no manifest.json of a run: remove it yourself")
    if run.is_live or lock.lock_owner(run.dir):
        stop = manifest.command("stop", run.dir)
        raise UserError(f"{run.name} is {run.state}; stop it first: {stop}")
    size = size_text(size_of(run.dir))
    if not yes:
        print(f"{run.dir} ({size}) would be removed; add --yes to remove it", flush=True)
        return False
    run_folder.remove_folder(run.dir)
    if run.dir.exists():
        raise UserError(f"{run.dir} cannot be removed; may you write there?")
    print(f"removed {run.dir} ({size})", flush=True)
    return True


def _belongs_here(status: dict[str, Any]) -> bool:
    owner = status.get("owner") or {}
    return owner.get("kind") == "headless" and owner.get("pid") == os.getpid()


class _LinesView:
    """Plain lines with the closing call of a `live.View`."""

    def __init__(self, run: Run):
        self.lines = progress.Lines(run.dir)

    def update(self, status: dict[str, Any]) -> None:
        self.lines.update(status)

    def close(self, status: dict[str, Any]) -> None:
        if status.get("state") in ENDED:
            self.lines.finish(status)


def _view(run: Run) -> Any:
    if owner.in_notebook() and not owner.is_headless():
        from dpo_kit.view import live

        return live.View(run)
    return _LinesView(run)
