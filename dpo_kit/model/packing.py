"""How pairs become rows of tokens, and steps become micro-batches: pure arithmetic on token arrays.

One micro-batch is one row without padding. With a shared prompt (`share=True`) the row of a pair holds its
longest common prefix once:

    pair         chosen P P P P C C e      rejected P P P P R R R e     shared 4
    row          P P P P C C e R R R e                                  11 tokens run instead of 15
    position_ids 0 1 2 3 4 5 6 4 5 6 7
    segments     [P: 4] [C: 3] [R: 4]      R attends to P and to earlier R, never to C
    predictors   C0 and R0 are both predicted by the last P; every other token by the one before it

With `share=False` the row holds both full texts, `[P C] [P R]`, as two sequences that do not see each other.

Scored tokens are those from `max(prompt, 1)` on (a first token has no predictor). A scored token inside the
shared prefix is run and scored once and counts for both responses: `owners` lists, for each summand, the
scored token it reads and the response it belongs to (2 i for chosen, 2 i + 1 for rejected of pair i).

Not here: models, process groups, the shuffling of epochs into steps (engine/schedule).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kit.preferences import Pair


@dataclass
class Varlen:
    """A row's attention as variable-length sequences on a device; K = keys, one more per shared prefix token.

    Sequences in row order: q = [P C] over k = [P C], then q = [R] over k = [P R], causal from the bottom right.
    """

    cu_q: Tensor  # (2P + 1,) int32, where the queries of each sequence begin
    cu_k: Tensor  # (2P + 1,) int32, the same of the keys
    max_q: int  # upper bounds, powers of two: few values make few kernels and few compiled graphs
    max_k: int
    keys: Tensor  # (K,) int64, row position of each key
    own: Tensor  # (T,) int64, where among the keys a row token stands
    again: Tensor  # (T,) int64, where a prefix token stands a second time; `own` for all others
    is_twice: Tensor  # (T,) bool, tokens that stand twice


@dataclass
class Segments:
    """What attention needs to know of a row.

    Unshared pairs are written as P = 0, C = the whole chosen text, R = the whole rejected text.
    """

    lengths: Tensor  # (P, 3) int64, always on the host: tokens of [P, C, R]
    varlen: Varlen | None = None  # on CUDA

    def to(self, device: torch.device) -> Segments:
        """Ready for attention on `device`."""
        return self if device.type == "cpu" else Segments(self.lengths, varlen(self.lengths, device))


def varlen(lengths: Tensor, device: torch.device) -> Varlen:
    """Index arrays of a row's sequences.

    Args:
        lengths: tokens of [P, C, R] of each pair. Shape: (P, 3), int64, on the host
    """
    p, c, r = lengths.numpy().T
    sizes_q = np.stack([p + c, r], 1).ravel()
    sizes_k = np.stack([p + c, p + r], 1).ravel()
    row_at, key_at = (np.concatenate([[0], np.cumsum(n)]) for n in (p + c + r, 2 * p + c + r))
    own = np.arange(row_at[-1]) + np.repeat(key_at[:-1] - row_at[:-1], p + c + r)
    again = own.copy()
    is_twice = np.zeros(row_at[-1], dtype=bool)
    keys = np.empty(key_at[-1], dtype=np.int64)
    for i, (prefix, chosen) in enumerate(zip(p.tolist(), c.tolist(), strict=True)):
        at = int(row_at[i])
        own[at + prefix + chosen : row_at[i + 1]] += prefix
        again[at : at + prefix] = own[at : at + prefix] + prefix + chosen
        is_twice[at : at + prefix] = True
        again[at + prefix : row_at[i + 1]] = own[at + prefix : row_at[i + 1]]
    keys[own] = keys[again] = np.arange(row_at[-1])

    def send(array: np.ndarray, dtype: Any) -> Tensor:
        return _sent(torch.from_numpy(array.astype(dtype)), device)

    return Varlen(
        cu_q=send(np.concatenate([[0], np.cumsum(sizes_q)]), np.int32),
        cu_k=send(np.concatenate([[0], np.cumsum(sizes_k)]), np.int32),
        max_q=1 << int(sizes_q.max() - 1).bit_length(),
        max_k=1 << int(sizes_k.max() - 1).bit_length(),
        keys=send(keys, np.int64),
        own=send(own, np.int64),
        again=send(again, np.int64),
        is_twice=send(is_twice, bool),
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; from pinned memory, or the copy would make the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class MicroBatch:
    """One row of packed pairs. T = tokens run, S = scored tokens, N = summands, P = pairs."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    segments: Segments
    predictors: Tensor  # (S,) int64, row positions whose hidden state predicts a scored token
    targets: Tensor  # (S,) int64, the scored tokens
    summands: Tensor  # (N,) int64, index into the S scored tokens
    owners: Tensor  # (N,) int64, response that the summand belongs to, in 0 .. 2P-1
    lens: Tensor  # (2P,) int64, scored tokens of each response
    weights: Tensor  # (P,) float64, 1 for a pair, 0 for the stand-in of a rank without one
    rows: Tensor  # (P,) int64, position of each pair in the store
    sources: tuple[int, ...]  # rows of the data that the pairs are from, for messages
    tokens: Tensor  # (2,) float64, tokens of the data (each prompt counted for both) and tokens run; 0 for a stand-in

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        if device.type == "cpu":
            return self
        moved = {k: _sent(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved, "segments": self.segments.to(device)})


