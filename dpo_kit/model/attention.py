"""Attention over packed pairs, plugged into unchanged transformers models.

Importing registers nothing: `register()` makes the name `dpo_kit` known to transformers. No mask function is
registered for that name, so transformers builds no mask and never guesses sequence borders from
`position_ids`; what may be seen is decided here, from the `segments` that the caller hands to `model(...)`.

    row   P P P P C C e R R R e           two attention sequences a pair:
          q = [P C], k = [P C]            causal
          q = [R],   k = [P R]            causal from the bottom right: the last R sees all

On CUDA both are sequences of one `torch.nn.attention.varlen` call. On the CPU each pair is two causal calls of
torch's own flash kernel and one without a mask (R over P), joined by their log-sum-exp: no mask is built, no
key copied. A pair's result does not depend on what else is in the row. Not here: windows, soft caps, other
architectures; `unsupported` says so, and `pair_model` then runs them without packing.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_kit.model.packing import Segments, Varlen
from dpo_kit.model.split_sizes import MODEL_TYPES

NAME = "dpo_kit"


def register() -> None:
    """Makes `attn_implementation="dpo_kit"` known to transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def unsupported(config: Any, longest_tokens: int) -> str:
    """Why this module must not compute a model's attention, in words; empty where it may.

    Args:
        config: a transformers configuration.
        longest_tokens: the longest text of the data: a window at least as long changes nothing.
    """
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is none of {', '.join(MODEL_TYPES)}"
    window = getattr(config, "sliding_window", None)
    switched_off = getattr(config, "use_sliding_window", None) is False
    if window and not switched_off and window < longest_tokens:
        return f"its attention window of {window} tokens is shorter than the longest text ({longest_tokens} tokens)"
    if getattr(config, "attn_logit_softcapping", None):
        return "it has a soft cap on attention logits"
    return ""


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    on_cuda = segments.varlen is not None
    if dropout or (on_cuda and query.dtype == torch.float32):  # varlen kernels know half precision only
        return _one_by_one(query, key, value, segments.lengths, scale, dropout), None
    if segments.varlen is not None:
        return _on_cuda(query, key, value, segments.varlen, scale), None
    return packed_flash(query, key, value, segments.lengths, scale)[0], None


# --- CPU -----------------------------------------------------------------------------------------------------


def _parts(lengths: Tensor) -> list[tuple[slice, slice, slice]]:
    """Row positions of each pair's [P C], P and R. Read as numpy: the lengths are on the host, nothing waits."""
    parts, at = [], 0
    for p, c, r in lengths.numpy().tolist():
        middle = at + p + c
        parts.append((slice(at, middle), slice(at, at + p), slice(middle, middle + r)))
        at = middle + r
    return parts


@cache
def _repeats_keys() -> bool:
    """Whether this torch's kernel wants the keys of a group repeated for each of its query heads."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    try:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)[0]
    except RuntimeError:
        return True
    kk = k.expand(1, 2, 3, 8)
    return not torch.allclose(found, F.scaled_dot_product_attention(q, kk, kk, is_causal=True), atol=1e-5)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output (1, heads, q, head_dim) and log-sum-exp (1, heads, q) of one attention call."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and _repeats_keys():
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `rest` is output, log-sum-exp, whether causal, and the scale."""
    out, lse, causal, scale = rest
    group = q.shape[1] // k.shape[1]
    repeat = group > 1 and _repeats_keys()
    if repeat:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    if repeat:
        dk, dv = dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    heads, num_tokens, size = q.shape[1:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(1, num_tokens, heads, size), q.new_empty(1, num_tokens, heads, dtype=dtype)


@torch.library.custom_op("dpo_kit::packed_flash", mutates_args=())
def packed_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a packed row on the CPU; one operator, so that compiled graphs go around it.

    Args:
        q: (1, heads, T, head_dim); `k`, `v`: (1, kv_heads, T, head_dim)
        lengths: tokens of [P, C, R] of each pair. Shape: (P, 3), int64

    Returns:
        Output (1, T, heads, head_dim) and log-sum-exp (1, T, heads).
    """
    out, lse = _outputs(q)
    for first, prefix, last in _parts(lengths):
        o, z = _kernel(q[:, :, first], k[:, :, first], v[:, :, first], True, scale)
        out[:, first], lse[:, first] = o.transpose(1, 2), z.transpose(1, 2)
        if last.start == last.stop:
            continue
        o, z = _kernel(q[:, :, last], k[:, :, last], v[:, :, last], True, scale)
        if prefix.start < prefix.stop:
            over_p, z_p = _kernel(q[:, :, last], k[:, :, prefix], v[:, :, prefix], False, scale)
            joint = torch.logaddexp(z, z_p)
            o = o * (z - joint).exp()[..., None] + over_p * (z_p - joint).exp()[..., None]
            z = joint
        out[:, last], lse[:, last] = o.transpose(1, 2), z.transpose(1, 2)
    return out, lse


@packed_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("dpo_kit::packed_flash_backward", mutates_args=())
def packed_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_flash`; with the joint log-sum-exp each call's share of R's softmax comes out whole."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    grad, out, lse = grad.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)

    def part(at: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        mine = (x[:, :, at] for x in (grad, q))
        return _kernel_backward(
            *mine, k[:, :, keys], v[:, :, keys], out[:, :, at], lse[:, :, at], causal, scale
        )

    for first, prefix, last in _parts(lengths):
        dq[:, :, first], dk[:, :, first], dv[:, :, first] = part(first, first, True)
        if last.start == last.stop:
            continue
        dq[:, :, last], dk[:, :, last], dv[:, :, last] = part(last, last, True)
        if prefix.start < prefix.stop:
            more_q, more_k, more_v = part(last, prefix, False)
            dq[:, :, last] += more_q
            dk[:, :, prefix] += more_k
            dv[:, :, prefix] += more_v
    return dq, dk, dv


@packed_flash_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lengths = ctx.saved_tensors
    return *packed_flash_backward(grad, q, k, v, out, lse, lengths, ctx.scale), None, None


packed_flash.register_autograd(_backward, setup_context=_keep)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """The plain way, on any device: one call of torch's public attention a sequence, with a mask for R."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outputs = []
    for first, prefix, last in _parts(lengths):
        a, b, c = (x[:, :, first] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, dropout_p=p))
        rows, before = last.stop - last.start, prefix.stop - prefix.start
        if rows:
            mask = torch.ones(rows, before + rows, dtype=torch.bool, device=q.device).tril(before)
            keys, values = (torch.cat((x[:, :, prefix], x[:, :, last]), 2) for x in (k, v))
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, last], keys, values, attn_mask=mask, scale=scale, dropout_p=p
                )
            )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


# --- CUDA ----------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Keys in the order of `Varlen`; the backward adds a prefix token's two gradients without atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Varlen) -> Tensor:
        ctx.index = index
        return rows.index_select(0, index.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        index: Varlen = ctx.index
        own, again = (grads[0].index_select(0, at) for at in (index.own, index.again))
        return own + again * index.is_twice.view(-1, 1, 1), None


@cache
def _options() -> dict[str, Any]:
    """What this torch's `varlen_attn` calls causal, and whether it must be told of grouped keys."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, index: Varlen, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # (1, heads, T, head_dim) -> (T, heads, head_dim)
    queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
    keys, values = _Gather.apply(keys, index), _Gather.apply(values, index)
    out: Any = varlen_attn(
        queries, keys, values, index.cu_q, index.cu_k, index.max_q, index.max_k, scale=scale, **_options()
    )
    return out[None]
