"""Training, evaluation and scoring of preference pairs: the step, and the one visible loop.

The loss of a step is the sum over its pairs divided by the global number of pairs, so that ranks and
micro-batches do not change it beyond rounding. What a step measured crosses the ranks in one collective, after
the update. The host never waits for the device inside a step; the next step's micro-batches are made while the
device still works on this one. Files are written by rank 0 only.

Not here: processes and their states (`supervisor`), the files' formats (`records`), sampling text (`samples`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kit import metrics as names
from dpo_kit.config import Config
from dpo_kit.errors import UserError
from dpo_kit.findings import Finding
from dpo_kit.losses import implicit_rewards, loss_at_reference, preference_loss
from dpo_kit.measures import gaps_of, not_finite, pair_records, sums_of
from dpo_kit.model import PairModel
from dpo_kit.optimizer import LeanAdamW
from dpo_kit.packing import MicroBatch, pack, pair_costs, plan_step, response_sums
from dpo_kit.parallel import DTYPES, World, grad_norm, masters, publish
from dpo_kit.preferences import PairStore
from dpo_kit.schedule import learning_rate, num_steps, rows_by_step, steps_per_epoch

Rows = Sequence[int] | np.ndarray
# Forward-only passes keep no activations: larger micro-batches fill a GPU. A CPU is at its fastest with 2k to 4k
# tokens (docs/log.md); more only pushes activations out of its caches.
CUDA_FORWARD_FACTOR = 4
CPU_FORWARD_TOKENS = 4096
FIRST_STEP_NATS = 1e-3
FIRST_STEP_NATS_PER_TOKEN_BF16 = 1e-2


class Stopped(Exception):
    """The run was asked to stop; every rank raises it at the same point."""


@dataclass
class Engine:
    """What a rank holds while it trains: the model, the data and where the reference's values come from."""

    config: Config
    world: World
    policy: PairModel
    train: PairStore
    valid: PairStore | None
    # Tokens of a micro-batch, settled by `budget`.
    actor_tokens: int = CPU_FORWARD_TOKENS
    ref_tokens: int = CPU_FORWARD_TOKENS
    # The reference's log-probs of every row of a store, (rows, 2) float64 on the device, or the resident model.
    ref_train: Tensor | None = None
    ref_valid: Tensor | None = None
    ref_model: PairModel | None = None
    policy_is_reference: bool = False
    should_stop: Callable[[], bool] = field(default=lambda: False)
    progress: Callable[..., None] = field(default=lambda *_a, **_k: None)
    found: Callable[[Finding], None] = field(default=lambda _: None)

    @property
    def max_tokens(self) -> int:
        """Tokens of a training micro-batch; a resident reference runs it too, so its bound holds as well."""
        online = self.config.ref.logps == "online"
        return min(self.actor_tokens, self.ref_tokens) if online else self.actor_tokens

    def shares(self, *models: PairModel | None) -> bool:
        """Whether rows made for these models hold a common prefix once."""
        return self.config.actor.share_prompt and all(m.packed for m in models if m is not None)


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
    work = shape.work(lengths, share).tolist() if shape is not None and world.size > 1 else None
    for members in plan_step(pair_costs(lengths, share).tolist(), world.size, max_tokens, work)[world.rank]:
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
    with torch.no_grad():
        return response_logps(engine.ref_model, batch)


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
        Sums over this rank's pairs (12,); the global gradient norm before clipping, a scalar; and this rank's
        gaps (see `gaps_of`, (3,)). When the norm is not finite, no weight and no optimizer state has changed,
        on any rank.
    """
    optimizer.zero_grad(set_to_none=True)
    gaps = torch.zeros(3, dtype=torch.float64, device=engine.world.device)
    sums = torch.zeros(len(names.SUMS), dtype=torch.float64, device=engine.world.device)
    for batch in batches:
        ref = reference_logps(engine, batch, engine.ref_train)
        policy = response_logps(engine.policy, batch)
        terms = pair_terms(engine, batch, policy, ref)
        ((terms["loss"] * batch.weights).sum() / num_pairs).backward()
        sums += sums_of(batch, policy, ref, terms)
        gaps = gaps_of(batch, policy, ref, gaps)
    params = [p for g in optimizer.param_groups for p in g["params"]]
    norm = grad_norm(params)
    for group in optimizer.param_groups:
        group["lr"] = lr
    clip = engine.config.actor.optimizer.gradient_clipping
    if norm.dtype == torch.float64:
        torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
    else:  # The optimizer divides by a scale in fp32: no pass over the gradients of its own.
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    publish(engine.policy)
    return sums, norm, gaps


@torch.no_grad()
def reference_pass(
    engine: Engine,
    model: PairModel,
    store: PairStore,
    rows: Rows,
    *,
    done: int = 0,
    total: int | None = None,
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
    engine: Engine, *, at_reference: bool = False
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Held-out metrics over all pairs of the validation store, and one record for each pair.

    Args:
        at_reference: policy and reference are known to be equal: the reference's values serve for both.

    Returns:
        `dpo-eval/*` means with `dpo-eval/num_pairs`, and per pair what `dpo-kit score` prints, in store order;
        both the same on every rank.
    """
    store, values = engine.valid, engine.ref_valid
    assert store is not None
    engine.policy.eval()
    sums = torch.zeros(len(names.SUMS), dtype=torch.float64, device=engine.world.device)
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
    found = names.means(both[: len(sums)].tolist(), "dpo-eval")
    found["dpo-eval/num_pairs"] = len(store)
    table = both[len(sums) :].view(-1, 5)
    return found, pair_records(store, table.numpy(), beta=engine.config.actor.beta)


