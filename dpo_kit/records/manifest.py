"""`manifest.json`: what a run was made from (versions, git state, hardware, seeds), and the commands that repeat it.

Each room adds its part with `update`; nobody else opens the file.

Deliberately not here: what the fingerprints are of (dataset/prepare, engine/worker), environment variables, which
may hold secrets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

import dpo_kit
from dpo_kit.config import Config, differences, load, project_root, to_tree
from dpo_kit.errors import UserError
from dpo_kit.records import budget
from dpo_kit.system import machine
from dpo_kit.system.files import atomic_write, read_json, to_json

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "omegaconf",
    "pyarrow",
    "safetensors",
    "datasets",
    "tokenizers",
    "peft",
)
_GIT_S = 2.0
_FILE = "manifest.json"


def read(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run; empty for a folder without one."""
    return read_json(run_dir / _FILE, {})


def update(run_dir: Path, **parts: Any) -> None:
    """Adds parts to the manifest, in the place of those of the same names."""
    old = read(run_dir)
    if old | parts != old or not is_there(run_dir):
        atomic_write(run_dir / _FILE, to_json(old | parts, indent=2))


def renew(run_dir: Path, made: dict[str, Any], keep: Iterable[str]) -> None:
    """Begins another manifest, with some parts of the old one."""
    old = read(run_dir)
    stays = {key: old[key] for key in keep if key in old}
    atomic_write(run_dir / _FILE, to_json(stays | made, indent=2))


def is_there(run_dir: Path) -> bool:
    """Whether a folder has a manifest, as every run's has."""
    return (run_dir / _FILE).is_file()


def build(config: Config, *, named: bool, owner: str, source: str | Path | None = None) -> dict[str, Any]:
    """The manifest of a run that is about to start.

    Args:
        config: resolved, with its trial name.
        named: whether the user gave the trial name.
        owner: `interactive`, `headless`, `foreground` or `detached`.
        source: the params file; that of another run makes this one a repetition of it.
    """
    origin = Path(source).expanduser().absolute().parent if source else None
    is_repetition = origin is not None and is_there(origin)
    return {
        **({"repeats": str(origin)} if is_repetition else {}),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"dpo_kit": dpo_kit.__version__, "python": platform.python_version(), **versions()},
        "git": git_state(project_root()),
        "hardware": _hardware(),
        "seeds": {"seed": config.seed, "samples_seed": config.evaluator.samples_seed},
        "trial_named": named,
        "started": owner,
    }


def repeat_command(run_dir: Path) -> str:
    """The command that makes the same run again, under a fresh name and with the micro-batches it settled on."""
    if made := parent(run_dir):
        return fork_again_command(made)
    return train_command(run_dir, *budget.overrides(run_dir), anew=True)


def continue_command(run_dir: Path) -> str:
    """The command that continues this very folder from its last checkpoint, or starts it anew without one."""
    return command("resume", run_dir)


def command(verb: str, run_dir: Path, *words: str) -> str:
    """`dpo-kit runs VERB FOLDER ...`, which needs no fileroot."""
    return shlex.join(["dpo-kit", "runs", verb, str(run_dir), *words])


def train_command(run_dir: Path, *overrides: str, anew: bool = False, config: Config | None = None) -> str:
    """The command that starts this trial again with other settings, wherever its folder is now.

    Args:
        run_dir: the run folder.
        overrides: dotted assignments.
        anew: another run of the same settings instead, under a fresh name.
        config: its own, where it is at hand.
    """
    words = ["dpo-kit", "train", "--config", str(run_dir / "config.yaml")]
    if anew:
        return shlex.join([*words, "trial_name=null", *overrides])
    places = {
        "cluster.fileroot": str(run_dir.parent.parent),
        "experiment_name": run_dir.parent.name,
        "trial_name": run_dir.name,
    }
    with contextlib.suppress(UserError):
        config = config or load(run_dir / "config.yaml")
        written = (config.cluster.fileroot, config.experiment_name, config.trial_name)
        places = {key: now for (key, now), was in zip(places.items(), written, strict=True) if now != was}
    moved = [f"{key}={value}" for key, value in places.items()]
    return shlex.join([*words, "recover.mode=auto", *moved, *overrides])


def parent(run_dir: Path) -> dict[str, Any]:
    """What a fork is of: `run`, `folder`, `step`, `overrides`; empty for a run that is none."""
    made = read(run_dir).get("parent") or {}
    if made and not Path(made["folder"]).is_dir():
        beside = run_dir.parent.parent / made["run"]  # the runs were moved together
        made = {**made, "folder": str(beside)} if beside.is_dir() else made
    return made


def fork_again_command(parent: dict[str, Any]) -> str:
    """The command that makes the same fork once more."""
    return command(
        "fork", Path(parent["folder"]), "--step", str(parent["step"]), *parent.get("overrides", ())
    )


def write_commands(run_dir: Path) -> None:
    """Brings the commands up to date with `budget.json`."""
    update(run_dir, **{"command": repeat_command(run_dir), "continue": continue_command(run_dir)})


def repetition(run_dir: Path) -> str:
    """What differs from the run that this one repeats, in one line; empty for a run that repeats none.

    Compared are versions, the commit, data and weights (as far as both have recorded them), and the configuration.
    """
    mine = read(run_dir)
    if not mine.get("repeats"):
        return ""
    origin = Path(mine["repeats"])
    theirs = read(origin)
    found: dict[str, str] = {}
    for name in ("versions", "seeds", "data", "weights"):
        if name in mine and name in theirs:
            found |= differences.between(_marks(theirs[name]), _marks(mine[name]), name)
    before, now = ((made.get("git") or {}).get("commit") for made in (theirs, mine))
    found |= differences.between(before, now, "git commit")
    before, now = (made.get("parent") for made in (theirs, mine))
    found |= differences.between(fork_text(before), fork_text(now), "forked from")
    before, now = (to_tree(load(folder / "config.yaml")) for folder in (origin, run_dir))
    named = differences.between(before, now)
    found |= {key: text for key, text in named.items() if key != "trial_name"}
    what = f"{origin.parent.name}/{origin.name}"
    return f"repeats {what}: " + (f"differs in {differences.text(found)}" if found else "nothing differs")


def fork_text(parent: dict[str, Any] | None) -> str:
    """What a run was forked from: `exp/one at step 2`."""
    return f"{parent['run']} at step {parent['step']}" if parent else "nothing"


def _marks(made: Any) -> Any:
    """Fingerprints without the places that they were found at."""
    if isinstance(made, dict) and "fingerprint" in made:
        return {"fingerprint": made["fingerprint"]}
    return {key: _marks(value) for key, value in made.items()} if isinstance(made, dict) else made


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the folder's repository and whether tracked files were changed; None outside one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions; those that are not installed are left out."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": machine.device_names(),
    }
