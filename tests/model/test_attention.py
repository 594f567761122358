"""Attention over packed rows against the plain way, and the CUDA layout against its meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from dpo_kit.model import attention, packing

LENGTHS = torch.tensor([[30, 20, 25], [0, 1, 1], [1, 1, 7], [5, 4, 3], [0, 9, 2]])


def inputs(kv_heads, dtype=torch.float64, heads=4):
    torch.manual_seed(1)
    num_tokens = int(LENGTHS.sum())
    shapes = [(1, num_tokens, h, 16) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def with_gradients(function, tensors):
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


def plain(q, k, v):
    return attention._one_by_one(q, k, v, LENGTHS, 0.25)


@pytest.mark.parametrize("repeats", [False, True], ids=["grouped keys", "repeated keys"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_flash_calls_joined_equal_one_masked_call(kv_heads, repeats, monkeypatch):
    monkeypatch.setattr(attention, "_repeats_keys", lambda: repeats)
    tensors = inputs(kv_heads)
    ours = with_gradients(lambda q, k, v: attention.packed_flash(q, k, v, LENGTHS, 0.25)[0], tensors)
    for a, b in zip(ours, with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_bfloat16_is_as_near_to_the_truth_as_one_masked_call():
    exact = with_gradients(plain, inputs(2))
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs(2)]
    ours = with_gradients(lambda q, k, v: attention.packed_flash(q, k, v, LENGTHS, 0.25)[0], halves)
    theirs = with_gradients(plain, halves)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a.double() - truth).norm() <= 1.5 * (b.double() - truth).norm()


def varlen_by_words(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size=(-1, -1), **_):
    """What `torch.nn.attention.varlen` documents, in plain code: causal from the bottom right."""
    assert window_size == (-1, 0)
    group = q.shape[1] // k.shape[1]
    outputs = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        queries = q[a:b].transpose(0, 1)
        keys, values = (x[c:d].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        rows, columns = queries.shape[1], keys.shape[1]
        assert rows <= max_q
        assert columns <= max_k
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def test_the_sequences_given_to_cuda_mean_the_same(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_words)
    monkeypatch.setattr(attention, "_options", lambda: {"window_size": (-1, 0)})
    index = packing.varlen(LENGTHS, torch.device("cpu"))
    tensors = inputs(2)
    ours = with_gradients(lambda q, k, v: attention._on_cuda(q, k, v, index, 0.25), tensors)
    for a, b in zip(ours, with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_this_torch_knows_the_options_given_to_its_kernel():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    assert attention._options().keys() <= known.keys()
    assert {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale"} <= known.keys()


def test_attention_without_segments_is_an_error():
    with pytest.raises(ValueError, match="segments"):
        attention.packed_attention(None, *inputs(2), None)


@pytest.mark.parametrize(
    ("model_type", "options", "longest", "why"),
    [
        ("mistral", {"sliding_window": 16}, 16, ""),
        (
            "mistral",
            {"sliding_window": 16},
            17,
            "its attention window of 16 tokens is shorter than the longest text",
        ),
        ("mistral", {"sliding_window": None}, 10**6, ""),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 10**6, ""),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, 17, "window of 16"),
        ("llama", {"attn_logit_softcapping": 30.0}, 5, "a soft cap on attention logits"),
        ("gpt2", {}, 5, "model type 'gpt2' is none of llama, qwen2, qwen3, mistral"),
    ],
)
def test_what_is_not_packed_and_why(model_type, options, longest, why):
    found = attention.unsupported(AutoConfig.for_model(model_type, **options), longest)
    assert why in found
    assert bool(found) == bool(why)
