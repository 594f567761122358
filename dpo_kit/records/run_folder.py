"""The run folder on disk: create it, name it, clear it for another attempt, list those there are.

    <fileroot>/<experiment>/<trial>/
        config.yaml  manifest.json        written once, when the run is created
        status.json                       the supervisor's word: state, step, phase, owner (records/status)
        progress.json                     where the working process is (rank 0, prepare, samples)
        metrics.jsonl                     one line a step
        budget.json                       tokens of a micro-batch, and every halving (records/budget)
        stop.json                         somebody asks the run to end
        lock.json                         the supervisor that owns the folder (records/lock)
        logs/rank-N.log  logs/rank-N.error.json

Every file but `metrics.jsonl` is replaced as a whole, so a reader never sees half of one; `metrics.jsonl`
grows by whole lines, and a torn last line is skipped by the reader and cut by the next writer.

Deliberately not here: what the numbers mean, starting or ending processes, the `Run` handle (runs).
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dpo_kit.config import name_problem
from dpo_kit.errors import UserError
from dpo_kit.records import manifest as records_manifest
from dpo_kit.records import status
from dpo_kit.system import folders
from dpo_kit.system.files import atomic_write

_ADJECTIVES = "amber bold brave calm clever eager fair gentle keen lively merry quick quiet steady sunny warm"
_ANIMALS = "badger crane falcon finch fox heron lark lynx marten otter owl plover raven robin swift wren"
# Written by a run while it works: set aside or removed when a trial starts anew (see `clear`).
_WORK_FILES = (
    "metrics.jsonl",
    "metrics.jsonl.damaged",
    "progress.json",
    "stop.json",
    "samples.jsonl",
    "data.json",
)
_WORK = (*_WORK_FILES, "logs", "evaluations", "tensorboard", "exports", "model")
# What was trained or measured is set aside there when a trial starts anew, one folder an attempt.
EARLIER = "earlier"
_WORTH_KEEPING = ("metrics.jsonl", "exports", "model")
MADE = (*_WORTH_KEEPING, EARLIER, "checkpoints")  # what would be a loss
_WITH_FOLDERS = ("checkpoints", ".", "exports")  # that are written as a whole
# Given up when the disk is full, so that the last word of a run can still be written.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 * 2**10
# Of the work files, what the ranks do not write, or what tells why an attempt ended.
_KEPT_BETWEEN_ATTEMPTS = ("progress.json", "stop.json", "data.json", "logs")


# ---------------------------------------------------------------- creating and finding run folders


def fresh_trial_name(rng: random.Random | None = None) -> str:
    """A readable name that sorts by time: `2026-11-22_15-30-05-brave-otter`."""
    rng = rng or random.Random()
    words = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_ANIMALS.split())}"
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{words}"


def of(fileroot: Path, experiment: str, trial: str) -> Path:
    """Where the run of these names lies; the folder need not exist.

    Raises:
        UserError: a name is no plain folder name, or one of the two folders is a link.
    """
    folder = Path(fileroot) / experiment
    named = (("experiment_name", experiment, folder), ("trial_name", trial, folder / trial))
    for field, name, path in named:
        if wrong := name_problem(name):
            raise UserError(f"{field} = {name!r} {wrong}")
        if path.is_symlink():
            raise UserError(
                f"{field}: {path} is a link; a run is written to real folders only, use another name"
            )
    return folder / trial


def run_name(run_dir: Path) -> str:
    """`experiment/trial`."""
    return f"{run_dir.parent.name}/{run_dir.name}"


def create(
    fileroot: Path,
    experiment: str,
    trial: str | None,
    *,
    config_text: str,
    manifest: dict,
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Makes a run folder in state `queued`: written beside and renamed, with nothing left behind when that fails.

    Args:
        fileroot: root of all runs; made when it is missing.
        experiment: name of the experiment's folder.
        trial: name of the run's folder; None takes a fresh readable one.
        config_text: the resolved configuration, written as `config.yaml`. `{trial_name}` in it is not
            replaced: name the trial first (`fresh_trial_name`) where the text must carry it.
        manifest: written as `manifest.json`.
        fill: adds to the folder before it gets its name.

    Raises:
        UserError: a name is not allowed, or the folder exists.
    """
    while True:
        folder = of(fileroot, experiment, fresh_trial_name() if trial is None else trial)
        folders.sweep(folder.parent, abandoned=True)  # of a launcher that was killed here
        try:
            with folders.staged(folder, "refuse") as part:
                (part / "logs").mkdir()
                atomic_write(part / "config.yaml", config_text)
                records_manifest.update(part, **manifest)
                status.reset_status(part)
                if fill is not None:
                    fill(part)
            return folder
        except BaseException as error:
            _remove_empty(folder.parent)
            if not isinstance(error, OSError):
                raise
            if not folder.exists():
                raise UserError(
                    f"cluster.fileroot = {str(fileroot)!r}: {folder} cannot be made ({error.strerror}); give a folder"
                    " that can be written"
                ) from None
            if trial is not None:
                raise UserError(f"trial_name = {trial!r}: {folder} exists; use another name") from None


