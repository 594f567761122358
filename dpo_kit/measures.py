"""What the pairs of a micro-batch add to a step's metrics, the line that a scored pair becomes, and what the
reference alone says about the pairs.

Every function is plain arithmetic on log-probs; nothing here crosses the ranks. Not here:
the loss (`losses`), the metrics' names and means (`metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kit.findings import Finding
from dpo_kit.metrics import TIE_NATS
from dpo_kit.packing import MicroBatch
from dpo_kit.preferences import PairStore

# With many pairs a small lean is certain and means nothing: swapped columns lean far.
SWAPPED_P, SWAPPED_SHARE = 0.01, 0.4


def sums_of(
    batch: MicroBatch, policy: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], terms: dict[str, Tensor]
) -> Tensor:
    """What a micro-batch adds to the step's metrics, in the order of `metrics.SUMS`. Shape: (12,), float64"""
    weights = batch.weights
    margin = (policy[0] - ref[0] - (policy[1] - ref[1])).detach()  # nats, whatever beta
    columns = [
        torch.ones_like(weights),
        terms["loss"].detach(),
        terms["chosen_reward"],
        terms["rejected_reward"],
        (margin > 0).double(),
        (margin.abs() <= TIE_NATS).double(),
        policy[0].detach(),
        policy[1].detach(),
        (policy[0] > policy[1]).double(),
    ]
    sums = torch.stack([weights * column for column in columns]).sum(1)
    return torch.cat([sums, batch.tokens, batch.tokens.new_zeros(1)])


@torch.no_grad()
def gaps_of(
    batch: MicroBatch, policy: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], before: Tensor
) -> Tensor:
    """How far policy and reference are apart: what the first step is checked by.

    Args:
        before: the gaps of earlier micro-batches. Shape: (3,)

    Returns:
        Largest |difference| of a response in nats, their sum, and the number of scored tokens. Shape: (3,)
    """
    apart = torch.stack([(p - r).abs() * batch.weights for p, r in zip(policy, ref, strict=True)])
    tokens = (batch.lens.view(-1, 2).sum(1) * batch.weights).sum()
    return torch.stack([torch.maximum(before[0], apart.max()), before[1] + apart.sum(), before[2] + tokens])


def pair_records(store: PairStore, table: np.ndarray, *, beta: float) -> list[dict[str, Any]]:
    """One `dpo-kit score` line a pair.

    Args:
        table: policy chosen, policy rejected, ref chosen, ref rejected log-probs, loss. Shape: (P, 5)
    """
    records = []
    for i, (pc, pr, rc, rr, loss) in enumerate(table.tolist()):
        pair = store.pair(i)
        start = max(int(pair.prompt), 1)
        records.append(
            {
                "index": int(pair.index),
                "prompt_tokens": int(pair.prompt),
                "chosen_tokens": len(pair.chosen_ids) - start,
                "rejected_tokens": len(pair.rejected_ids) - start,
                "policy_chosen_logps": pc,
                "policy_rejected_logps": pr,
                "ref_chosen_logps": rc,
                "ref_rejected_logps": rr,
                "chosen_reward": beta * (pc - rc),
                "rejected_reward": beta * (pr - rr),
                "loss": loss,
            }
        )
    return records


def swapped_columns(store: PairStore, values: Tensor | None) -> Iterator[Finding]:
    """Swapped columns show where the untrained reference itself prefers what is called rejected, token by token.

    Args:
        values: the reference's log-probs of the store's rows in nats, NaN where there are none; None: not known.
            Shape: (P, 2)
    """
    if values is None:
        return
    logps = values.cpu().numpy()
    rows = np.flatnonzero(np.isfinite(logps).all(1))
    # Nats a token: the sum would follow the lengths.
    tokens = store.lengths_of(rows)[:, 1:] - np.maximum(np.asarray(store.prompt)[rows], 1)[:, None]
    a_token = np.unique(logps[rows] / np.maximum(tokens, 1), axis=0)  # a pair that repeats is one toss
    wins, num_pairs = int((a_token[:, 0] > a_token[:, 1]).sum()), len(a_token)
    chance = at_most(wins, num_pairs)
    if chance < SWAPPED_P and wins <= SWAPPED_SHARE * num_pairs:
        yield Finding(
            "look",
            "preference",
            f"the reference finds the rejected answer likelier, token by token, in {num_pairs - wins} of {num_pairs}"
            f" pairs (by chance in {100 * chance:.2g} % of cases): are the columns chosen and rejected swapped?",
        )


def at_most(wins: int, tosses: int) -> float:
    """Probability of at most this many heads of a fair coin; over 1,000 tosses by the normal curve."""
    if tosses > 1000:
        return 0.5 * math.erfc((tosses / 2 - wins - 0.5) / math.sqrt(tosses / 2))
    return sum(math.comb(tosses, k) for k in range(wins + 1)) / 2**tosses


def not_finite(record: dict[str, Any], *, sides: list[str], dtypes: dict[str, str], lr: float) -> str:
    """What to say of a step whose loss or gradient norm is not a finite number.

    Args:
        record: of the step.
        sides: those of "policy" and "reference" whose log-probs are not finite.
        dtypes: what each of the two computes in.
        lr: the learning rate of the run.
    """
    step, norm = record["step"], record["grad_norm"]
    told = f"step {step}: loss {record['dpo/loss']}, gradient norm {norm}"
    low = [side for side in sides or ["policy"] if dtypes[side] == "bfloat16"]
    names = {"policy": "actor.dtype", "reference": "ref.dtype"}
    wider = " ".join(f"{names[side]}=float32" for side in low)
    is_untrained = step == 1 or lr == 0
    if not is_untrained and "reference" not in sides:
        unchanged = "" if math.isfinite(norm) else "; no weight was changed by this step"
        return f"{told}{unchanged}. Lower actor.optimizer.lr = {lr:g}{f', or use {wider}' if wider else ''}"
    whose = f"log-probs of the {' and the '.join(sides)} are" if sides else "the gradient is"
    when = " before any update, so the learning rate is not to blame" if is_untrained else ""
    remedy = (
        f"Use {wider}" if wider else "The model overflows on these rows: leave them out, or use another model"
    )
    return f"{told}: {whose} not finite{when}. {remedy}"
