"""Which folder a start means: a new trial, one to go on with, one that is done, or a live one to attach to.

Deliberately not here: what may go on from where (records/resuming), starting the supervisor (launch/local).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from dpo_kit import config as config_module
from dpo_kit.config import Config, differences
from dpo_kit.errors import UserError
from dpo_kit.launch import preflight, world
from dpo_kit.records import manifest, resuming, run_folder
from dpo_kit.records.facts import Facts, read_facts
from dpo_kit.runs import Run
from dpo_kit.supervise import start
from dpo_kit.system import machine


def live(fileroot: str | Path) -> list[Run]:
    """Runs under a root that a supervisor is working on, oldest first."""
    found = []
    for folder in run_folder.list_runs(Path(fileroot)):
        with contextlib.suppress(UserError):  # a damaged folder of another run is no reason to start none
            if Run(folder).is_live:
                found.append(Run(folder))
    return found


def live_alike(config: Config) -> Run | None:
    """A live run of the same trial name or configuration, to attach to; says so."""
    for run in reversed(live(config.cluster.fileroot)):
        if run.dir.parent.name != config.experiment_name or config.trial_name not in (None, run.dir.name):
            continue
        try:
            differing = resuming.differing(config, run.config)
        except UserError:
            continue
        if differing and config.trial_name is None:
            continue
        note = f"; its configuration differs: {differences.text(differing)}" if differing else ""
        other_way = "another trial_name" if config.trial_name else "launch.start(..., new=True)"
        world.print_line(
            f"attached to the live run {run.dir} (step {run.status.get('step') or 0}){note}; {other_way}"
            " starts another"
        )
        return run
    return None


def open_trial(config: Config, kind: str, source: str | Path | None = None) -> tuple[Run, bool]:
    """The queued run to start, or the done one that there is (True).

    Raises:
        UserError: see `start`.
    """
    named = config.trial_name is not None
    trial = config.trial_name or run_folder.fresh_trial_name()
    config = replace(config, trial_name=trial)
    folder = run_folder.of(Path(config.cluster.fileroot), config.experiment_name, trial)
    run = Run(folder)
    exists = (folder / "status.json").is_file()
    notes = []
    if exists:
        facts, mode = read_facts(folder), config.recover.mode
        found = resuming.decide(facts, config, mode=mode, devices=machine.visible_devices())
        if found.act in ("attach", "refuse"):
            raise UserError(_of_trial(folder, found.told))
        notes.append(found.told)
        if found.act == "skip":
            world.print_line(found.told)
            return run, True
    notes.append(preflight.check(config))
    if exists:
        compare_content(facts, config)
    for line in filter(None, notes):
        world.print_line(line)
    source = None if source and Path(source).absolute().parent == folder else source
    made = manifest.build(config, named=named, owner=kind, source=source)
    made |= {"command": manifest.repeat_command(folder), "continue": manifest.continue_command(folder)}
    if exists:
        return run, start.begin(run.dir, config, made).act == "skip"
    root, text = Path(config.cluster.fileroot), config_module.to_yaml(config)
    return Run(run_folder.create(root, config.experiment_name, trial, config_text=text, manifest=made)), False


def compare_content(run: Facts, config: Config) -> None:
    """Compares what other places hold with what a run was trained on; building pairs may take its time.

    Args:
        run: what its folder says; `run.at` is where it, or a fork of it (`Point.forked`), would go on.
        config: what that would go on with.

    Raises:
        UserError: it cannot be used, or is something else.
    """
    if run.at is None or not run.at.moved(config):
        return
    from dpo_kit.dataset import prepare  # loads transformers and torch: not for a start on the same places

    if problem := resuming.refusal(run, config, prepare.content(config)):
        raise UserError(problem if run.at.is_fork else _of_trial(run.folder, problem))


def _of_trial(run_dir: Path, problem: str) -> str:
    return f"trial_name = {run_dir.name!r}: {problem}"
