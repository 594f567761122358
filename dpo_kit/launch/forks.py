"""Forks: a new run that goes on from a checkpoint of another, with other settings from there on.

Not here: starting runs (`local`), a checkpoint's files (engine/checkpoint).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpo_kit import config as config_module
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.launch import local, preflight, trial, world
from dpo_kit.records import checkpoint_folders, manifest, metrics, resuming, run_folder
from dpo_kit.records.facts import at_step, read_facts
from dpo_kit.runs import Run
from dpo_kit.system import folders


def fork(parent: Run, step: int | None = None, overrides: Sequence[str] = ()) -> Run:
    """Makes a queued run that goes on from a checkpoint of another, with other settings from there on.

    Its folder gets the checkpoint (hard links where the file system has them) and what was recorded up to that
    step; `manifest.json` names the parent.

    Args:
        parent: a run with checkpoints; it is not changed.
        step: of one of them; the last one when left out.
        overrides: dotted assignments over the parent's configuration; the trial gets a fresh name unless one is given.

    Raises:
        UserError: no such checkpoint (those there are are listed), a damaged one, or settings that cannot run.
    """
    step = _step_to_fork(parent, step, overrides)
    # The parent may have been moved since it wrote where its root is.
    root = f"cluster.fileroot={parent.dir.parent.parent}"
    config = config_module.load(parent.dir / "config.yaml", ["trial_name=null", root, *overrides])
    run, own = read_facts(parent.dir), parent.config
    if problems := resuming.fork_problems(own, config, step, resuming.last_step(run, config)):
        raise ConfigError(problems)
    named = config.trial_name is not None
    config = world.resolve_world(config)
    config = replace(config, trial_name=config.trial_name or run_folder.fresh_trial_name())
    run = replace(run, at=at_step(parent.dir, step, own).forked(config))
    if problem := resuming.refusal(run, config):
        raise UserError(problem)
    preflight.check(config)
    trial.compare_content(run, config)
    made = manifest.build(config, named=named, owner="foreground")
    settings = [text for text in overrides if not text.startswith("trial_name=")]
    made["parent"] = {"run": parent.name, "folder": str(parent.dir), "step": step, "overrides": settings}
    folder = run_folder.create(
        Path(config.cluster.fileroot),
        config.experiment_name,
        str(config.trial_name),
        config_text=config_module.to_yaml(config),
        manifest=made,
        fill=lambda staged: _inherit(parent.dir, staged, step),
    )
    return Run(folder)


def _step_to_fork(parent: Run, step: int | None, overrides: Sequence[str]) -> int:
    """The step of a whole checkpoint: the one asked for, or the newest."""
    there = parent.checkpoints()
    if step is None and there:
        newest, told = checkpoint_folders.newest(parent.dir / "checkpoints")
        for line in told:
            print(line, flush=True)
        if newest is None:
            raise UserError(f"{parent.name} has no whole checkpoint: {'; '.join(told)}")
        return newest
    if step is None or step not in there:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        has = f"; it has those of steps {', '.join(map(str, there))}" if there else ""
        anew = f"; from the first step: {manifest.train_command(parent.dir, *overrides, anew=True)}"
        raise UserError(
            f"{parent.name} has {wanted}{has} (recover.freq_steps makes them; recover.keep=all keeps them when a run is"
            f" done){'' if there else anew}"
        )
    if problem := folders.damage(parent.dir / "checkpoints" / f"step-{step}"):
        others = ", ".join(str(other) for other in there if other != step) or "none"
        what = f"checkpoint step-{step} of {parent.name}"
        raise UserError(f"{what} is damaged: {problem}; there are others: {others}")
    return step


def _inherit(parent: Path, folder: Path, step: int) -> None:
    """Copies a checkpoint, and what was recorded until then, into a folder that has no name yet."""
    name = f"step-{step}"
    (folder / "checkpoints").mkdir()
    source, target = (place / "checkpoints" / name for place in (parent, folder))
    try:
        shutil.copytree(source, target, copy_function=_link)
    except (shutil.Error, FileNotFoundError):
        if folders.committed(source)[1] == "":
            raise
    if folders.committed(target)[1]:
        raise UserError(
            f"{parent} removed its checkpoint of step {step} meanwhile (recover.keep); fork again, or name a later one"
            " with --step"
        )
    for name in ("metrics.jsonl", "evaluations", "findings.json"):
        if (parent / name).is_dir():
            shutil.copytree(parent / name, folder / name)
        elif (parent / name).exists():
            shutil.copy(parent / name, folder / name)
    metrics.cut_records(folder, step)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # files of a checkpoint are never changed in place
    except OSError:
        shutil.copy(source, target)


def fork_in_foreground(parent: Run, step: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Forks a run and trains it, as `run_in_foreground` does; see `fork`."""
    run = fork(parent, step, overrides)
    print(f"fork of {parent.name} at step {run.checkpoints()[-1]}: {run.name}", flush=True)
    return local.foreground(run, False)
