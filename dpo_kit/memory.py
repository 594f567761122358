"""Bytes of one rank at the peak of a training step, as a sum of named parts. Plain arithmetic, no torch.

The peak is where the forward ends and the backward begins: everything that the backward needs is there, and
the log-prob head works on its first chunk. With N ranks, S bytes a master weight and c bytes a value in the
compute dtype:

    weights      S params / N                      master weights, fp32 (float64 for float64)
    optimizer    2 s params / N                    exp_avg and exp_avg_sq, s = 4, or 2 for bfloat16 states
    gradients    S params / N                      of earlier micro-batches
    gathered     c params, or with N > 1 only the head's group and two blocks
    reference    the same for a frozen model in its own dtype, where `ref.logps` is `online`
    activations  what every block keeps for the backward, by `actor.gradient_checkpointing`
    working      the larger of the head's chunk and one block run again
    process      interpreter and libraries; on CUDA what the driver and NCCL take

Not here: seconds, disk and the report (`estimate`); which pairs share a micro-batch (`packing`).
"""

from __future__ import annotations

import copy
from typing import Any

from dpo_kit.config import Config
from dpo_kit.costs import Shape

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
# Elements of one chunk of logits; the same number as `logprobs.CHUNK_ELEMENTS`, which needs torch.
HEAD_CHUNK_ELEMENTS = 1 << 25
CPU_PROCESS_BYTES = 480 * 2**20
CUDA_PROCESS_BYTES = 1200 * 2**20
# Of the tokens of a pair, how many are its shared prefix: their keys and values are kept twice.
TYPICAL_PREFIX_SHARE = 0.4
MOST_TOKENS = 1 << 24
# More tokens a micro-batch are not worth a word.
PROPOSED_TOKENS = 16384


def step_bytes(shape: Shape, config: Config, *, num_ranks: int, tokens: int) -> dict[str, int]:
    """Bytes of one rank at the peak of a step, by part (see the module's docstring).

    Args:
        shape: of the policy; an online reference is taken to have the same.
        config: dtype, gradient checkpointing, optimizer states and reference are read.
        num_ranks: data-parallel ranks.
        tokens: tokens run in the largest micro-batch.
    """
    actor = config.actor
    compute = DTYPE_BYTES[actor.dtype]
    master = max(compute, 4)
    on_cuda = config.cluster.n_gpus_per_node not in (0, "auto")
    parts = {
        "weights": shape.params * master // num_ranks,
        "optimizer": 2 * shape.params * _state_bytes(config) // num_ranks,
        "gradients": shape.params * master // num_ranks,
        "gathered": _gathered(shape, compute, num_ranks),
        "reference": 0,
        "activations": tokens * kept_bytes(shape, config),
        "working": max(head_bytes(shape, tokens, compute), tokens * _recomputed(shape, config)),
        "process": CUDA_PROCESS_BYTES if on_cuda else CPU_PROCESS_BYTES,
    }
    if config.ref.logps == "online":
        own = DTYPE_BYTES[config.ref.dtype]
        parts["reference"] = shape.params * own // num_ranks + _gathered(shape, own, num_ranks)
    return parts


def tokens_that_fit(shape: Shape, config: Config, *, num_ranks: int, free_bytes: int) -> int:
    """The largest micro-batch whose step fits in `free_bytes` a rank; 0 when not even the weights fit.

    Args:
        num_ranks: data-parallel ranks.
        free_bytes: of one rank. CPU ranks share the machine's memory: hand over their part of it.

    Returns:
        Tokens run, at most 2^24.
    """
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if sum(step_bytes(shape, config, num_ranks=num_ranks, tokens=middle).values()) <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def checkpoint_bytes(shape: Shape, config: Config) -> int:
    """Bytes of the master weights and both optimizer states of the whole model."""
    return shape.params * (max(DTYPE_BYTES[config.actor.dtype], 4) + 2 * _state_bytes(config))


def _state_bytes(config: Config) -> int:
    if config.actor.dtype == "float64":
        return 8
    return DTYPE_BYTES[getattr(config.actor.optimizer, "state_dtype", "float32")]


