"""The one visible loop: steps, evaluations, saves and stops, in their order; what is looked at after each step.

The next step's micro-batches are made while the device still works on this one. Files are written by rank 0 only.

Not here: the step itself (engine/step), processes and their states (supervise), the files' formats (records).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kit.config.steps import num_steps, steps_per_epoch
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.engine.schedule import learning_rate, rows_by_step
from dpo_kit.engine.state import FIRST_STEP_NATS, FIRST_STEP_NATS_PER_TOKEN_BF16, Engine, Stopped
from dpo_kit.engine.step import evaluate, micro_batches, reference_logps, response_logps, train_step
from dpo_kit.errors import UserError
from dpo_kit.loss_types import loss_at_reference
from dpo_kit.model.packing import MicroBatch
from dpo_kit.model.parallel import DTYPES
from dpo_kit.records import metrics
from dpo_kit.records.findings import Finding


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
    optimizer = optimizer or make_optimizer(engine.policy, config.actor.optimizer)
    valid = engine.valid
    if valid is not None and (owes_evaluation if done else config.evaluator.before_training):
        at_reference = engine.policy_is_reference and not done
        hooks.evaluated(done, *evaluate(engine, valid, engine.ref_valid, at_reference=at_reference))
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
        # Of ranks that share their pairs `sum` counts one, and a signal may have reached another only.
        stop = engine.should_stop() if world.tp_size == 1 else world.any(engine.should_stop())
        sums[-1] = float(stop)
        if step < total:
            upcoming = prepared(next(rows_to_come))  # while the device still works
        values = world.sum(sums).tolist()
        seconds = time.perf_counter() - start
        record = {"step": step, **metrics.means(values, "dpo"), "lr": lr, "grad_norm": float(norm)}
        check_finite(engine, record, batches)
        if step == 1:
            check_first_step(engine, record, gaps)
        tokens = values[metrics.SUMS.index("data_tokens")]
        speed = {"tokens_per_second": tokens / seconds, "pairs_per_second": pairs / seconds}
        hooks.stepped({**record, **speed, "step_s": seconds})
        engine.progress("training", step, total, step=step)
        last = step == total
        stopping = values[-1] > 0 and not last
        owes = valid is not None and (last or hooks.due("evaluator", step, per_epoch))
        if valid is not None and owes and not stopping:
            try:
                hooks.evaluated(step, *evaluate(engine, valid, engine.ref_valid))
                owes = False
            except Stopped:
                stopping = True
        if stopping:
            hooks.checkpoint(step, owes)
            hooks.save(f"exports/step-{step}")
            raise Stopped
        if not last and hooks.due("saver", step, per_epoch):
            hooks.save(f"exports/step-{step}")
        if hooks.due("recover", step, per_epoch):
            hooks.checkpoint(step, False)
    return total


@dataclass
class Hooks:
    """What happens around the steps; called on every rank, at the same points.

    `save` writes the weights as they stand to a folder of the run.
    """

    stepped: Callable[[dict[str, Any]], None]
    evaluated: Callable[[int, dict[str, Any], list[dict[str, Any]]], None]
    due: Callable[[str, int, int], bool]
    save: Callable[[str], None]
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
    sides = [side for side in ("policy", "reference") if rows[side]]
    dtypes = {"policy": actor.dtype, "reference": ref.dtype}
    error = UserError(not_finite(record, sides=sides, dtypes=dtypes, lr=actor.optimizer.lr))
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
    shares = engine.world.gather(found)
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
    largest = max(world.gather(float(gaps[0])))
    _, total, tokens = world.sum(gaps).tolist()
    if DTYPES[config.actor.dtype] == torch.bfloat16:
        figure, allowed, unit = total / max(tokens, 1), FIRST_STEP_NATS_PER_TOKEN_BF16, "nats a token, mean"
    else:
        figure, allowed, unit = largest, FIRST_STEP_NATS, "nats a response, largest"
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
    otherwise = "The model overflows on these rows: leave them out, or use another model"
    return f"{told}: {whose} not finite{when}. {f'Use {wider}' if wider else otherwise}"
