"""What makes two configurations the same run: which keys may change when a run goes on, and which may not.

Content stands before names: data and weights are compared by fingerprint (`worker`), so that moved files are the same
files. Not here: what is done about a difference (`launch`, `worker`).
"""

from __future__ import annotations

from typing import Any

# Keys, or sections, that leave every step as it is: names and places, machines, how long and how often.
FREE = (
    "experiment_name",
    "trial_name",
    "tokenizer_path",
    "total_train_epochs",
    "total_train_steps",
    "cluster",
    "scheduler",
    "saver",
    "recover",
    "evaluator",
    "stats_logger",
    "actor.path",
    "actor.backend",
    "actor.mb_spec",
    "actor.gradient_checkpointing",
    "actor.compile",
    "ref.path",
    "ref.backend",
    "ref.mb_spec",
    "train_dataset.path",
    "valid_dataset.path",
)
LENGTH = ("total_train_epochs", "total_train_steps")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """Keys in which two configuration trees differ, each with both values: `{"actor.beta": "0.1 -> 0.2"}`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        return found
    return {} if old == new else {prefix: f"{old} -> {new}"}


def changed(old: Any, new: Any) -> dict[str, str]:
    """Those of the `differences` that would make another run of it."""
    return {key: text for key, text in differences(old, new).items() if not is_free(key)}


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of the key."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def told(found: dict[str, str]) -> str:
    """Differences in one line."""
    return ", ".join(f"{key}: {text}" for key, text in found.items())