def remedy(shape: Shape, config: Config, *, num_ranks: int, free_bytes: int, longest: int) -> str:
    """Settings with which a step fits in `free_bytes` a rank, in words.

    Args:
        longest: tokens run for the longest pair, which a micro-batch must hold.
    """
    fitting = tokens_that_fit(shape, config, num_ranks=num_ranks, free_bytes=free_bytes)
    if fitting >= longest:
        return (
            f"use actor.mb_spec.max_tokens_per_mb={fitting} or less (the longest pair has {longest} tokens)"
        )
    for settings in _cheaper(config):
        tried = copy.deepcopy(config)
        for field, value in settings.items():
            section, _, name = field.rpartition(".")
            _set(tried, section.split("."), name, value)
        fitting = tokens_that_fit(shape, tried, num_ranks=num_ranks, free_bytes=free_bytes)
        if fitting >= longest:
            words = " ".join(f"{field}={str(value).lower()}" for field, value in settings.items())
            return f"use {words} actor.mb_spec.max_tokens_per_mb={min(fitting, PROPOSED_TOKENS)}"
    least = sum(step_bytes(shape, config, num_ranks=num_ranks, tokens=longest).values())
    return (
        f"the longest pair alone ({longest} tokens) needs {least / 2**30:.2f} GiB a rank, and no setting makes it"
        " fit; use a smaller model, a lower train_dataset.max_length, or a machine with more memory"
    )


def _cheaper(config: Config) -> list[dict[str, Any]]:
    """Settings that need less memory: each alone, the mildest first, then more and more of them together."""
    steps: list[dict[str, Any]] = []
    if config.actor.gradient_checkpointing is not True:
        steps.append({"actor.gradient_checkpointing": True})
    if config.ref.logps == "online":
        steps.append({"ref.logps": "cached"})
    if _state_bytes(config) == 4 and hasattr(config.actor.optimizer, "state_dtype"):
        steps.append({"actor.optimizer.state_dtype": "bfloat16"})
    if config.actor.dtype != "bfloat16":
        steps.append({"actor.dtype": "bfloat16"})
    together = [dict(pair for step in steps[: n + 1] for pair in step.items()) for n in range(1, len(steps))]
    return [*steps, *together]


def _set(config: Any, sections: list[str], name: str, value: Any) -> None:
    for section in sections:
        config = getattr(config, section)
    setattr(config, name, value)


def block_bytes(shape: Shape, dtype_bytes: int, prefix_share: float = TYPICAL_PREFIX_SHARE) -> int:
    """Bytes that the backward of one decoder block needs, a token.

    Two norms (input, normalised, output), queries and the attention's output twice, keys and values repeated
    over the query heads and again for the rejected response, four tensors of the gated layer.
    """
    width = shape.heads * shape.head_dim
    norms = 2 * (3 * dtype_bytes if dtype_bytes >= 4 else 4 + 2 * dtype_bytes) * shape.hidden
    attention = dtype_bytes * width * (4 + 2 * (1 + prefix_share))
    return int(norms + attention + 4 * dtype_bytes * shape.intermediate)


def kept_bytes(shape: Shape, config: Config) -> int:
    """Bytes a token that all blocks keep from the forward to the backward."""
    compute = DTYPE_BYTES[config.actor.dtype]
    mode = config.actor.gradient_checkpointing
    if mode is False:
        return shape.layers * block_bytes(shape, compute)
    kept = shape.hidden
    if mode == "selective":
        kept += 2 * shape.heads * shape.head_dim + 2 * shape.intermediate + shape.hidden
    return shape.layers * compute * kept


def _recomputed(shape: Shape, config: Config) -> int:
    """Bytes a token of the one block that is run again in the backward."""
    if config.actor.gradient_checkpointing is False:
        return 0
    return block_bytes(shape, DTYPE_BYTES[config.actor.dtype])


def head_bytes(shape: Shape, tokens: int, dtype_bytes: int) -> int:
    """Bytes that one chunk of the log-prob head needs at its peak, and the gradient of its weight."""
    elements = min(HEAD_CHUNK_ELEMENTS, tokens * shape.vocab)
    upcast = max(dtype_bytes, 4)
    chunk = elements * (2 * upcast + (dtype_bytes if dtype_bytes < upcast else 0))
    return chunk + shape.head_params * upcast


def _gathered(shape: Shape, dtype_bytes: int, num_ranks: int) -> int:
    """Weights in the compute dtype that are whole at the peak: all on one rank, else the head and two blocks."""
    head = shape.head_params * (1 if shape.tied else 2)
    blocks = shape.layers if num_ranks == 1 else min(2, shape.layers)
    return dtype_bytes * (head + blocks * shape.block_params)
