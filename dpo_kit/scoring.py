"""Scores every pair of a dataset under policy and reference: the command `dpo-kit score`.

One process, forward only, through the same packed path as training. Not here: training, many ranks.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dpo_kit import builtin, engine, worker
from dpo_kit.config import Config
from dpo_kit.engine import Engine
from dpo_kit.files import atomic_write, to_json
from dpo_kit.parallel import init_world
from dpo_kit.preferences import PairStore


def score(config: Config, store: PairStore, out: Path, progress: Any = lambda *_a, **_k: None) -> dict[str, Any]:
    """Writes one JSON line a pair, in dataset order, to `out`; the file appears when all are there.

    The lines hold summed log-probs in nats at full precision; their fields are listed in `docs/design.md`.

    Args:
        config: model, loss and reference; the reference's values come from its cache where it has them.
        store: the pairs.
        progress: called as in `engine.Engine`.

    Returns:
        The means over all pairs, under `dpo-eval/` names.
    """
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cuda = torch.cuda.is_available() and config.cluster.n_gpus_per_node != 0
    with tempfile.TemporaryDirectory() as folder:
        world = init_world(cuda=cuda, init_method=f"file://{folder}/init")
        try:
            builtin.ensure(config.actor.path)
            policy = worker.load_model(config, config.actor.path, config.actor.dtype, world, [store], trainable=False)
            state = Engine(config, world, policy, train=store, valid=store, progress=progress)
            worker.prepare_reference(state, Path(config.cluster.fileroot))
            means, lines = engine.evaluate(state)
        finally:
            torch.distributed.destroy_process_group()
    atomic_write(out, "".join(to_json(line) + "\n" for line in lines))
    return means
