"""What is done to a model's decoder blocks before they are sharded: run again in the backward, compiled.

The order is recompute, then compile, then shard, so that a compiled graph holds the whole block and FSDP2's
hooks stay outside of it. Only `forward` of each block is replaced: names of weights stay what they were.
Not here: which of it is worth having (the tables in `benchmarks/`).
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Attention is kept, for it costs most to run again for what it holds; so is every second matmul.
_ATTENTION = {
    "dpo_kit::packed_flash",
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}


def recompute(blocks: Sequence[nn.Module], how: bool | str) -> None:
    """Runs blocks again in the backward instead of keeping their activations.

    Args:
        how: True keeps the input of each block only; `selective` also attention and every second matmul.
    """
    if how:
        forward = _selectively if how == "selective" else _wholly
        for block in blocks:
            block.forward = types.MethodType(forward, block)  # type: ignore[method-assign]


def compile_blocks(blocks: Sequence[nn.Module], *, dynamic: bool | None, backend: str = "inductor") -> None:
    """Compiles each block by itself; blocks are alike, so one graph serves all.

    Args:
        dynamic: whether the number of tokens is a variable of the graph; see `torch.compile`.
    """
    # With and without gradients, in training and in evaluation: each is a graph.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic, backend=backend)  # type: ignore[method-assign]


def _wholly(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(self).forward, self, *args, use_reentrant=False, **kwargs)


def _selectively(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(self).forward, self, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _contexts() -> Any:
    seen = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op._schema.name in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op == torch.ops.aten.mm.default:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
