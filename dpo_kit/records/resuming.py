"""May a run go on, from where, and what may be done where it may not? One answer for launchers, prepare and ranks.

    run = read_facts(run_dir)                            what its folder says (records/facts)
    found = resuming.decide(run, config)                 attach, skip, go on, finish, start anew, or refuse with words
    problem = resuming.refusal(run, config, content)     the part of it that prepare and ranks verify; "" when it may

Nothing here reads the folder: a launcher compares first, and `supervise/start` acts after. Content is compared by
fingerprints that somebody else makes (`prepare.content`): a launcher only where it is given other places (`moved`), the
prepare step always, before it leaves anything for the ranks, and those once more.

Deliberately not here: what makes two runs the same (config/differences), making content (dataset/prepare), torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from dpo_kit.config import Config, differences, from_tree, to_tree
from dpo_kit.errors import UserError
from dpo_kit.records import manifest
from dpo_kit.records.facts import Facts
from dpo_kit.system import machine

Act = Literal["attach", "skip", "go on", "finish", "start anew", "refuse"]
# Keys that concern what follows the training: with others of them, the model that is there is the one asked for.
_AFTER = ("evaluator.", "stats_logger.", "recover.", "cluster.", "scheduler.")


@dataclass(frozen=True)
class Decision:
    """What becomes of a run that is started again, and what to say of that."""

    act: Act
    told: str = ""
    step: int = 0
    """Where it goes on."""


def decide(
    run: Facts, config: Config | None = None, *, mode: str = "auto", devices: int | None = None
) -> Decision:
    """What becomes of a run that is started again.

    Args:
        run: what its folder says.
        config: of a trial of the same name, devices resolved; None: the run's own settings, as `runs resume` asks.
        mode: `recover.mode`; only `auto` lets a trial go on unasked.
        devices: CUDA devices that are visible, which a resume must find enough of; None leaves that out.
    """
    state = run.status.get("state")
    if state in ("queued", "running"):
        supervisor, stop = run.status.get("supervisor") or {}, manifest.command("stop", run.folder)
        who = f", by process {supervisor.get('pid')} on {supervisor.get('host')}; stop it ({stop}) or use another"
        what = f"{who} trial_name" if config else "; nothing to resume"
        return Decision("attach", f"{run.name} is {state}{what}")
    found = _resumed(run, devices) if config is None else _continued(run, config)
    if config is None or mode == "auto" or (run.damaged and state != "done"):
        return found
    ways = ["use another trial_name"]
    if _resumed(run, devices).act != "refuse":
        ways.append(f"`{manifest.continue_command(run.folder)}`")
    if found.act != "refuse":
        ways.append("recover.mode=auto")
    return Decision("refuse", f"{run.name} exists and is {state}; {', or '.join(ways)}")


def _resumed(run: Facts, devices: int | None) -> Decision:
    """What becomes of an ended run with its own settings."""
    if run.status.get("state") == "done":
        return Decision("skip", f"{run.name} is done; nothing to resume")
    if run.config is None or (problem := refusal(run, run.config)):
        return Decision("refuse", run.damaged or problem)
    wanted, is_here = int(run.config.cluster.n_gpus_per_node), run.config.scheduler.type == "local"
    if is_here and devices is not None and not run.trained and (problem := machine.too_many(wanted, devices)):
        others = ("cluster.n_gpus_per_node=auto", "actor.backend=fsdp", "ref.backend=fsdp")
        command = manifest.train_command(run.folder, *others, config=run.config)
        return Decision("refuse", f"{problem}; to go on with others: {command}")
    return _going_on(run, run.config)


def _continued(run: Facts, config: Config) -> Decision:
    """What becomes of an ended trial with a configuration."""
    if run.config is None:
        return Decision("refuse", run.damaged)
    state, found = run.status.get("state"), differing(config, run.config)
    told, is_longer = differences.text(found), set(found) <= set(differences.LENGTH)
    note = f"{run.name} was {state}; its configuration changes: {told}" if told else ""
    if state == "done":
        done_at = f"{run.name} is done at step {run.status.get('step')}"
        if not found:
            return Decision("skip", f"{done_at}: skipped")
        if not (is_longer and (run.whole or run.damaged)):
            only = "; it kept no checkpoint to go on from (recover.keep=all keeps them)" if is_longer else ""
            fork = fork_command(run, config, list(found))
            ways = "use another trial_name" + (f", or fork it: {fork}" if fork else "")
            return Decision("refuse", f"{run.name} is done with another configuration ({told}){only}; {ways}")
        note = f"{done_at}; going on: {told}"
    if problem := refusal(run, config):
        return Decision("refuse", problem)
    return _going_on(run, config, note)


def _going_on(run: Facts, config: Config, told: str = "") -> Decision:
    changed = differences.between(to_tree(run.config), to_tree(config)) if run.config else {}
    if run.trained and all(key.startswith(_AFTER) for key in changed):
        return Decision("finish", told, run.status.get("step") or 0)
    return Decision("go on", told, run.whole[0]) if run.whole else Decision("start anew", told)


def differing(config: Config, other: Config) -> dict[str, str]:
    """Keys in which two configurations mean different runs, with both values."""
    found = differences.between(to_tree(other), to_tree(config))
    # Micro-batches do not change a step: a run that halved them is the same run.
    return {
        key: text
        for key, text in found.items()
        if not key.startswith(("trial_name", "recover")) and not key.endswith("max_tokens_per_mb")
    }


def last_step(run: Facts, config: Config) -> int | None:
    """The last step of a run of the folder's pairs with these settings; None while that is not known."""
    from dpo_kit.config import steps  # imports numpy, which a list of runs does without

    return steps.num_steps(config, run.num_pairs) if run.num_pairs else config.total_train_steps


