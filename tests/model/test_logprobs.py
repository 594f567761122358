"""The log-prob head against the plain code it equals, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_kit.model.logprobs import LogprobHead, chunk_tokens, token_logps


def plain(hidden, weight, targets):
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def inputs(num_tokens, size, vocab, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (num_tokens,), generator=g)


def gradients(fn, hidden, weight, targets):
    scale = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    out = fn(hidden, weight, targets)
    (out.double() * scale).sum().backward()
    grads = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    return out.detach(), *grads


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 5, 11), (64, 16, 257), (130, 8, 1000)])
@pytest.mark.parametrize("chunk", [1, 3, 64, None])
def test_equals_the_plain_code_in_float64(shape, chunk):
    x = inputs(*shape, torch.float64)
    ours = gradients(lambda *a: token_logps(*a, chunk=chunk), *x)
    for a, b in zip(ours, gradients(plain, *x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_equals_the_plain_code_in_float32():
    x = inputs(97, 24, 503, torch.float32)
    for a, b in zip(gradients(token_logps, *x), gradients(plain, *x), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-5)


def test_bfloat16_is_no_worse_than_the_plain_code_against_float64_truth():
    x = inputs(200, 32, 999, torch.bfloat16)
    truth = gradients(plain, *(t.detach().double().requires_grad_() for t in x[:2]), x[2])
    ours, naive = gradients(lambda *a: token_logps(*a, chunk=33), *x), gradients(plain, *x)
    for a, b, t in zip(ours, naive, truth, strict=True):
        assert (a.double() - t).norm() <= 1.05 * (b.double() - t).norm()


def test_no_token_gives_no_log_prob_and_a_zero_gradient():
    hidden, weight, targets = inputs(0, 4, 9, torch.float32)
    out = token_logps(hidden, weight, targets)
    assert out.shape == (0,)
    out.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_head_shares_its_weight_and_answers_both_ways():
    linear = nn.Linear(6, 13, bias=False).double()
    head = LogprobHead.from_linear(linear)
    hidden, targets = torch.randn(5, 6, dtype=torch.float64), torch.arange(5)
    assert head.weight is linear.weight
    torch.testing.assert_close(head(hidden), linear(hidden))
    torch.testing.assert_close(head(hidden, targets), plain(hidden, linear.weight, targets))
    with pytest.raises(ValueError, match="bias"):
        LogprobHead.from_linear(nn.Linear(2, 3))


def test_chunks_cover_all_tokens_in_equal_parts():
    assert chunk_tokens(10, 1000) == 10
    assert chunk_tokens(0, 10) == 1
    size = chunk_tokens(1000, 150_000)
    assert size * 150_000 <= (1 << 25)
    assert -(-1000 // size) * size < 1000 + size
