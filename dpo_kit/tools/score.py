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
from dpo_kit.engine import reference, step
from dpo_kit.engine.state import CPU_FORWARD_TOKENS, Engine, load_model
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
        policy = load_model(config, config.actor.path, config.actor.dtype, world, [store], trainable=False)
        state = Engine(config, world, policy, train=store, valid=None, progress=progress)
        state.actor_tokens, state.ref_tokens = (
            int(tokens) if tokens != "auto" else CPU_FORWARD_TOKENS
            for tokens in (s.mb_spec.max_tokens_per_mb for s in (config.actor, config.ref))
        )
        reference.prepare_reference(state, Path(config.cluster.fileroot), np.arange(len(store)))
        state.valid, state.ref_valid = store, state.ref_train
        means, lines = step.evaluate(state)
    atomic_write(out, "".join(to_json(line) + "\n" for line in lines))
    return means
