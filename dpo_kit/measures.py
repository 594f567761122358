"""What the pairs of a micro-batch add to a step's metrics, and the line that a scored pair becomes.

Every function is plain arithmetic on the log-probs of one micro-batch; nothing here crosses the ranks. Not here:
the loss (`losses`), the metrics' names and means (`metrics`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kit.metrics import TIE_NATS
from dpo_kit.packing import MicroBatch
from dpo_kit.preferences import PairStore


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
