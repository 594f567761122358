"""What a run has measured: `metrics.jsonl`, one line a step, and `evaluations/step-N.jsonl`.

Lines are appended whole; a torn last line (a full disk, a kill) is skipped by the reader and cut by the next writer.
Not here: what the numbers mean (`metrics`), the run folder's other files (`records`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError
from dpo_kit.files import atomic_write, to_json, told

METRICS = "metrics.jsonl"
_STEP = re.compile(r"step-(\d+)\.jsonl")


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """Adds one line to `metrics.jsonl`; NaN and infinities become null. A torn last line is cut first."""
    line = to_json(record).encode("utf-8") + b"\n"
    path = Path(run_dir) / METRICS
    try:
        with open(path, "ab+") as file:
            _cut_torn_tail(file)
            file.write(line)
    except OSError as error:
        raise told(error, path) from None


def sync_metrics(run_dir: Path) -> None:
    """Flushes the lines so far to the disk: a checkpoint must not outlive the numbers that led to it."""
    path = Path(run_dir) / METRICS
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _cut_torn_tail(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def cut_records(run_dir: Path, step: int, *, owes_evaluation: bool = False) -> list[str]:
    """Removes metrics and evaluations of later steps than `step`, and a torn last line; all of them before a start.

    Lines that cannot be read are left out, the file they stood in is kept as `metrics.jsonl.damaged`.

    Args:
        run_dir: the run folder.
        step: of the checkpoint from which the run goes on.
        owes_evaluation: the evaluation of `step` itself is to come; what there is of it goes, too.

    Returns:
        One line on each thing that is wrong with what stays.
    """
    path = Path(run_dir) / METRICS
    records, wrong = _read(path)
    notes = []
    if wrong and step:
        atomic_write(path.with_name(f"{METRICS}.damaged"), path.read_bytes())
        notes.append(f"{wrong[0]} and so are {len(wrong) - 1} more" if len(wrong) > 1 else wrong[0])
        notes[0] += f"; the run goes on without, the file is kept as {METRICS}.damaged"

    def stays(record: dict[str, Any]) -> bool:
        at = record["step"]
        return bool(step) and (at < step or (at == step and not (owes_evaluation and _is_evaluation(record))))

    kept = [record for record in records if stays(record)]
    text = "".join(to_json(record) + "\n" for record in kept)
    if path.exists() and path.read_bytes() != text.encode("utf-8"):
        atomic_write(path, text)
    for file in (Path(run_dir) / "evaluations").glob("step-*.jsonl"):
        if (number := _STEP.fullmatch(file.name)) and int(number[1]) > step:
            file.unlink()
    missing = sorted({*range(1, step + 1)} - {r["step"] for r in kept if not _is_evaluation(r)})
    if missing:
        notes.append(
            f"{METRICS} has no line of {len(missing)} of the {step} steps, the first of them {missing[0]}"
        )
    return notes


def _is_evaluation(record: dict[str, Any]) -> bool:
    return any(name.startswith("dpo-eval/") for name in record)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order; a last line without its end is not there yet.

    Raises:
        UserError: a line before the last is no record.
    """
    records, wrong = _read(Path(run_dir) / METRICS)
    if wrong:
        raise UserError(f"{wrong[0]}; it was changed outside the kit: remove that line")
    return records


def readable_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` that can be read; damage there is no reason to lose anything else."""
    return _read(Path(run_dir) / METRICS)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file, and which lines are none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    records, wrong = [], []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            wrong.append(f"{path} line {number} is not JSON")
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            wrong.append(f"{path} line {number} is no record with a step")
    return records, wrong