def pair_costs(lengths: np.ndarray, share: bool) -> np.ndarray:
    """Tokens run for pairs of (shared, chosen, rejected) lengths, the latter two of the full texts.

    Args:
        lengths: of each pair, from `PairStore.all_lengths`. Shape: (P, 3)

    Returns:
        Shape: (P,)
    """
    return lengths[:, 1] + lengths[:, 2] - (lengths[:, 0] if share else 0)


def pack(
    pairs: Sequence[Pair], rows: Sequence[int], *, share: bool, weights: Sequence[float] | None = None
) -> MicroBatch:
    """Lays pairs out in one row as drawn in the module's docstring.

    Args:
        pairs: the pairs, in row order.
        rows: their positions in the store, kept for reports.
        share: run the common prefix once.
        weights: 1 or 0 for each pair; 1 when left out.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    summands: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    lengths: list[tuple[int, int, int]] = []
    lens: list[int] = []
    base = scored = 0
    for i, pair in enumerate(pairs):
        shared = int(pair.shared) if share else 0
        chosen, rejected = np.asarray(pair.chosen_ids), np.asarray(pair.rejected_ids)
        tail = rejected[shared:]
        ids += [chosen, tail]
        positions += [np.arange(len(chosen)), np.arange(shared, len(rejected))]
        lengths.append((shared, len(chosen) - shared, len(tail)))
        start = max(int(pair.prompt), 1)
        both = max(shared - start, 0)  # scored tokens inside the shared prefix
        tail_at = base + len(chosen)
        first = max(start, shared)  # the rejected tail's first scored token
        predictors.append(base + np.arange(start - 1, len(chosen) - 1))
        targets.append(chosen[start:])
        tail_predictors = tail_at + np.arange(first, len(rejected)) - shared - 1
        if shared and first == shared:
            tail_predictors[0] = base + shared - 1
        predictors.append(tail_predictors)
        targets.append(rejected[first:])
        num_chosen, num_tail = len(chosen) - start, len(rejected) - first
        of_chosen = scored + np.arange(num_chosen)
        of_rejected = np.concatenate([of_chosen[:both], scored + num_chosen + np.arange(num_tail)])
        summands += [of_chosen, of_rejected]
        owners += [np.full(len(of_chosen), 2 * i), np.full(len(of_rejected), 2 * i + 1)]
        lens += [len(of_chosen), len(of_rejected)]
        base += len(chosen) + len(tail)
        scored += num_chosen + num_tail
    data_tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    weight = torch.tensor(list(weights) if weights is not None else [1.0] * len(pairs), dtype=torch.float64)
    return MicroBatch(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        segments=Segments(torch.tensor(lengths)),
        predictors=_int64(predictors),
        targets=_int64(targets),
        summands=_int64(summands),
        owners=_int64(owners),
        lens=torch.tensor(lens),
        weights=weight,
        rows=torch.tensor(list(rows)),
        sources=tuple(int(pair.index) for pair in pairs),
        tokens=torch.tensor([data_tokens, base], dtype=torch.float64) * (weight.sum() > 0),
    )


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def response_sums(logps: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sums scored tokens per response in float64.

    Args:
        logps: log-prob of each scored token. Shape: (S,)

    Returns:
        Chosen and rejected log-probs in nats. Shapes: (P,), (P,), float64
    """
    sums = torch.zeros(len(batch.lens), dtype=torch.float64, device=logps.device)
    sums = sums.index_add(0, batch.owners, logps.double()[batch.summands])
    return sums[0::2], sums[1::2]


def plan_step(
    costs: Sequence[int], num_ranks: int, max_tokens: int, work: Sequence[float] | None = None
) -> list[list[list[int]]]:
    """Spreads the pairs of one step over ranks and micro-batches; the result does not change the step.

    Most work first, to the rank with the least of it; on each rank first-fit decreasing under `max_tokens`.
    Every rank gets the same number of micro-batches (collectives run in lockstep): an empty list is one
    that a rank fills with a zero-weight pair.

    Args:
        costs: tokens run for each pair.
        num_ranks: data-parallel ranks.
        max_tokens: tokens of a micro-batch at most; a pair that is longer gets one of its own.
        work: FLOPs of each pair, to balance the ranks by; the tokens when left out.

    Returns:
        `plan[rank][micro_batch]` = positions into `costs`; the longest micro-batch of a rank comes first.
    """
    work = costs if work is None else work
    mine: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for i in sorted(range(len(costs)), key=lambda i: (-work[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        mine[rank].append(i)
        load[rank] += work[i]
    longest_first = [sorted(items, key=lambda i: (-costs[i], i)) for items in mine]
    plan = [_first_fit(items, costs, max_tokens) for items in longest_first]
    num_micro_batches = max(len(p) for p in plan)
    return [p + [[]] * (num_micro_batches - len(p)) for p in plan]


def _first_fit(items: list[int], costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in items:
        for b, left in enumerate(room):
            if costs[i] <= left:
                bins[b].append(i)
                room[b] -= costs[i]
                break
        else:
            bins.append([i])
            room.append(max_tokens - costs[i])
    return bins
