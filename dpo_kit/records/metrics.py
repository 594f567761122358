"""Every number a run records: names and units, how sums over pairs become them, and their files.

    dpo/loss                                             nats (ipo: squared)
    dpo/chosen_reward  rejected_reward  reward_margin    nats x beta
    dpo/reward_accuracy  logp_accuracy                   share of pairs
    dpo/chosen_logps  rejected_logps                     nats a response
    dpo-eval/...                                         the same of held-out pairs
    lr  grad_norm  step_s                                before clipping; seconds
    tokens_per_second  pairs_per_second                  tokens of the data

The names are the seed's. Values live in `metrics.jsonl`, one line a step, and `evaluations/step-N.jsonl`: lines
are appended whole; a torn last line (a full disk, a kill) is skipped by the reader and cut by the next writer.

Not here: what a run's numbers mean (view/analysis), when they are written (engine/recorder).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError
from dpo_kit.system.files import atomic_write, os_error_text, tail, to_json

# A margin of log-ratios up to this is rounding: float32 sums of one response differ by up to about 2e-5 nats
# between two packings of the same batch, and policy = reference must not be read as a preference.
TIE_NATS = 1e-4

# What one micro-batch adds up, in this order, in one float64 vector: a step crosses the ranks once.
SUMS = (
    "pairs",
    "loss",
    "chosen_reward",
    "rejected_reward",
    "wins",
    "ties",
    "chosen_logps",
    "rejected_logps",
    "logp_wins",
    "data_tokens",
    "run_tokens",
    "stop",
)


def means(sums: Sequence[float], prefix: str) -> dict[str, float | None]:
    """Turns sums over pairs (in the order of `SUMS`) into the recorded means.

    The accuracy is `None` (undefined) when every pair is a tie: before the first update policy and
    reference are equal, and "0 %" would be read as a wrong preference.
    """
    s = dict(zip(SUMS, sums, strict=True))
    n = s["pairs"]
    if n <= 0:
        raise ValueError("means of no pair")
    return {
        f"{prefix}/loss": s["loss"] / n,
        f"{prefix}/chosen_reward": s["chosen_reward"] / n,
        f"{prefix}/rejected_reward": s["rejected_reward"] / n,
        f"{prefix}/reward_accuracy": None if s["ties"] >= n else s["wins"] / n,
        f"{prefix}/reward_margin": (s["chosen_reward"] - s["rejected_reward"]) / n,
        f"{prefix}/chosen_logps": s["chosen_logps"] / n,
        f"{prefix}/rejected_logps": s["rejected_logps"] / n,
        f"{prefix}/logp_accuracy": s["logp_wins"] / n,
    }


METRICS_FILE = "metrics.jsonl"
_STEP = re.compile(r"step-(\d+)\.jsonl")


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """Adds one line to `metrics.jsonl`; NaN and infinities become null. A torn last line is cut first."""
    line = to_json(record).encode("utf-8") + b"\n"
    path = Path(run_dir) / METRICS_FILE
    try:
        with open(path, "ab+") as file:
            _cut_torn_tail(file)
            file.write(line)
    except OSError as error:
        raise os_error_text(error, path) from None


def sync_metrics(run_dir: Path) -> None:
    """Flushes the lines so far to the disk: a checkpoint must not outlive the numbers that led to it."""
    path = Path(run_dir) / METRICS_FILE
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _cut_torn_tail(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) in (b"", b"\n"):
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
    path = Path(run_dir) / METRICS_FILE
    records, wrong = _read(path)
    notes = []
    if wrong and step:
        atomic_write(path.with_name(f"{METRICS_FILE}.damaged"), path.read_bytes())
        notes.append(f"{wrong[0]} and so are {len(wrong) - 1} more" if len(wrong) > 1 else wrong[0])
        notes[0] += f"; the run goes on without, the file is kept as {METRICS_FILE}.damaged"

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
            f"{METRICS_FILE} has no line of {len(missing)} of the {step} steps, the first of them {missing[0]}"
        )
    return notes


def _is_evaluation(record: dict[str, Any]) -> bool:
    return any(name.startswith("dpo-eval/") for name in record)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order; a last line without its end is not there yet.

    Raises:
        UserError: a line before the last is no record.
    """
    records, wrong = _read(Path(run_dir) / METRICS_FILE)
    if wrong:
        raise UserError(f"{wrong[0]}; it was changed outside the kit: remove that line")
    return records


def readable_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` that can be read; damage there is no reason to lose anything else."""
    return _read(Path(run_dir) / METRICS_FILE)[0]


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


def last_record(run_dir: Path, name: str = "dpo/loss") -> dict[str, Any] | None:
    """The last record of a run with this metric (of training by default), read from the end of its metrics."""
    lines = tail(Path(run_dir) / METRICS_FILE, 16384).split(b"\n")[:-1]
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the first one may be cut
            record = json.loads(line)
            if isinstance(record, dict) and {name, "step"} <= record.keys():
                return record
    return None
