"""Where a run is, in words: elapsed and expected seconds of each phase, plain lines, the share done.

Expected seconds come from the work itself when it counts what it does, else from records/durations.

Deliberately not here: notebook displays (`live`), waiting (runs, supervise).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_kit.records import findings, metrics
from dpo_kit.records.findings import Finding

FIRST_LINE_S = 1.5
SILENT_S = 4.0  # with the time a line takes to come, nothing is silent for over 5 s
# Until the pairs are built, what lies there is an earlier attempt's.
BEFORE_FINDINGS = (None, "find nodes", "convert model", "build pairs")


def timing(status: dict[str, Any], now: float | None = None) -> tuple[float, float | None, str]:
    """Elapsed and expected seconds of the phase in hand, and where the expectation is from.

    Args:
        status: of a run (`Run.status`).
        now: seconds since the epoch; the clock by default.

    Returns:
        `(elapsed_s, expected_s, source)`; source is `"count"`, `"earlier run"`, `"guess"` or `""`.
        `training` counts its turns before an evaluation, too.
    """
    now = time.time() if now is None else now
    name = status.get("phase")
    if not name:
        return max(0.0, now - float(status.get("created_at") or now)), None, ""
    turn_s = max(0.0, now - float(status.get("phase_started_at") or now))
    before_s = 0.0
    if name == "training":
        before_s = sum(p["seconds"] for p in status.get("phases", []) if p["name"] == "training")
    done, total = status.get("phase_done") or 0, status.get("phase_total")
    here = done - (status.get("phase_started_done") or 0)
    # Before the first units are through, a rate is noise.
    if total and here > 0 and turn_s > 0.5:
        return before_s + turn_s, before_s + turn_s * (1 + (total - done) / here), "count"
    expected = status.get("phase_expected_s")
    return before_s + turn_s, expected, status.get("phase_expected_from") or "" if expected else ""


def share_done(status: dict[str, Any], now: float | None = None) -> float:
    """How much of the phase in hand is done, 0 to 1."""
    if status.get("state") == "done":
        return 1.0
    done, total = status.get("phase_done") or 0, status.get("phase_total")
    if total:
        return min(1.0, done / total)
    elapsed, expected, _ = timing(status, now)
    return min(0.99, elapsed / expected) if expected else 0.0


# ---------------------------------------------------------------- plain lines


def describe(status: dict[str, Any], now: float | None = None) -> str:
    """One line: `reference pass: 120/400, 14 s of about 47 s`."""
    state = status.get("state", "unknown")
    if state not in ("queued", "running"):
        took = float(status.get("ended_at") or 0) - float(status.get("started_at") or 0)
        after = f" after {took:.0f} s" if status.get("ended_at") and status.get("started_at") else ""
        return state + after + (f": {status['message']}" if status.get("message") else "")
    elapsed, expected, source = timing(status, now)
    name = status.get("phase") or "starting the supervisor"
    count = ""
    if status.get("phase_total"):
        unit = "step " if name in ("training", "first step") else ""
        count = f"{unit}{status.get('phase_done') or 0}/{status['phase_total']}, "
    about = ""
    if expected is not None:
        guess = ", a guess" if source == "guess" else ""
        about = f" of about {expected:.0f} s{guess}"
        if elapsed > expected:
            about = f", longer than the expected {expected:.0f} s{guess}"
    return f"{name}: {count}{elapsed:.0f} s{about}"


class Lines:
    """Prints a run's progress as plain lines: each phase, each tenth of the steps, something every 4 s.

    Call `update` a few times a second. Nothing is drawn over, so that the lines survive in a log, in a
    headless notebook and under nbval.
    """

    def __init__(self, run_dir: Path, write: Callable[[str], None] | None = None):
        self.run_dir = run_dir
        self.write = write or _print
        self.started = time.monotonic()
        self.last_at: float | None = None
        self.phase: str | None = None
        self.tenth = 0
        self.told = ""
        self.seconds: dict[str, float] = {}
        self.found: set[Finding] = set()

    def update(self, status: dict[str, Any]) -> None:
        """Prints what is due."""
        if status.get("state") not in ("queued", "running"):
            return
        message = status.get("message") or ""
        if message and message != self.told:  # the supervisor has something to say: ranks start again
            self.told = message
            self.write(message)
        now = time.monotonic()
        # Saving takes turns with training: a line a step would bury what matters.
        saving = status.get("phase") == "checkpoint" and self.phase is not None
        changed = status.get("phase") != self.phase and not saving
        if changed:
            self._phases_done(status)
            if status.get("phase") not in BEFORE_FINDINGS:
                self._tell_findings()
            self.phase, self.tenth = status.get("phase"), _tenth(status)
        tenth = _tenth(status)
        reached = self.phase == "training" and not saving and tenth > self.tenth
        due = now - self.last_at > SILENT_S if self.last_at else now - self.started > FIRST_LINE_S
        if (changed and self.phase) or reached or due:
            self.tenth = self.tenth if saving else tenth
            self.last_at = now
            is_training = status.get("phase") == "training"
            self.write(describe(status) + (_figures(self.run_dir) if is_training else ""))

    def finish(self, status: dict[str, Any]) -> None:
        """Prints how the run ended."""
        self._phases_done(status, ended=True)
        self.write(describe(status))

    def _tell_findings(self) -> None:
        for finding in findings.read(self.run_dir):
            if finding not in self.found:
                self.found.add(finding)
                self.write(str(finding))

    def _phases_done(self, status: dict[str, Any], *, ended: bool = False) -> None:
        for phase in status.get("phases", []):
            if phase["name"] == "checkpoint" and not ended:
                continue
            spent = phase["seconds"] - self.seconds.get(phase["name"], 0.0)
            if spent > 0:
                self.write(f"{phase['name']}: done in {spent:.1f} s")
            self.seconds[phase["name"]] = phase["seconds"]


def _tenth(status: dict[str, Any]) -> int:
    total = status.get("phase_total")
    return int(10 * (status.get("phase_done") or 0) / total) if total else 0


def _figures(run_dir: Path) -> str:
    """Loss and accuracy of the last training step on record."""
    record = metrics.last_record(run_dir)
    if not record or record.get("dpo/loss") is None:
        return ""
    accuracy = record.get("dpo/reward_accuracy")
    told = "" if accuracy is None else f", reward accuracy {100 * accuracy:.0f} %"
    return f"; step {record['step']}: loss {record['dpo/loss']:.4f}{told}"


def last_figures(run_dir: Path) -> str:
    """The last training record and the last evaluation of a run in words; empty before the first step."""
    told = _figures(run_dir).removeprefix("; ")
    held_out = metrics.last_record(run_dir, "dpo-eval/loss")
    if held_out is not None and held_out["dpo-eval/loss"] is not None:
        told += f"; held-out pairs at step {held_out['step']}: loss {held_out['dpo-eval/loss']:.4f}"
        if (accuracy := held_out.get("dpo-eval/reward_accuracy")) is not None:
            told += f", reward accuracy {100 * accuracy:.0f} %"
    return told


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read has gone (`dpo-kit train | head`): no reason to lose a run. The rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
