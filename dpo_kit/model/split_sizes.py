"""Whether a model can be split over tensor-parallel ranks, told from its config.json without torch.

Heads stay whole, and every rank gets equal parts: of query heads, key-value heads, the gated layer and the vocabulary.

Not here: the splitting (`tensor_parallel`).
"""

from __future__ import annotations

import math
from typing import Any

from dpo_kit.model.costs import Shape

# Model types whose attention is packed here, and whose plans of tensor parallelism are known.
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")


def problem(made: dict[str, Any], tp_size: int) -> str:
    """Why a model cannot be split, with what can be done, in words; empty where it can.

    Args:
        made: its config.json.
        tp_size: ranks that are to share each layer.
    """
    if tp_size == 1:
        return ""
    if made.get("model_type") not in MODEL_TYPES:
        kinds = ", ".join(MODEL_TYPES)
        return (
            f"no plan is known of how to split a model of type {made.get('model_type')!r} ({kinds}); use t1"
        )
    shape = Shape.of(made)
    sizes = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "columns of the gated layer": shape.intermediate,
        "rows of the vocabulary": shape.vocab,
    }
    odd = [f"{size} {name}" for name, size in sizes.items() if size % tp_size]
    if not odd:
        return ""
    common = math.gcd(*sizes.values())
    fitting = [f"t{t}" for t in range(1, common + 1) if common % t == 0]
    return f"{' and '.join(odd)} do not divide by {tp_size}; use {' or '.join(fitting)}"
