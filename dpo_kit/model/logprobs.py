"""Log-probs of chosen tokens straight from hidden states, without a [tokens, vocabulary] tensor.

Shape legend: T = scored tokens, D = hidden size, V = vocabulary, K = tokens of one chunk.

`token_logps(hidden, weight, targets)` equals, forward and gradient,

    torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]

(float64 stays float64), holding one chunk of [K, V] at a time: the forward keeps only log Z per token, the
backward makes each chunk's logits again. Where one chunk is all there is, it is kept instead: the backward needs
one in any case, and it comes next.

With a `group` each of its ranks holds an equal part of the vocabulary and computes [K, V / ranks]; what crosses
the ranks is three numbers a token (the largest logit; the target's and the sum of exponentials) and, in the
backward, the gradient of the hidden states. Not here: which tokens are scored (`packing`), sums over a response,
any sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int, keep: bool, group: Any
    ) -> Tensor:
        index, is_mine = own_targets(targets, len(weight), group)
        found: list[tuple[Tensor, ...]] = []
        for h, t in zip(hidden.split(size), index.split(size), strict=True):
            # In place, pass after pass: a fresh [K, V] tensor costs more than the arithmetic on it.
            logits = _upcast(h @ weight.T)
            picked = logits.gather(-1, t[:, None])[:, 0]
            largest = logits.amax(-1)
            found.append((picked, largest, logits.sub_(largest[:, None]).exp_().sum(-1)))
            ctx.kept = (logits, largest) if keep and size >= len(targets) else None
        picked, largest, log_z = over_vocabulary(found, is_mine, group)
        ctx.size, ctx.group = size, group
        ctx.save_for_backward(hidden, weight, targets, largest, log_z)
        return picked - largest - log_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, largest, log_z = ctx.saved_tensors
        index, is_mine = own_targets(targets, len(weight), ctx.group)
        kept, ctx.kept = ctx.kept, None  # used up: a second backward makes the logits again
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in at least fp32: bf16 running sums would lose the small late chunks.
        grad_weight = _upcast(torch.zeros_like(weight)) if ctx.needs_input_grad[1] and not kept else None
        for start in range(0, len(targets), ctx.size):
            rows = slice(start, start + ctx.size)
            h, t, g = hidden[rows], index[rows], grads[0][rows, None]
            # d logp / d logits = onehot(target) - softmax(logits)
            if kept:
                scale = (kept[1] - largest - log_z).exp()
                grad_logits = kept[0].mul_(-g * scale[:, None])
            else:
                log_zs = (log_z + largest)[rows, None]
                grad_logits = _upcast(h @ weight.T).sub_(log_zs).exp_().mul_(-g)
            here = g if is_mine is None else g * is_mine[rows, None]
            grad_logits.scatter_add_(-1, t[:, None], here.to(grad_logits.dtype))
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
        if ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def own_targets(targets: Tensor, num_words: int, group: Any) -> tuple[Tensor, Any]:
    """Where this rank's part of the vocabulary holds token ids, and which of them it does hold.

    Args:
        targets: token ids, of any shape.
        num_words: tokens of a part.
        group: ranks that hold one part each, in rank order; None: this rank holds all.

    Returns:
        Index into the part, 0 for a token that another rank holds, and the mask of those held here (None: all).
    """
    if group is None:
        return targets, None
    index = targets - num_words * group.rank()
    is_mine = (index >= 0) & (index < num_words)
    return index * is_mine, is_mine


def over_vocabulary(
    found: Sequence[tuple[Tensor, ...]], is_mine: Any, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What the ranks of `group` know of each token, put together; equals the same over whole rows of logits.

    Args:
        found: of each chunk the target's logit, the largest logit of this rank's part, and the sum of
            exp(logit - largest) over it. Shapes: (K,), (K,), (K,)
        is_mine: tokens whose target this rank holds. Shape: (T,)

    Returns:
        The target's logit, the largest one, and log of the sum of exp(logit - largest). Shapes: (T,), (T,), (T,)
    """
    picked, largest, sums = map(torch.cat, zip(*found, strict=True))
    if group is None:
        return picked, largest, sums.log()
    highest = largest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    both = torch.stack([picked.where(is_mine, 0.0), sums * (largest - highest).exp()])
    dist.all_reduce(both, group=group)
    return both[0], highest, both[1].log()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None, group: Any = None
) -> Tensor:
    """log p(target) of each row; equals the plain code in the module's docstring.

    Args:
        hidden: hidden states that predict the targets, the same on every rank of `group`. Shape: (T, D)
        weight: output embedding. Shape: (V, D), same dtype as `hidden`; with a group (V / ranks, D)
        targets: token ids. Shape: (T,), int64
        chunk: tokens of one chunk; chosen by `chunk_tokens` when left out. Any value gives the same result.
        group: ranks that hold equal parts of the vocabulary, in rank order; None: this rank holds all of it.

    Returns:
        Log-probs in nats, fp32 (float64 for float64 input). Shape: (T,)
    """
    if len(targets) == 0:
        return (hidden.sum() + weight.sum()).reshape(1)[:0]
    size = chunk or chunk_tokens(len(targets), weight.shape[0], cuda=weight.is_cuda)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogps.apply(hidden, weight, targets, size, keep, group)


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

    group: Any = None  # see `token_logps`; its weight is then this rank's part of the vocabulary

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LogprobHead:
        """Wraps an output layer, sharing its weight (so that tied weights stay tied)."""
        if linear.bias is not None:
            raise ValueError("an lm_head with a bias is not supported")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., V) of the words held, or with `targets` (T,) log-probs (T,) of the rows of `hidden` (T, D)."""
        if targets is None:
            return super().forward(hidden)
        return token_logps(hidden, self.weight, targets, group=self.group)
