"""Scores every pair of a dataset under policy and reference: the command `dpo-kit score`.

One process, forward only, through the same packed path as training. Not here: training, many ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_kit.config import Config
from dpo_kit.dataset import prepare
from dpo_kit.engine import reference, state, step
from dpo_kit.model.parallel import alone
from dpo_kit.preferences import PairStore
from dpo_kit.system.files import atomic_write, to_json


def score(
    config: Config, store: PairStore, out: Path, progress: Any = lambda *_a, **_k: None, split: str = "train"
) -> dict[str, Any]:
    """Writes one JSON line a pair, in dataset order, to `out`; the file appears when all are there.

    The lines hold summed log-probs in nats at full precision; the fields are those of `step.pair_records`.

    Args:
        config: model, loss and reference; the reference's values come from its cache where it has them.
        store: the pairs.
        progress: called as in `state.Engine`.
        split: of the store, for messages.

    Returns:
        The means over all pairs, under `dpo-eval/` names.

    Raises:
        ConfigError: models that are not whole, another tokenizer, or texts that are too long.
    """
    prepare.check_models(config)
    prepare.check_tokenizers(config)
    prepare.check_lengths(config, {split: store})
    cuda = torch.cuda.is_available() and config.cluster.n_gpus_per_node != 0
    with alone(cuda=cuda) as world:
        engine = state.build(config, world, store, trainable=False, progress=progress)
        reference.prepare(engine, np.arange(len(store)))
        means, lines = step.evaluate(engine, store, engine.ref_train)
    atomic_write(out, "".join(to_json(line) + "\n" for line in lines))
    return means
