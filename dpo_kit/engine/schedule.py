"""What a run will do, before it does it: which pairs in each step, which learning rate, what comes due when.

Every function depends on nothing but its arguments, so that a step can be asked for by its number: a resumed
run, another number of ranks and a second run all see the same pairs in the same order.

Not here: ranks and micro-batches (model/packing), the loop (`loop`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_kit.config import Config
from dpo_kit.config.steps import num_steps, steps_per_epoch


def step_rows(config: Config, num_pairs: int, step: int) -> np.ndarray:
    """Rows of the store that optimizer step `step` (from 1) trains on."""
    epoch, at = divmod(step - 1, steps_per_epoch(config, num_pairs))
    size = config.train_dataset.batch_size
    return _epoch_order(config, num_pairs, epoch)[at * size : (at + 1) * size]


def rows_by_step(config: Config, num_pairs: int, done: int = 0) -> Iterator[np.ndarray]:
    """`step_rows` of every step after `done` in turn; an epoch's order is drawn once, not once a step."""
    per_epoch, size = steps_per_epoch(config, num_pairs), config.train_dataset.batch_size
    total = num_steps(config, num_pairs)
    for first in range(done // per_epoch * per_epoch, total, per_epoch):
        order = _epoch_order(config, num_pairs, first // per_epoch)
        for at in range(max(0, done - first), min(per_epoch, total - first)):
            yield order[at * size : (at + 1) * size]


def rows_of_run(config: Config, num_pairs: int) -> np.ndarray:
    """Rows of the store that the run may train on, in store order: all of them after a whole epoch."""
    steps = num_steps(config, num_pairs)
    if steps >= steps_per_epoch(config, num_pairs):
        return np.arange(num_pairs)
    return np.sort(_epoch_order(config, num_pairs, 0)[: steps * config.train_dataset.batch_size])


def is_due(section: Any, step: int, per_epoch: int) -> bool:
    """Whether `freq_steps` or `freq_epochs` of a section fall on a step; `freq_secs` is for a clock to say."""
    frequencies = (section.freq_steps or 0, (section.freq_epochs or 0) * per_epoch)
    return any(each and step % each == 0 for each in frequencies)


def times_due(section: Any, config: Config, num_pairs: int, step_s: float) -> int:
    """How often a section comes due over the run, the last step left out, where a step takes `step_s` seconds."""
    total, per_epoch = num_steps(config, num_pairs), steps_per_epoch(config, num_pairs)
    by_clock = int(step_s * total / section.freq_secs) if section.freq_secs else 0
    return sum(is_due(section, step, per_epoch) for step in range(1, total)) + by_clock


def _epoch_order(config: Config, num_pairs: int, epoch: int) -> np.ndarray:
    if not config.train_dataset.shuffle:
        return np.arange(num_pairs)
    return np.random.default_rng([config.seed, epoch]).permutation(num_pairs)


def learning_rate(step: int, total: int, optimizer: Any) -> float:
    """Learning rate of step `step` in 1..total.

    Warm-up is lr * k / W over W = ceil(warmup_steps_proportion * total) steps (never 0 at k >= 1); then
    `constant`, or `linear` / `cosine` down to min_lr_ratio * lr, reached at the last step.
    """
    warmup = math.ceil(optimizer.warmup_steps_proportion * total - 1e-9)
    if step <= warmup:
        return optimizer.lr * step / warmup
    if optimizer.lr_scheduler_type == "constant":
        return optimizer.lr
    done = (step - warmup) / max(1, total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if optimizer.lr_scheduler_type == "cosine" else 1 - done
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * left)
