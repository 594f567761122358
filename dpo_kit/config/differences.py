"""What makes two configurations the same run: which keys may change when a run goes on, and which may not.

Content stands before names: data and weights are compared by fingerprint, so that moved files are the same files.
Not here: where the facts are from, and what is done about a difference (records/resuming).
"""

from __future__ import annotations

import warnings
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.errors import UserError

# Keys whose content counts, and not the name.
PLACES = ("actor.path", "ref.path", "tokenizer_path", "train_dataset.path", "valid_dataset.path")
# Keys, or sections, that leave every step as it is: names and places, machines, how long and how often.
FREE = (
    "experiment_name",
    "trial_name",
    "total_train_epochs",
    "total_train_steps",
    "cluster",
    "scheduler",
    "saver",
    "recover",
    "evaluator",
    "stats_logger",
    "actor.backend",
    "actor.mb_spec",
    "actor.gradient_checkpointing",
    "actor.compile",
    "ref.backend",
    "ref.mb_spec",
    *PLACES,
)
# Keys that say which weights are trained, and what they are.
ADAPTERS = ("actor.use_lora", "actor.lora_rank", "actor.lora_alpha", "actor.target_modules")
LENGTH = ("total_train_epochs", "total_train_steps")
# What a checkpoint records of content, and the key that names it.
_CONTENT = {
    "train": "train_dataset",
    "valid": "valid_dataset",
    "weights.actor": "actor.path",
    "weights.ref": "ref.path",
}
CONTENT = "the content of "


def between(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """Keys in which two configuration trees differ, each with both values: `{"actor.beta": "0.1 -> 0.2"}`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= between(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        return found
    return {} if old == new else {prefix: f"{old} -> {new}"}


def changed(old: Any, new: Any) -> dict[str, str]:
    """Those of the `differences` that would make another run of it."""
    return {key: text for key, text in between(old, new).items() if not is_free(key)}


def refused(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Why what is meant now may not go on from what was: settings and content that would change a step.

    Args:
        then: what a checkpoint says that it is of: `config` (a tree) and the fingerprints `train`, `valid`, `weights`.
        now: the same of a configuration. A fingerprint that either does not know is not compared.

    Returns:
        Each difference with both values, as `differences` does; that of content is called `the content of ...`.
    """
    found = changed(_with_defaults(then["config"]), now["config"])
    known = [name for name in ("train", "valid", "weights") if name in then and name in now]
    before, after = ({name: _short(marks[name]) for name in known} for marks in (then, now))
    content = between(before, after)
    if content:  # the names of what has another content
        found |= {key: text for key, text in between(then["config"], now["config"]).items() if key in PLACES}
    return found | {f"{CONTENT}{_CONTENT.get(key, key)}": text for key, text in content.items()}


def _short(marks: Any) -> Any:
    """Fingerprints as people compare them."""
    if isinstance(marks, dict):
        return {key: _short(mark) for key, mark in marks.items()}
    return marks[:12] if isinstance(marks, str) else marks


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as this version understands it: keys that came later have their defaults."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return config_module.to_tree(config_module.from_tree(tree))
    except UserError:
        return tree


def changes_pairs(key: str) -> bool:
    """Whether another value of the key would change which pairs a step sees, so that not even a fork may have it."""
    return key == "seed" or key.startswith("train_dataset.") or key.startswith(CONTENT)


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of the key."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def text(found: dict[str, str]) -> str:
    """Differences in one line."""
    return ", ".join(f"{key}: {text}" for key, text in found.items())
