"""May a run go on, from where, and what may be done where it may not? One answer for launchers, prepare and ranks.

    at = resuming.point(run_dir)                         the checkpoint that the ranks would take
    problem = resuming.refusal(run_dir, at, config, content)      in words, with ways on that work; "" when it may

Everything here reads and nothing writes, so that a launcher compares first and writes after. Content is compared by
fingerprints that somebody else makes (`prepare.content`): a launcher only where it is given other places (`moved`), the
prepare step always, before it leaves anything for the ranks, and those once more.

Deliberately not here: what makes two runs the same (config/differences), making content (dataset/prepare),
starting (launch), torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config, differences
from dpo_kit.errors import UserError
from dpo_kit.records import checkpoints, manifest, metrics, run_folder
from dpo_kit.records.status import read_status
from dpo_kit.system import folders
from dpo_kit.system.files import read_json


@dataclass(frozen=True)
class Point:
    """Where a run would go on."""

    step: int
    of: dict[str, Any]
    """What it is of, as `differences.refused` takes it: `config`, and the fingerprints that are known."""
    trained: bool = False
    """All steps are done and the model is written; there is no checkpoint."""
    is_fork: bool = False
    """What comes after is a fork's."""

    def forked(self, config: Config) -> Point:
        """The same for a fork, whose settings and held-out pairs are its own from here on, and its pairs are not."""
        tree, then = _tree(config), self.of["config"]
        for section, key in (place.split(".") for place in differences.PLACES if "." in place):
            if tree.get(section) and then.get(section):
                tree[section][key] = then[section][key]
        known = {key: mark for key, mark in self.of.items() if key != "valid"}
        tree["tokenizer_path"] = then["tokenizer_path"]
        return replace(self, of=known | {"config": tree}, is_fork=True)

    def moved(self, config: Config) -> bool:
        """Whether a configuration names other places, so that their content must be compared."""
        return any(key in differences.PLACES for key in differences.between(self.of["config"], _tree(config)))


def _tree(config: Config) -> dict[str, Any]:
    return config_module.to_tree(config)


def point(run_dir: Path) -> Point | None:
    """The newest checkpoint that looks whole; else the trained model that a run made last; None without either.

    Sizes are compared, and the hash of what is read here; the ranks compare every hash.

    Raises:
        UserError: no checkpoint looks whole.
    """
    step, damaged = checkpoints.newest(run_dir / "checkpoints", _quick_damage)
    if step is not None:
        return at_step(run_dir, step)
    if damaged:
        raise UserError(lost(run_dir, damaged))
    status = read_status(run_dir)
    if not (status.get("trained") and (run_dir / "model").is_dir()):
        return None
    made = manifest.read(run_dir)
    of: dict[str, Any] = {split: stored["fingerprint"] for split, stored in made.get("data", {}).items()}
    if "weights" in made:
        of["weights"] = {name: stored["fingerprint"] for name, stored in made["weights"].items()}
    config = config_module.load(run_dir / "config.yaml")
    return Point(status.get("step") or 0, of | {"config": _tree(config)}, trained=True)


def _quick_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, as far as that is seen without reading all of it."""
    files, problem = folders.committed(folder)
    if problem or checkpoints.STATE not in files:
        return problem or f"it has no {checkpoints.STATE}"
    is_same = folders.hashes(folder, [checkpoints.STATE])[checkpoints.STATE] == files[checkpoints.STATE]
    return "" if is_same else f"{checkpoints.STATE} has other bytes than were written"


def at_step(run_dir: Path, step: int) -> Point:
    """What the checkpoint of a step, which is whole, says that it is of."""
    facts = read_json(run_dir / "checkpoints" / f"step-{step}" / checkpoints.STATE)
    at = Point(step, facts["identity"])
    parent = manifest.parent(run_dir)
    return at.forked(config_module.load(run_dir / "config.yaml")) if parent.get("step") == step else at


def last_step(run_dir: Path, config: Config) -> int | None:
    """The last step of a run of the folder's pairs with these settings; None while that is not known."""
    from dpo_kit.config import steps  # imports numpy, which a list of runs does without

    num_pairs = manifest.read(run_dir).get("data", {}).get("train", {}).get("num_pairs")
    return steps.num_steps(config, num_pairs) if num_pairs else config.total_train_steps


def refusal(
    run_dir: Path,
    at: Point,
    config: Config,
    content: dict[str, Any] | None = None,
    *,
    total: int | None = None,
) -> str:
    """Why a run may not go on with a configuration, and what may be done; empty when it may.

    Args:
        run_dir: the run that `at` is of.
        at: where it would go on.
        config: what it would go on with.
        content: fingerprints of what the configuration names, as far as they are known.
        total: its last step, where the number of pairs is at hand.
    """
    name = run_folder.run_name(run_dir)
    has = f"{name} is trained" if at.trained else f"{name} has a checkpoint of step {at.step}"
    if found := differences.refused(at.of, {**(content or {}), "config": _tree(config)}):
        what, ways = "with another configuration", ["use another trial_name"]
        if any(key.startswith(differences.CONTENT) for key in found):
            what = "from other data or weights"
            ways = ["put that back", "start a run with actor.path=MODEL_FOLDER" if at.is_fork else ways[0]]
        elif command := fork_command(run_dir, config, list(found)):
            ways.append(f"fork it: {command}")
        return f"{has} {what} ({differences.text(found)}); {', or '.join(ways)}"
    if at.trained:
        return ""
    total = last_step(run_dir, config) if total is None else total
    if total is not None and total < at.step:
        command = fork_command(run_dir, config, list(differences.LENGTH))
        earlier = f", or fork an earlier one: {command}" if command else ""
        return f"{has}, and would have to end at step {total}; raise total_train_steps or total_train_epochs{earlier}"
    return micro_batch_problem(config, (read_json(run_dir / "budget.json", {}) or {}).get("longest_pair", 0))


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
    """Why step N of a fork would not follow from its parent's: other pairs, or an end before it."""
    changed = differences.changed(_tree(before), _tree(now))
    order = {key: text for key, text in changed.items() if differences.changes_pairs(key)}
    problems = []
    if order:
        problems.append(
            "a fork sees the pairs that its parent would have seen, and this changes them:"
            f" {differences.text(order)}; to train on others start a run with"
            " actor.path=MODEL_FOLDER (dpo-kit export RUN -o MODEL_FOLDER)"
        )
    if total is not None and total <= step:
        key = "total_train_steps" if total == now.total_train_steps else "total_train_epochs"
        ends = f", which ends at step {total}," if key == "total_train_epochs" else ""
        problems.append(
            f"{key} = {getattr(now, key)}{ends} is not past step {step}, where the fork begins; raise it"
        )
    return problems


