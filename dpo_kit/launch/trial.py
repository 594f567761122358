"""Which folder a start means: a new trial, one to go on with, one that is done, or a live one to attach to.

Deliberately not here: what may go on from where (records/resuming), starting the supervisor (launch/local).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config, differences
from dpo_kit.errors import UserError
from dpo_kit.launch import local, preflight, world
from dpo_kit.records import manifest, resuming, run_folder
from dpo_kit.runs import Run
from dpo_kit.supervise import start

# ---------------------------------------------------------------- which folder


def live_alike(config: Config) -> Run | None:
    """A live run of the same trial name or configuration, to attach to; says so."""
    for run in reversed(local.live(config.cluster.fileroot)):
        if run.dir.parent.name != config.experiment_name:
            continue
        try:
            other = run.config
        except UserError:
            continue
        if config.trial_name in (None, run.dir.name):
            differing = _differences(config, other)
            if not differing or config.trial_name is not None:
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
    is_done, note = _settled(config, run) if exists else (False, "")
    disk = "" if is_done else preflight.check(config)
    if not is_done and exists and (at := resuming.point(folder)):
        compare_content(folder, at, config)
    for line in filter(None, (note, disk)):
        world.print_line(line)
    if is_done:
        return run, True
    source = None if source and Path(source).absolute().parent == folder else source
    made = manifest.build(config, named=named, owner=kind, source=source)
    made |= {"command": manifest.repeat_command(folder), "continue": manifest.continue_command(folder)}
    if exists:
        start.begin_anew(run.dir, config, made)
        return run, False
    root, text = Path(config.cluster.fileroot), config_module.to_yaml(config)
    return Run(run_folder.create(root, config.experiment_name, trial, config_text=text, manifest=made)), False


def compare_content(run_dir: Path, at: resuming.Point, config: Config) -> None:
    """Compares what other places hold with what a run was trained on; building pairs may take its time.

    Args:
        run_dir: the run that `at` is of.
        at: where it, or a fork of it (`Point.forked`), would go on.
        config: what that would go on with.

    Raises:
        UserError: it cannot be used, or is something else.
    """
    if not at.moved(config):
        return
    from dpo_kit.dataset import prepare  # loads transformers and torch: not for a start on the same places

    if problem := resuming.refusal(run_dir, at, config, prepare.content(config)):
        raise UserError(problem if at.is_fork else _of_trial(run_dir, problem))


def _of_trial(run_dir: Path, problem: str) -> str:
    return f"trial_name = {run_dir.name!r}: {problem}"


def _settled(config: Config, run: Run) -> tuple[bool, str]:
    """Whether a trial is done, else it may go on or start anew; and what to say of that. Changes nothing.

    Raises:
        UserError: it is live, it may not go on with this configuration, or `recover.mode` does not allow to go on.
    """
    status = run.status
    if run.is_live:
        supervisor, stop = status.get("supervisor") or {}, manifest.command("stop", run.dir)
        problem = (
            f"{run.name} is {status['state']}, by process {supervisor.get('pid')} on {supervisor.get('host')}; stop it"
            f" ({stop}) or use another trial_name"
        )
    elif config.recover.mode != "auto":
        ways = ["use another trial_name"]
        if status["state"] == "done" or not start.resume_problem(run.dir):
            ways.append(f"`{manifest.continue_command(run.dir)}`")
        if not _going_on(config, run, status)[1]:
            ways.append("recover.mode=auto")
        problem = f"{run.name} exists and is {status['state']}; {', or '.join(ways)}"
    else:
        is_done, problem, note = _going_on(config, run, status)
        if not problem:
            return is_done, note
    raise UserError(_of_trial(run.dir, problem))


def _going_on(config: Config, run: Run, status: dict[str, Any]) -> tuple[bool, str, str]:
    """Whether a trial that has ended is done with this configuration, why it may not go on with it, and what to say."""
    differing = _differences(config, run.config)
    told, done_at = differences.text(differing), f"{run.name} is done at step {status.get('step')}"
    if status["state"] == "done" and not differing:
        return True, "", f"{done_at}: skipped"
    is_longer = set(differing) <= set(differences.LENGTH)
    if status["state"] != "done" or (is_longer and run.checkpoints()):
        at = resuming.point(run.dir)
        problem = resuming.refusal(run.dir, at, config) if at else resuming.lost(run.dir, [])
        note = f"{run.name} was {status['state']}; its configuration changes: {told}" if told else ""
        return False, problem, f"{done_at}; going on: {told}" if status["state"] == "done" else note
    only = "; it kept no checkpoint to go on from (recover.keep=all keeps them)" if is_longer else ""
    fork = resuming.fork_command(run.dir, config, list(differing))
    ways = "use another trial_name" + (f", or fork it: {fork}" if fork else "")
    return False, f"{run.name} is done with another configuration ({told}){only}; {ways}", ""


def _differences(config: Config, other: Config) -> dict[str, str]:
    """Keys in which two configurations mean different runs, with both values."""
    found = differences.between(config_module.to_tree(other), config_module.to_tree(config))
    # Micro-batches do not change a step: a run that halved them is the same run.
    same = ("trial_name", "recover", "max_tokens_per_mb")
    return {
        key: text for key, text in found.items() if not key.startswith(same[:2]) and not key.endswith(same[2])
    }