def refusal(run: Facts, config: Config, content: dict[str, Any] | None = None) -> str:
    """Why a run may not go on with a configuration, and what may be done; empty when it may.

    Args:
        run: where it would go on is `run.at`.
        config: what it would go on with.
        content: fingerprints of what the configuration names, as far as they are known.
    """
    at = run.at
    if at is None:
        return run.damaged or run.lost
    has = f"{run.name} is trained" if at.trained else f"{run.name} has a checkpoint of step {at.step}"
    if found := differences.refused(at.of, {**(content or {}), "config": to_tree(config)}):
        what, ways = "with another configuration", ["use another trial_name"]
        if any(key.startswith(differences.CONTENT) for key in found):
            what = "from other data or weights"
            ways = ["put that back", "start a run with actor.path=MODEL_FOLDER" if at.is_fork else ways[0]]
        elif command := fork_command(run, config, list(found)):
            ways.append(f"fork it: {command}")
        return f"{has} {what} ({differences.text(found)}); {', or '.join(ways)}"
    if at.trained:
        return ""
    total = last_step(run, config)
    if total is not None and total < at.step:
        command = fork_command(run, config, list(differences.LENGTH))
        earlier = f", or fork an earlier one: {command}" if command else ""
        return f"{has}, and would have to end at step {total}; raise total_train_steps or total_train_epochs{earlier}"
    return micro_batch_problem(config, run.longest_pair)


def micro_batch_problem(config: Config, longest: int) -> str:
    """What is wrong with a budget of micro-batches that the longest pair does not fit in; empty when it does."""
    for name, spec in (("actor", config.actor.mb_spec), ("ref", config.ref.mb_spec)):
        tokens = spec.max_tokens_per_mb
        if tokens != "auto" and longest > int(tokens):
            return (
                f"{name}.mb_spec.max_tokens_per_mb = {tokens} is less than the longest pair ({longest} tokens);"
                f" use {longest} or more"
            )
    return ""


# ---------------------------------------------------------------- forks


def fork_problems(before: Config, now: Config, step: int, total: int | None) -> list[str]:
    """Why step N of a fork would not follow from its parent's: other pairs, other numbers, or an end before it."""
    changed = differences.changed(to_tree(before), to_tree(now))
    order = {key: text for key, text in changed.items() if differences.changes_pairs(key)}
    problems = []
    merged = ", of a run with saver.merged=true" if before.actor.use_lora else ""
    elsewhere = f"start a run with actor.path=MODEL_FOLDER (dpo-kit export RUN -o MODEL_FOLDER{merged})"
    if order:
        problems.append(
            "a fork sees the pairs that its parent would have seen, and this changes them:"
            f" {differences.text(order)}; to train on others {elsewhere}"
        )
    dtypes = [config.actor.dtype for config in (before, now)]
    if dtypes.count("float64") == 1:
        problems.append(
            f"actor.dtype: {' -> '.join(dtypes)}: a checkpoint holds weights and optimizer in float64 for a float64 run"
            f" and in float32 for others, and a fork goes on with them; to train in {dtypes[1]} {elsewhere}"
        )
    adapters = {key: text for key, text in changed.items() if key in differences.ADAPTERS}
    if adapters and (before.actor.use_lora or now.actor.use_lora):
        problems.append(
            "a fork goes on with the weights that its parent trained, and this makes others of them:"
            f" {differences.text(adapters)}; to train those {elsewhere}"
        )
    if total is not None and total <= step:
        key = "total_train_steps" if total == now.total_train_steps else "total_train_epochs"
        ends = f", which ends at step {total}," if key == "total_train_epochs" else ""
        problems.append(
            f"{key} = {getattr(now, key)}{ends} is not past step {step}, where the fork begins; raise it"
        )
    return problems


def fork_command(run: Facts, config: Config, keys: list[str]) -> str:
    """The command that forks a run with a configuration's values of some keys; empty where none would be accepted."""
    if run.config is None:
        return ""
    before, now = to_tree(run.config), to_tree(config)
    overrides = [override(key, now) for key in keys if key in differences.between(before, now)]
    try:
        forked = from_tree(before, ["trial_name=null", *overrides])
    except UserError:
        return ""
    total = last_step(run, forked)
    for step in run.whole:
        if not fork_problems(run.config, forked, step, total):
            return manifest.command("fork", run.folder, "--step", str(step), *overrides)
    return ""


def override(key: str, tree: dict[str, Any]) -> str:
    """`actor.beta=0.2`: the assignment of a tree's value."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


# ---------------------------------------------------------------- what may be done


def way_on(run: Facts) -> str:
    """What may be done with a run that ended before it was done: a line or two, each with a command that works."""
    if run.damaged:
        return f"it cannot go on as it is: {run.damaged}"
    if run.lost:
        return run.lost
    can, resume = "continue", manifest.continue_command(run.folder)
    if run.at is None:
        can = "start anew (it has no checkpoint)"
    if not run.status.get("mistake"):
        return f"to {can}: {resume}"
    return (
        f"to {can} when that is mended: {resume}\n"
        f"to {can} with other settings: {manifest.train_command(run.folder, config=run.config)} KEY=VALUE"
    )


def with_others(run: Facts, overrides: list[str]) -> str:
    """The command that trains with other settings than a run that has ended: goes on, forks, or is another run.

    Raises:
        UserError: what is wrong with the settings.
    """
    if run.config is None:
        raise UserError(run.damaged)
    config = from_tree(to_tree(run.config), overrides)
    if decide(run, config).act in ("go on", "finish", "start anew"):
        return manifest.train_command(run.folder, *overrides, config=run.config)
    keys = list(differences.between(to_tree(run.config), to_tree(config)))
    return fork_command(run, config, keys) or manifest.train_command(run.folder, *overrides, anew=True)