def remove_folder(run_dir: Path) -> None:
    """Removes a run folder, and those of its experiment and of all runs when nothing else is in them."""
    shutil.rmtree(run_dir, ignore_errors=True)
    _remove_empty(run_dir.parent)


def _remove_empty(experiment: Path) -> None:
    with contextlib.suppress(OSError):
        experiment.rmdir()
        experiment.parent.rmdir()


def sweep(run_dir: Path) -> None:
    """Clears away what killed processes left half-written. Only who owns the run may call it."""
    for place in _WITH_FOLDERS:
        folders.sweep(run_dir / place)


def leftovers(run_dir: Path) -> list[Path]:
    """What `sweep` removes."""
    return [left for place in _WITH_FOLDERS for left in folders.leftovers(run_dir / place)]


def clear(run_dir: Path) -> str:
    """Clears away what an earlier attempt wrote, so that the trial starts anew; says what became of it.

    What was trained or measured is set aside in `earlier/`. `config.yaml`, `manifest.json`, `budget.json`,
    `checkpoints/` and the lock stay.
    """
    told = _set_aside(run_dir, _WORK)
    (run_dir / "logs").mkdir(exist_ok=True)
    return told


def clear_requests(run_dir: Path) -> None:
    """Removes what concerns an ended attempt only, so that the next one goes on from a checkpoint."""
    for name in ("progress.json", "stop.json"):
        (run_dir / name).unlink(missing_ok=True)
    clear_errors(run_dir)


def clear_errors(run_dir: Path) -> None:
    """Removes what failed ranks of an earlier attempt left; the logs stay."""
    for error in (run_dir / "logs").glob("*.error.json"):
        error.unlink()


def clear_training(run_dir: Path) -> None:
    """Clears away what the ranks recorded, so that the same supervisor may start them anew.

    Pairs, logs, requests to stop and the time that the phases took stay.
    """
    _set_aside(run_dir, [name for name in _WORK if name not in _KEPT_BETWEEN_ATTEMPTS])


def _set_aside(run_dir: Path, names: Iterable[str]) -> str:
    """Moves what a run wrote to `earlier/attempt-N/`, or removes it when there is nothing in it worth keeping."""
    there = [run_dir / name for name in names if (run_dir / name).exists()]
    full = [path for path in there if not path.is_dir() or any(path.iterdir())]
    if not any(path.name in _WORTH_KEEPING for path in full):
        for path in there:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return ""
    number = status.read_status(run_dir).get("attempt") or 1
    while (aside := run_dir / EARLIER / f"attempt-{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    for path in there:
        path.rename(aside / path.name)
    return f"what it had made is kept in {EARLIER}/{aside.name}"


def list_runs(fileroot: Path) -> list[Path]:
    """Run folders under `fileroot`, oldest first; linked and hidden folders are not entered."""
    found = []
    for experiment in _plain_folders(Path(fileroot)):
        found += [run for run in _plain_folders(experiment) if (run / "status.json").is_file()]
    return sorted(found, key=lambda run: (_created_at(run), run.name))


def _plain_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
    ]


def _created_at(run_dir: Path) -> float:
    try:
        return float(json.loads((run_dir / "status.json").read_text("utf-8")).get("created_at") or 0.0)
    except (OSError, ValueError, TypeError, AttributeError):
        return 0.0


def reserve_room(run_dir: Path) -> None:
    """Sets some bytes of the disk aside, which `free_reserve` gives back."""
    with contextlib.suppress(OSError):
        (Path(run_dir) / _RESERVE).write_bytes(b"\0" * _RESERVE_BYTES)


def free_reserve(run_dir: Path) -> None:
    """Gives back what `reserve_room` set aside: there is room for a last word on a full disk."""
    (Path(run_dir) / _RESERVE).unlink(missing_ok=True)
