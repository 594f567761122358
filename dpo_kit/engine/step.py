"""Training, evaluation and scoring of preference pairs: one step, one evaluation, one pass of the reference.

The loss of a step is the sum over its pairs divided by the global number of pairs, so that ranks and
micro-batches do not change it beyond rounding. What a step measured crosses the ranks in one collective, after
the update. The host never waits for the device inside a step.

Not here: the order of the steps and what is written around them (engine/loop), sampling text (tools/samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kit.engine.optimizer import update
from dpo_kit.engine.state import CPU_TOKENS, Engine, Stopped
from dpo_kit.losses import implicit_rewards, preference_loss
from dpo_kit.model.packing import MicroBatch, pack, pair_costs, plan_step, response_sums
from dpo_kit.model.pair_model import PairModel
from dpo_kit.preferences import PairStore
from dpo_kit.records import metrics
from dpo_kit.records.metrics import TIE_NATS

Rows = Sequence[int] | np.ndarray
# Forward-only passes keep no activations: larger micro-batches fill a GPU.
CUDA_FORWARD_FACTOR = 4


# --- one micro-batch ----------------------------------------------------------------------


def micro_batches(
    engine: Engine, store: PairStore, rows: Rows, max_tokens: int, *models: PairModel | None
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the given rows, on the device; as many on every rank.

    A rank that has no pair for one of them runs the first row with weight 0.

    Args:
        models: that will run them; the policy and a resident reference when left out.
    """
    share, world = engine.shares(*(models or (engine.policy, engine.ref_model))), engine.world
    lengths, shape = store.lengths_of(rows), engine.policy.shape
    work = shape.work(lengths, share).tolist() if shape is not None and world.dp_size > 1 else None
    plan = plan_step(pair_costs(lengths, share).tolist(), world.dp_size, max_tokens, work)
    for members in plan[world.dp_rank]:
        picked = [int(rows[i]) for i in members] or [int(rows[0])]
        weights = [1.0] * len(members) or [0.0]
        yield pack([store.pair(r) for r in picked], picked, share=share, weights=weights).to(world.device)


def response_logps(model: PairModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the chosen and the rejected responses, in nats. Shapes: (P,), (P,), float64"""
    try:
        return response_sums(model(batch), batch)
    except Exception as error:
        error.data_rows = batch.sources  # type: ignore[attr-defined]
        raise


def reference_logps(engine: Engine, batch: MicroBatch, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference's log-probs of a micro-batch: from the cache's `values` or from the resident model."""
    if values is not None:
        picked = values.index_select(0, batch.rows)
        return picked[:, 0], picked[:, 1]
    assert engine.ref_model is not None
    with torch.no_grad(), engine.ref_model.as_reference() as model:
        return response_logps(model, batch)


def pair_terms(
    engine: Engine, batch: MicroBatch, policy: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor]
) -> dict:
    """Loss and rewards of each pair of a micro-batch; every value is (P,) float64."""
    actor = engine.config.actor
    loss = preference_loss(
        *policy,
        *ref,
        beta=actor.beta,
        loss_type=actor.loss_type,
        chosen_lens=batch.lens[0::2],
        rejected_lens=batch.lens[1::2],
        label_smoothing=actor.label_smoothing,
    )
    return {
        "loss": loss,
        "chosen_reward": implicit_rewards(policy[0], ref[0], beta=actor.beta),
        "rejected_reward": implicit_rewards(policy[1], ref[1], beta=actor.beta),
    }


# --- a step, an evaluation, a pass of the reference --------------------------------------------------------------


