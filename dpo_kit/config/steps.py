"""How many steps a configuration means, given a number of pairs.

Deliberately not here: which rows a step sees, its learning rate (engine/schedule).
"""

from __future__ import annotations

from dpo_kit.config.schema import Config
from dpo_kit.errors import UserError


def num_steps(config: Config, num_pairs: int) -> int:
    """Optimizer steps of the whole run: epochs over the pairs, ended early by `total_train_steps`."""
    per_epoch = steps_per_epoch(config, num_pairs)
    if per_epoch == 0:
        raise UserError(
            f"train_dataset.drop_last = true leaves no step: {num_pairs} pairs, "
            f"train_dataset.batch_size = {config.train_dataset.batch_size}; use {num_pairs} or less"
        )
    total = per_epoch * config.total_train_epochs
    return min(total, config.total_train_steps) if config.total_train_steps else total


def steps_per_epoch(config: Config, num_pairs: int) -> int:
    """Steps of one pass over the pairs; the last one runs short unless `drop_last`."""
    size = config.train_dataset.batch_size
    return num_pairs // size if config.train_dataset.drop_last else -(-num_pairs // size)
