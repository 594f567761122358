"""Packing: the drawn example, sums of responses, and plans that lose no pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_kit.model.packing import pack, pair_costs, plan_step, response_sums
from dpo_kit.preferences import Pair


def pair(shared, chosen, rejected, prompt=None):
    """Tokens: 1.. for the prefix, 100.. for the chosen rest, 200.. for the rejected rest."""
    prefix = np.arange(1, shared + 1)
    return Pair(
        chosen_ids=np.concatenate([prefix, 100 + np.arange(chosen)]).astype(np.int32),
        rejected_ids=np.concatenate([prefix, 200 + np.arange(rejected)]).astype(np.int32),
        shared=shared,
        prompt=shared if prompt is None else prompt,
        context=shared,
        index=0,
    )


def test_the_drawn_example():
    """P P P P C C e + P P P P R R R e, shared: 11 tokens, both first tokens predicted by the last P (3)."""
    b = pack([pair(4, 3, 4)], [0], share=True)
    assert b.input_ids[0].tolist() == [1, 2, 3, 4, 100, 101, 102, 200, 201, 202, 203]
    assert b.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert b.segments.lengths.tolist() == [[4, 3, 4]]
    assert b.predictors.tolist() == [3, 4, 5, 3, 7, 8, 9]
    assert b.targets.tolist() == [100, 101, 102, 200, 201, 202, 203]
    assert b.lens.tolist() == [3, 4]
    assert b.tokens.tolist() == [15, 11]
    lengths = np.array([[4, 7, 8]])
    assert pair_costs(lengths, True).tolist() == [11]
    assert pair_costs(lengths, False).tolist() == [15]


def test_unshared_row_holds_both_texts():
    b = pack([pair(2, 1, 2)], [0], share=False)
    assert b.input_ids[0].tolist() == [1, 2, 100, 1, 2, 200, 201]
    assert b.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert b.predictors.tolist() == [1, 4, 5]
    assert b.targets.tolist() == [100, 200, 201]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 3, 4, 2), (4, 1, 1, 4), (1, 2, 3, 1), (0, 2, 3, 0), (5, 2, 2, 0), (1, 1, 9, 0)]
)
def test_every_response_is_scored_from_its_boundary(share, shape):
    """With a log-prob equal to the target token, a response's sum is the sum of its scored tokens."""
    p = pair(*shape)
    b = pack([pair(3, 2, 2), p], [7, 9], share=share)
    chosen, rejected = response_sums(b.targets.double(), b)
    start = max(p.prompt, 1)
    assert chosen[1] == p.chosen_ids[start:].sum()
    assert rejected[1] == p.rejected_ids[start:].sum()
    assert b.lens[2:].tolist() == [len(p.chosen_ids) - start, len(p.rejected_ids) - start]
    # Each predictor stands one position before its target in one of the two texts.
    for at, target in zip(b.predictors.tolist(), b.targets.tolist(), strict=True):
        position = int(b.position_ids[0, at])
        texts = [ids for q in (p, pair(3, 2, 2)) for ids in (q.chosen_ids, q.rejected_ids)]
        assert target in [ids[position + 1] for ids in texts if position + 1 < len(ids)]


def test_sums_are_float64_and_carry_gradients():
    b = pack([pair(3, 2, 2, prompt=1)], [0], share=True)
    logps = torch.full((len(b.targets),), -1.5, requires_grad=True)
    chosen, rejected = response_sums(logps, b)
    assert chosen.dtype == torch.float64
    (chosen - rejected).sum().backward()
    # Tokens 2 and 3 of the prefix are scored for both: their gradients cancel.
    assert logps.grad.tolist() == [0.0, 0.0, 1.0, 1.0, -1.0, -1.0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
def test_a_plan_holds_every_pair_once(num_ranks, max_tokens):
    costs = np.random.default_rng(0).integers(5, 60, 23).tolist()
    plan = plan_step(costs, num_ranks, max_tokens)
    assert sorted(i for rank in plan for mb in rank for i in mb) == list(range(23))
    assert len({len(rank) for rank in plan}) == 1
    for rank in plan:
        loads = [sum(costs[i] for i in mb) for mb in rank if mb]
        assert all(load <= max_tokens or len(mb) == 1 for load, mb in zip(loads, rank, strict=False))
    work = [sum(costs[i] for mb in rank for i in mb) for rank in plan]
    assert max(work) - min(work) <= max(costs)


def test_a_rank_without_a_pair_gets_an_empty_micro_batch():
    assert plan_step([5], 2, 100) == [[[0]], [[]]]