def _chunked(
    engine: Engine, store: PairStore, rows: Rows, bound: int, *models: PairModel
) -> Iterator[tuple[int, MicroBatch]]:
    """Forward-only micro-batches over many rows, with the number of rows done; stops between groups when asked."""
    on_cuda = engine.world.device.type == "cuda"
    max_tokens = bound * CUDA_FORWARD_FACTOR if on_cuda else min(bound, CPU_FORWARD_TOKENS)
    share = engine.shares(*(models or (engine.policy, engine.ref_model)))
    costs = pair_costs(store.lengths_of(rows), share)
    group: list[int] = []
    tokens = done = 0
    for i in [*np.argsort(-costs, kind="stable").tolist(), None]:
        cost = 0 if i is None else int(costs[i])
        if group and (i is None or tokens + cost > max_tokens * engine.world.size):
            raise_if_stopped(engine)
            done += len(group)
            for batch in micro_batches(engine, store, np.asarray(group), max_tokens, *models):
                yield done, batch
            group, tokens = [], 0
        if i is not None:
            group.append(int(rows[i]))
            tokens += cost


def raise_if_stopped(engine: Engine) -> None:
    """Raises `Stopped` on every rank as soon as one was asked to stop. A collective (on the CPU)."""
    flag = torch.tensor(float(engine.should_stop()))
    if engine.world.size > 1:
        dist.all_reduce(flag)
    if flag > 0:
        raise Stopped


# --- the loop ------------------------------------------------------------------------------------------------


