"""What a run was made from: versions, git state, hardware, seeds, and the commands that repeat it.

Deliberately not here: data fingerprints (prepare adds them), weights (worker), environment variables, which
may hold secrets.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

import dpo_kit
from dpo_kit import devices, halving
from dpo_kit.config import Config, project_root
from dpo_kit.files import atomic_write, read_json, to_json

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "omegaconf",
    "pyarrow",
    "safetensors",
    "datasets",
    "tokenizers",
)
_GIT_S = 2.0


def build(config: Config, *, named: bool, owner: str) -> dict[str, Any]:
    """The manifest of a run that is about to start.

    Args:
        config: resolved, with its trial name.
        named: whether the user gave the trial name.
        owner: `interactive`, `headless`, `foreground` or `detached`.
    """
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"dpo_kit": dpo_kit.__version__, "python": platform.python_version(), **_versions()},
        "git": git_state(project_root()),
        "hardware": _hardware(),
        "seeds": {"seed": config.seed, "samples_seed": config.evaluator.samples_seed},
        "trial_named": named,
        "started": owner,
    }


def repeat_command(run_dir: Path) -> str:
    """The command that makes the same run again, under a fresh name and with the micro-batches it settled on."""
    return _command(run_dir, "trial_name=null")


def continue_command(run_dir: Path) -> str:
    """The command that continues this very trial (until checkpoints exist, starts it anew)."""
    return _command(run_dir, "recover.mode=auto")


def _command(run_dir: Path, *overrides: str) -> str:
    config = shlex.quote(str(run_dir / "config.yaml"))
    return " ".join([f"dpo-kit train --config {config}", *overrides, *halving.overrides(run_dir)])


def write_commands(run_dir: Path) -> None:
    """Brings the commands of `manifest.json` up to date with `budget.json`."""
    made = read_json(run_dir / "manifest.json", {})
    commands = {"command": repeat_command(run_dir), "continue": continue_command(run_dir)}
    if commands != {name: made.get(name) for name in commands}:
        atomic_write(run_dir / "manifest.json", to_json(made | commands, indent=2))


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


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": devices.device_names(),
    }