def train_step(
    engine: Engine, optimizer: torch.optim.Optimizer, batches: Sequence[MicroBatch], num_pairs: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step. Nothing in it waits for the device.

    Args:
        batches: this rank's micro-batches, from `micro_batches`.
        num_pairs: of the step, over all ranks.

    Returns:
        Sums over this rank's pairs (12,); the gradient norm as `update` gives it; and this rank's gaps (see
        `gaps_of`, (3,)).
    """
    optimizer.zero_grad(set_to_none=True)
    gaps = torch.zeros(3, dtype=torch.float64, device=engine.world.device)
    sums = torch.zeros(len(metrics.SUMS), dtype=torch.float64, device=engine.world.device)
    for batch in batches:
        ref = reference_logps(engine, batch, engine.ref_train)
        policy = response_logps(engine.policy, batch)
        terms = pair_terms(engine, batch, policy, ref)
        ((terms["loss"] * batch.weights).sum() / num_pairs).backward()
        sums += sums_of(batch, policy, ref, terms)
        gaps = gaps_of(batch, policy, ref, gaps)
    clip = engine.config.actor.optimizer.gradient_clipping
    return sums, update(engine.policy, optimizer, lr=lr, clip=clip), gaps


@torch.no_grad()
def reference_pass(
    engine: Engine, model: PairModel, store: PairStore, rows: Rows, *, done: int = 0, total: int | None = None
) -> np.ndarray:
    """Log-probs of `rows` under `model`, spread over the ranks; the same array on every rank.

    Args:
        done: pairs of earlier calls, for the progress shown.
        total: pairs of all calls; these rows when left out.

    Returns:
        Chosen and rejected sums in nats. Shape: (len(rows), 2), float64
    """
    values = torch.zeros(len(rows), 2, dtype=torch.float64, device=engine.world.device)
    position = torch.zeros(len(store), dtype=torch.int64)
    position[torch.as_tensor(np.asarray(rows))] = torch.arange(len(rows))
    position = position.to(values.device)
    for here, batch in _chunked(engine, store, rows, engine.ref_tokens, model):
        engine.progress("reference pass", done + here, total or len(rows))
        logps = torch.stack(response_logps(model, batch), 1) * batch.weights[:, None]
        values.index_add_(0, position[batch.rows], logps)
    return engine.world.sum(values).cpu().numpy()


@torch.no_grad()
def evaluate(
    engine: Engine, store: PairStore, values: Tensor | None, *, at_reference: bool = False
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Held-out metrics over all pairs of a store, and one record for each pair.

    Args:
        values: the reference's log-probs of the store's rows; None where it is resident. Shape: (rows, 2)
        at_reference: policy and reference are known to be equal: the reference's values serve for both.

    Returns:
        `dpo-eval/*` means with `dpo-eval/num_pairs`, and per pair what `dpo-kit score` prints, in store order;
        both the same on every rank.
    """
    engine.policy.eval()
    sums = torch.zeros(len(metrics.SUMS), dtype=torch.float64, device=engine.world.device)
    table = torch.zeros(len(store), 5, dtype=torch.float64, device=engine.world.device)
    for done, batch in _chunked(engine, store, np.arange(len(store)), engine.max_tokens):
        ref = reference_logps(engine, batch, values)
        policy = ref if at_reference else response_logps(engine.policy, batch)
        terms = pair_terms(engine, batch, policy, ref)
        sums += sums_of(batch, policy, ref, terms)
        row = torch.stack([*policy, *ref, terms["loss"]], 1) * batch.weights[:, None]
        table.index_add_(0, batch.rows, row)
        engine.progress("evaluation", done, len(store))
    both = engine.world.sum(torch.cat([sums, table.flatten()])).cpu()
    engine.policy.train()
    found = metrics.means(both[: len(sums)].tolist(), "dpo-eval")
    found["dpo-eval/num_pairs"] = len(store)
    table = both[len(sums) :].view(-1, 5)
    return found, pair_records(store, table.numpy(), beta=engine.config.actor.beta)


def _chunked(
    engine: Engine, store: PairStore, rows: Rows, bound: int, *models: PairModel
) -> Iterator[tuple[int, MicroBatch]]:
    """Forward-only micro-batches over many rows, with the number of rows done; stops between groups when asked."""
    on_cuda = engine.world.device.type == "cuda"
    max_tokens = bound * CUDA_FORWARD_FACTOR if on_cuda else min(bound, CPU_TOKENS)
    share = engine.shares(*(models or (engine.policy, engine.ref_model)))
    costs = pair_costs(store.lengths_of(rows), share)
    group: list[int] = []
    tokens = done = 0
    for i in [*np.argsort(-costs, kind="stable").tolist(), None]:
        cost = 0 if i is None else int(costs[i])
        if group and (i is None or tokens + cost > max_tokens * engine.world.dp_size):
            if engine.world.any(engine.should_stop()):  # all ranks stop as soon as one was asked to
                raise Stopped
            done += len(group)
            for batch in micro_batches(engine, store, np.asarray(group), max_tokens, *models):
                yield done, batch
            group, tokens = [], 0
        if i is not None:
            group.append(int(rows[i]))
            tokens += cost


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