def make_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """AdamW as configured, over the policy's master weights: torch's fused one, or `LeanAdamW`."""
    o = engine.config.actor.optimizer
    params = list(masters(engine.policy).values())
    options: dict[str, Any] = {
        "lr": o.lr,
        "betas": (o.beta1, o.beta2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
    }
    if o.state_dtype == "bfloat16":
        return LeanAdamW(params, **options)
    return torch.optim.AdamW(params, fused=True, **options)


def train(
    engine: Engine,
    hooks: Hooks,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    done: int = 0,
    owes_evaluation: bool = False,
) -> int:
    """Trains to the last step; returns its number.

    Args:
        hooks: what rank 0 writes and when to save; see `Hooks`.
        optimizer: from `make_optimizer`, when its states come from a checkpoint.
        done: steps that the policy and the optimizer have behind them.
        owes_evaluation: the run was stopped before it could evaluate after step `done`.

    Raises:
        Stopped: a stop was asked for; the steps finished until then have been reported.
        UserError: numbers that are not finite; weights are those of the last good step.
    """
    config, world, num_pairs = engine.config, engine.world, len(engine.train)
    total, per_epoch = num_steps(config, num_pairs), steps_per_epoch(config, num_pairs)
    optimizer = optimizer or make_optimizer(engine)
    if engine.valid is not None and (owes_evaluation if done else config.evaluator.before_training):
        at_reference = engine.policy_is_reference and not done
        hooks.evaluated(done, *evaluate(engine, at_reference=at_reference))
    engine.policy.train()
    if done == total:
        return total

    def prepared(rows: np.ndarray) -> tuple[np.ndarray, list[MicroBatch]]:
        return rows, list(micro_batches(engine, engine.train, rows, engine.max_tokens))

    rows_to_come = rows_by_step(config, num_pairs, done)
    upcoming = prepared(next(rows_to_come))
    for step in range(done + 1, total + 1):
        engine.progress("first step" if step == 1 else "training", step - 1, total, step=step - 1)
        rows, batches = upcoming
        pairs = len(rows)
        start = time.perf_counter()
        lr = learning_rate(step, total, config.actor.optimizer)
        sums, norm, gaps = train_step(engine, optimizer, batches, pairs, lr)
        sums[-1] = float(engine.should_stop())
        if step < total:
            upcoming = prepared(next(rows_to_come))  # while the device still works
        values = world.sum(sums).tolist()
        seconds = time.perf_counter() - start
        record = {"step": step, **names.means(values, "dpo"), "lr": lr, "grad_norm": float(norm)}
        check_finite(engine, record, batches)
        if step == 1:
            check_first_step(engine, record, gaps)
        tokens = values[names.SUMS.index("data_tokens")]
        hooks.stepped(
            record
            | {
                "tokens_per_second": tokens / seconds,
                "pairs_per_second": pairs / seconds,
                "step_s": seconds,
            }
        )
        engine.progress("training", step, total, step=step)
        last = step == total
        stopping = values[-1] > 0 and not last
        owes = engine.valid is not None and (last or hooks.due("evaluator", step, per_epoch))
        if owes and not stopping:
            try:
                hooks.evaluated(step, *evaluate(engine))
                owes = False
            except Stopped:
                stopping = True
        if stopping:
            hooks.checkpoint(step, owes)
            hooks.save(step)
            raise Stopped
        if not last and hooks.due("saver", step, per_epoch):
            hooks.save(step)
        if hooks.due("recover", step, per_epoch):
            hooks.checkpoint(step, False)
    return total


@dataclass
class Hooks:
    """What happens around the steps; called on every rank, at the same points."""

    stepped: Callable[[dict[str, Any]], None]
    evaluated: Callable[[int, dict[str, Any], list[dict[str, Any]]], None]
    due: Callable[[str, int, int], bool]
    save: Callable[[int], None]
    checkpoint: Callable[[int, bool], None] = field(default=lambda *_: None)


def check_finite(engine: Engine, record: dict[str, Any], batches: Sequence[MicroBatch]) -> None:
    """Raises UserError when the loss or the gradient norm of a step is not a finite number; a collective then.

    Args:
        batches: this rank's micro-batches of the step. The error carries the rows of the data at fault as `data_rows`.
    """
    if math.isfinite(record["dpo/loss"]) and math.isfinite(record["grad_norm"]):
        return
    actor, ref = engine.config.actor, engine.config.ref
    rows = _rows_at_fault(engine, batches)
    error = UserError(
        not_finite(
            record,
            sides=[side for side in ("policy", "reference") if rows[side]],
            dtypes={"policy": actor.dtype, "reference": ref.dtype},
            lr=actor.optimizer.lr,
        )
    )
    at_fault = rows["policy"] | rows["reference"]
    error.data_rows = tuple(sorted(at_fault or rows["all"]))  # type: ignore[attr-defined]
    raise error


@torch.no_grad()
def _rows_at_fault(engine: Engine, batches: Sequence[MicroBatch]) -> dict[str, set[int]]:
    """Rows of the data whose log-probs are not finite, under "policy" and "reference", and "all" of the step's."""
    found: dict[str, set[int]] = {"policy": set(), "reference": set(), "all": set()}
    for batch in batches:
        counts = batch.weights > 0
        sides = {
            "policy": response_logps(engine.policy, batch),
            "reference": reference_logps(engine, batch, engine.ref_train),
            "all": (counts / 0.0, counts / 0.0),
        }
        for side, logps in sides.items():
            broken = ~torch.isfinite(torch.stack(logps)).all(0) & counts
            found[side] |= {row for row, is_so in zip(batch.sources, broken.tolist(), strict=True) if is_so}
    shares: list[Any] = [found] * engine.world.size
    if engine.world.size > 1:
        dist.all_gather_object(shares, found)
    return {side: set().union(*(share[side] for share in shares)) for side in found}


def check_first_step(engine: Engine, record: dict[str, Any], gaps: Tensor) -> None:
    """Before any update policy = reference, so the first loss is known; checks and prints it.

    Args:
        gaps: of this rank, from `train_step`.

    Raises:
        UserError: the figure is off and `ref.first_step_check` is `error`.
    """
    config, world = engine.config, engine.world
    check = config.ref.first_step_check
    if not engine.policy_is_reference or not config.actor.disable_dropout or check == "off":
        return
    largest, (_, total, tokens) = gaps[:1].clone(), world.sum(gaps).tolist()
    if world.size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    if DTYPES[config.actor.dtype] == torch.bfloat16:
        figure, allowed, unit = total / max(tokens, 1), FIRST_STEP_NATS_PER_TOKEN_BF16, "nats a token, mean"
    else:
        figure, allowed, unit = float(largest), FIRST_STEP_NATS, "nats a response, largest"
    expected = loss_at_reference(config.actor.loss_type, config.actor.beta)
    text = (
        f"first step: loss {record['dpo/loss']:.6f}, expected {expected:.6f} while policy = reference; "
        f"log-probs differ by {figure:.2g} {unit} (allowed {allowed:g})"
    )
    if world.is_main:
        print(text, flush=True)
    if figure <= allowed:
        return
    text = f"{text}: policy and reference do not compute the same"
    if check == "error":
        raise UserError(f"{text}; set ref.first_step_check=warn to go on")
    engine.found(Finding("bad", "first step", text))
