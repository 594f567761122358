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

Not here: models, process groups, the shuffling of epochs into steps (`engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_kit.preferences import Pair


@dataclass
class Segments:
    """What attention needs to know of a row: lengths [P, C, R] of each pair, `prefix` 0 where nothing is shared.

    Unshared pairs are written as P = 0, C = the whole chosen text, R = the whole rejected text.
    """

    lengths: list[tuple[int, int, int]]


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
    rows: list[int]  # (P,) position of each pair in the store
    data_tokens: int  # tokens of the data, each prompt counted for both responses

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved})


def pair_cost(pair_lengths: tuple[int, int, int], share: bool) -> int:
    """Tokens run for a pair of (shared, chosen, rejected) lengths, the latter two of the full texts."""
    shared, chosen, rejected = pair_lengths
    return chosen + rejected - (shared if share else 0)


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
    return MicroBatch(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        segments=Segments(lengths),
        predictors=_int64(predictors),
        targets=_int64(targets),
        summands=_int64(summands),
        owners=_int64(owners),
        lens=torch.tensor(lens),
        weights=torch.tensor(
            list(weights) if weights is not None else [1.0] * len(pairs), dtype=torch.float64
        ),
        rows=list(rows),
        data_tokens=sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
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


def plan_step(costs: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Spreads the pairs of one step over ranks and micro-batches; the result does not change the step.

    Longest pair first to the rank with the least work; on each rank first-fit decreasing under `max_tokens`.
    Every rank gets the same number of micro-batches (collectives run in lockstep): an empty list is one
    that a rank fills with a zero-weight pair.

    Args:
        costs: tokens run for each pair.
        num_ranks: data-parallel ranks.
        max_tokens: tokens of a micro-batch at most; a pair that is longer gets one of its own.

    Returns:
        `plan[rank][micro_batch]` = positions into `costs`; the longest micro-batch of a rank comes first.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    mine: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for i in order:
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        mine[rank].append(i)
        load[rank] += costs[i]
    plan = [_first_fit(items, costs, max_tokens) for items in mine]
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
