"""Log-probs of chosen tokens straight from hidden states, without a [tokens, vocabulary] tensor.

Shape legend: T = scored tokens, D = hidden size, V = vocabulary, K = tokens of one chunk.

`token_logps(hidden, weight, targets)` equals, forward and gradient,

    torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]

(float64 stays float64), holding one chunk of [K, V] at a time: the forward keeps only log Z per token, the
backward makes each chunk's logits again. Where one chunk is all there is, it is kept instead: the backward needs
one in any case, and it comes next. Not here: which tokens are scored (`packing`), sums over a
response, any sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.model.costs import HEAD_CHUNK_ELEMENTS

MIN_CHUNK_TOKENS = 64


def chunk_tokens(num_tokens: int, vocab_size: int, *, cuda: bool = False) -> int:
    """Tokens of one chunk: as many as `HEAD_CHUNK_ELEMENTS` holds, in equal parts."""
    most = max(MIN_CHUNK_TOKENS, HEAD_CHUNK_ELEMENTS["cuda" if cuda else "cpu"] // vocab_size)
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int, keep: bool) -> Tensor:
        logps, log_zs = [], []
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            # In place, pass after pass: a fresh [K, V] tensor costs more than the arithmetic on it.
            logits = _upcast(h @ weight.T)
            picked = logits.gather(-1, t[:, None])[:, 0]
            largest = logits.amax(-1)
            log_z = logits.sub_(largest[:, None]).exp_().sum(-1).log()
            logps.append(picked - largest - log_z)
            log_zs.append(log_z + largest)
            ctx.kept = (logits, log_z) if keep and size >= len(targets) else None
        ctx.size = size
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_zs))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # used up: a second backward makes the logits again
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in at least fp32: bf16 running sums would lose the small late chunks.
        grad_weight = _upcast(torch.zeros_like(weight)) if ctx.needs_input_grad[1] and not kept else None
        for start in range(0, len(targets), ctx.size):
            rows = slice(start, start + ctx.size)
            h, t, g = hidden[rows], targets[rows], grads[0][rows, None]
            # d logp / d logits = onehot(target) - softmax(logits)
            if kept:
                grad_logits = kept[0].mul_(-g * (-kept[1]).exp()[:, None])
            else:
                grad_logits = _upcast(h @ weight.T).sub_(log_z[rows, None]).exp_().mul_(-g)
            grad_logits.scatter_add_(-1, t[:, None], g.to(grad_logits.dtype))
            grad_logits = grad_logits.to(weight.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if not ctx.needs_input_grad[1]:
                continue
            if grad_weight is None:
                grad_weight = grad_logits.T @ h
            elif grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, h)
            else:
                grad_weight += grad_logits.T @ h
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """log p(target) of each row; equals the plain code in the module's docstring.

    Args:
        hidden: hidden states that predict the targets. Shape: (T, D)
        weight: output embedding. Shape: (V, D), same dtype as `hidden`
        targets: token ids. Shape: (T,), int64
        chunk: tokens of one chunk; chosen by `chunk_tokens` when left out. Any value gives the same result.

    Returns:
        Log-probs in nats, fp32 (float64 for float64 input). Shape: (T,)
    """
    if len(targets) == 0:
        return (hidden.sum() + weight.sum()).reshape(1)[:0]
    size = chunk or chunk_tokens(len(targets), weight.shape[0], cuda=weight.is_cuda)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogps.apply(hidden, weight, targets, size, keep)


def logps_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each row of logits that are there anyway.

    Args:
        logits: Shape: (T, V)
        targets: Shape: (T,), int64

    Returns:
        Log-probs in nats, fp32 (float64 for float64 input). Shape: (T,)
    """
    logits = _upcast(logits)
    return logits.gather(-1, targets[:, None])[:, 0] - torch.logsumexp(logits, -1)


class LogprobHead(nn.Linear):
    """The model's `lm_head`, able to answer with log-probs of given targets instead of logits.

    It must be the module itself that computes them: under FSDP2 the weight is whole only inside its
    module's forward.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LogprobHead:
        """Wraps an output layer, sharing its weight (so that tied weights stay tied)."""
        if linear.bias is not None:
            raise ValueError("an lm_head with a bias is not supported")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., V), or with `targets` (T,) the log-probs (T,) of the rows of `hidden` (T, D)."""
        if targets is None:
            return super().forward(hidden)
        return token_logps(hidden, self.weight, targets)
