"""A long run does not grow: resident memory after every step, a line through its second half.

`DPO_KIT_SLOPE_STEPS=2000` (part of `make evidence`) makes it as long as the promise: below 1 MB per 1,000 steps.
"""

from __future__ import annotations

import gc
import os

import numpy as np
import psutil

from dpo_kit.engine import loop
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config

STEPS = int(os.environ.get("DPO_KIT_SLOPE_STEPS", "200"))
# So few steps see the allocator settle; the long run is held to the promise.
ALLOWED_MB_PER_1000 = 1.0 if STEPS >= 1000 else 20.0


def test_memory_does_not_grow_with_the_steps(tmp_path):
    process, found = psutil.Process(), []

    def stepped(record):
        if record["step"] % 10 == 0:
            gc.collect()
            found.append(process.memory_info().rss / 2**20)

    with one_rank() as world:
        config = tiny_config(tmp_path / "runs", "total_train_epochs=9999", f"total_train_steps={STEPS}")
        state = make_engine(world, config, store_of(random_pairs(40), tmp_path / "pairs"))
        hooks = loop.Hooks(
            stepped=stepped, evaluated=lambda *_: None, due=lambda *_: False, save=lambda _: None
        )
        loop.train(state, hooks)
    half = np.array(found[len(found) // 2 :])
    slope = np.polyfit(np.arange(len(half)) * 10, half, 1)[0] * 1000
    print(
        f"{STEPS} steps: {slope:+.2f} MB per 1,000 steps, from {half[0]:.1f} to {half[-1]:.1f} MB", flush=True
    )
    assert slope < ALLOWED_MB_PER_1000