def fork_command(run_dir: Path, config: Config, keys: list[str]) -> str:
    """The command that forks a run with a configuration's values of some keys; empty where none would be accepted."""
    now = _tree(config)
    try:
        before = config_module.load(run_dir / "config.yaml")
        differing = differences.between(_tree(before), now)
        overrides = [override(key, now) for key in keys if key in differing]
        forked = config_module.load(run_dir / "config.yaml", ["trial_name=null", *overrides])
        total = last_step(run_dir, forked)
    except UserError:
        return ""
    for step in reversed(checkpoints.steps(run_dir / "checkpoints")):
        damaged = _quick_damage(run_dir / "checkpoints" / f"step-{step}")
        if not damaged and not fork_problems(before, forked, step, total):
            return manifest.command("fork", run_dir, "--step", str(step), *overrides)
    return ""


def override(key: str, tree: dict[str, Any]) -> str:
    """`actor.beta=0.2`: the assignment of a tree's value."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def is_spare(run_dir: Path) -> bool:
    """Whether a folder holds nothing that would be a loss: nothing made, or what a fork's parent has as well."""
    parent = manifest.parent(run_dir)
    names = [*run_folder.MADE]
    if parent and (Path(parent["folder"]) / "checkpoints" / f"step-{parent['step']}").is_dir():
        last = max((record["step"] for record in metrics.readable_metrics(run_dir)), default=0)
        if last > parent["step"] or checkpoints.steps(run_dir / "checkpoints") not in ([], [parent["step"]]):
            return False
        names = [name for name in names if name not in ("metrics.jsonl", "checkpoints")]
    return not any((run_dir / name).is_file() or any((run_dir / name).glob("*")) for name in names)


# ---------------------------------------------------------------- what may be done


def lost(run_dir: Path, damaged: list[str]) -> str:
    """That a run had checkpoints and none is left to go on from, and what may be done; empty for a run that had none.

    Args:
        damaged: a line on each checkpoint that is there and not whole.
    """
    parent, folder = manifest.parent(run_dir), run_dir / "checkpoints"
    if damaged:
        told = f"no checkpoint in {folder} is whole: {'; '.join(damaged)}; nothing was changed. Put them back, or"
        return f"{told} {_fork_again(parent) if parent else 'remove that folder to start anew'}"
    if not parent:
        return ""
    return (
        f"{run_folder.run_name(run_dir)} is a fork of {manifest.fork_text(parent)}, and has no checkpoint any more;"
        f" {_fork_again(parent)}"
    )


def _fork_again(parent: dict[str, Any]) -> str:
    folder = Path(parent["folder"])
    if _quick_damage(folder / "checkpoints" / f"step-{parent['step']}"):
        return f"its parent {folder} has none of that step either: start another run"
    return f"fork again: {manifest.fork_again_command(parent)}"


def way_on(run_dir: Path, status: dict[str, Any]) -> str:
    """What may be done with a run that ended before it was done: a line or two, each with a command that works."""
    resume = manifest.continue_command(run_dir)
    try:
        at = point(run_dir)
        if at is None and (told := lost(run_dir, [])):
            return told
    except UserError as error:  # damaged files
        return f"it cannot go on as it is: {error}"
    can = "continue" if at else "start anew (it has no checkpoint)"
    if not status.get("mistake"):
        return f"to {can}: {resume}"
    return (
        f"to {can} when that is mended: {resume}\n"
        f"to {can} with other settings: {manifest.train_command(run_dir)} KEY=VALUE"
    )


def with_others(run_dir: Path, overrides: list[str]) -> str:
    """The command that trains with other settings than a run that has ended: goes on, forks, or is another run.

    Raises:
        UserError: what is wrong with the settings.
    """
    before, config = (config_module.load(run_dir / "config.yaml", given) for given in ([], overrides))
    keys = list(differences.between(_tree(before), _tree(config)))
    at = point(run_dir)
    goes_on = not refusal(run_dir, at, config) if at else not lost(run_dir, [])
    if read_status(run_dir).get("state") == "done":
        goes_on = goes_on and at is not None and not at.trained and set(keys) <= set(differences.LENGTH)
    if goes_on:
        return manifest.train_command(run_dir, *overrides)
    return fork_command(run_dir, config, keys) or manifest.train_command(run_dir, *overrides, anew=True)
