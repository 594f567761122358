"""Attention over packed pairs, plugged into unchanged transformers models.

Importing registers nothing: `register()` makes the name `dpo_kit` known to transformers. No mask function is
registered for that name, so transformers builds no mask and never guesses sequence borders from
`position_ids`; what may be seen is decided here, from the `segments` that the caller hands to `model(...)`.

    row   P P P P C C e R R R e           two attention sequences a pair:
          q = [P C], k = [P C]            causal
          q = [R],   k = [P R]            causal from the bottom right: the last R sees all

A pair's result does not depend on what else is in the row. Not here: windows, soft caps, dropout masks that
differ between the two sequences; `check_supported` refuses such models in words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_kit.errors import UserError
from dpo_kit.packing import Segments

NAME = "dpo_kit"
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")


def register() -> None:
    """Makes `attn_implementation="dpo_kit"` known to transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def check_supported(config: Any, longest_tokens: int) -> None:
    """Refuses a model whose attention this module would compute wrongly.

    Raises:
        UserError: another architecture, a window shorter than the longest text, or a soft cap.
    """
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"actor.path: model type {config.model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
        )
    window = getattr(config, "sliding_window", None)
    switched_off = getattr(config, "use_sliding_window", None) is False
    if window and not switched_off and window < longest_tokens:
        raise UserError(
            f"actor.path: the model attends to a window of {window} tokens, shorter than the longest text "
            f"({longest_tokens} tokens); set train_dataset.max_length to {window} or less"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError("actor.path: models with a soft cap on attention logits are not supported")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for rows made by `packing.pack`.

    Args:
        query: (1, heads, T, head_dim); `key`, `value`: (1, kv_heads, T, head_dim)
        segments: lengths of the row's parts; must be given.

    Returns:
        Attention output (1, T, heads, head_dim), None.
    """
    if segments is None:
        raise ValueError("packed attention needs `segments`; pass segments=... to the model")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sizes = [n for lengths in segments.lengths for n in lengths]
    # One split of the whole row: its backward is one concatenation, where a slice a pair would allocate a
    # row of zeros each.
    q, k, v = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs: list[Tensor] = []
    for i, (prefix, _chosen, rejected) in enumerate(segments.lengths):
        p, c, r = 3 * i, 3 * i + 1, 3 * i + 2
        first_q, first_k, first_v = (torch.cat((x[p], x[c]), 2) if prefix else x[c] for x in (q, k, v))
        outputs.append(
            F.scaled_dot_product_attention(
                first_q, first_k, first_v, is_causal=True, scale=scaling, dropout_p=dropout
            )
        )
        if not prefix:
            args, mask = (q[r], k[r], v[r]), None
        else:
            args = (q[r], torch.cat((k[p], k[r]), 2), torch.cat((v[p], v[r]), 2))
            mask = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=query.device).tril(prefix)
        outputs.append(
            F.scaled_dot_product_attention(
                *args, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None
