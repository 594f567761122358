"""Tokens of a micro-batch, settled before the first step; every rank gets the same numbers.

    a number in the config   taken as it is
    auto on the CPU          what `costs.tokens_that_fit` says, at most 4,096: a CPU is at its fastest there
    auto on CUDA             the same, at most 65,536; then the largest planned micro-batch of the run goes
                             forward and backward, halved until it fits
    after a halving          the halved number of `budget.json` takes the estimate's place

Deliberately not here: `budget.json` and its halvings (records/budget), bytes (model/costs).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_kit.config import Config
from dpo_kit.engine import schedule, state, step
from dpo_kit.engine.optimizer import local
from dpo_kit.engine.state import CPU_TOKENS, Engine
from dpo_kit.errors import UserError
from dpo_kit.model import packing
from dpo_kit.model.costs import DTYPE_BYTES, Shape, second_model, tokens_that_fit
from dpo_kit.model.packing import plan_step
from dpo_kit.model.parallel import World, masters
from dpo_kit.preferences import PairStore
from dpo_kit.records import budget, manifest, resuming

CUDA_TOKENS = 65536
# A micro-batch that is as full as this ends the search for the largest one.
_FULL = 0.99
# What the allocators of the CPU and of libraries beside torch's own say.
_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# Where micro-batches run, and whose budget they run under.
_SECTIONS = {"reference pass": "ref", "evaluation": "actor", "first step": "actor", "training": "actor"}


class OutOfMemory(Exception):
    """A rank ran out of memory.

    Args:
        phase: one of `status.PHASES`.
        cause: what was raised.
        step: the step at hand; None before the first.
        section: whose budget to halve; None finds out, and stays None where micro-batches are not to blame.
        tokens: its number, where it is settled.
    """

    def __init__(
        self,
        phase: str,
        cause: BaseException,
        *,
        step: int | None = None,
        section: str | None = None,
        tokens: dict[str, int] | None = None,
    ):
        section = section or _SECTIONS.get(phase)
        self.facts = {"section": section, "step": step}
        at = phase + (f", step {step}" if step else "")
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}"
        remedy = "use actor.dtype=bfloat16, more ranks, or a machine with more memory"
        if section and tokens:
            number = tokens[section]
            at += f", with {number:,} tokens a micro-batch"
            remedy = f"lower {section}.mb_spec.max_tokens_per_mb = {number}"
        super().__init__(f"{at} ({said}); {remedy}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def largest_micro_batch(
    config: Config, costs: np.ndarray, num_ranks: int, max_tokens: int, work: np.ndarray | None = None
) -> tuple[int, list[int]]:
    """The largest micro-batch that any step of the run will have on any rank (to 1 %): its tokens and its pairs.

    Args:
        config: decides which pairs a step takes.
        costs: tokens run for each pair of the training store. Shape: (P,)
        num_ranks: data-parallel ranks.
        max_tokens: the budget.
        work: FLOPs of each pair, where the ranks are balanced by them (see `packing.plan_step`). Shape: (P,)
    """
    largest, found = 0, [int(costs.argmax())]
    for rows in schedule.rows_by_step(config, len(costs)):
        here = costs[rows]
        # What the fullest rank may get at most: most steps need no plan to be ruled out.
        bound = here.sum() if work is not None else min(here.sum(), here.sum() / num_ranks + here.max())
        if bound <= largest:
            continue
        by = [] if work is None else [work[rows].tolist()]
        plans = plan_step(here.tolist(), num_ranks, max_tokens, *by)
        for members in (members for plan in plans for members in plan if members):
            tokens = int(here[members].sum())
            if tokens > largest:
                largest, found = tokens, [int(rows[i]) for i in members]
        if largest >= _FULL * max_tokens:
            break
    return largest, found


def fitting_tokens(
    config: Config, shape: Shape | None, num_ranks: int, free_bytes: int, *, on_cuda: bool
) -> int:
    """Tokens of a micro-batch that `auto` stands for: what fits in a rank's memory, up to what the device likes.

    Args:
        shape: of the policy; None of a family whose sizes are not known, which gets what the device likes.
    """
    most = CUDA_TOKENS if on_cuda else CPU_TOKENS
    if shape is None:
        return most
    return min(most, tokens_that_fit(shape, config, num_ranks=num_ranks, free_bytes=free_bytes))


def check(config: Config, train: PairStore) -> None:
    """Refuses a micro-batch budget that the longest pair does not fit in."""
    longest = int(packing.pair_costs(train.all_lengths(), config.actor.share_prompt).max())
    if problem := resuming.micro_batch_problem(config, longest):
        raise UserError(f"{problem}, or lower train_dataset.max_length = {config.train_dataset.max_length}")


def settle(engine: Engine, run_dir: Path) -> None:
    """Settles how many tokens a micro-batch may have, tells the engine, and writes it to the run; a collective.

    Args:
        engine: gets `actor_tokens` and `ref_tokens`; on one CUDA rank its policy may be loaded again.
    """
    config, world, shape = engine.config, engine.world, engine.policy.shape
    lengths, share = engine.train.all_lengths(), engine.shares(engine.policy)
    costs = packing.pair_costs(lengths, share)
    work = shape.work(lengths, share) if shape is not None and world.dp_size > 1 else None
    made = estimated(engine, costs, work, budget.read(run_dir))
    _write(run_dir, world, made)
    if world.device.type == "cuda" and config.actor.mb_spec.max_tokens_per_mb == "auto":
        made = measured(engine, costs, work, made)
        _write(run_dir, world, made)
    engine.actor_tokens, engine.ref_tokens = made["actor"], made["ref"]
    if world.is_main:
        print(describe(made), flush=True)


def _write(run_dir: Path, world: World, made: dict[str, Any]) -> None:
    if world.is_main:
        budget.write(run_dir, made)
        manifest.write_commands(run_dir)
    world.barrier()


def estimated(
    engine: Engine, costs: np.ndarray, work: np.ndarray | None, before: dict[str, Any]
) -> dict[str, Any]:
    """The budget of a run as configured or estimated; the same on every rank. A collective.

    Args:
        costs: tokens run for each pair of the training store. Shape: (P,)
        work: as for `largest_micro_batch`.
        before: what `budget.read` gives; its numbers stand when it holds halvings.

    Returns:
        The content of `budget.json` (see records/budget); `source` is `config` or `estimated`.
    """
    config, world, longest = engine.config, engine.world, int(costs.max())
    on_cuda = world.device.type == "cuda"
    fitting = fitting_tokens(config, engine.policy.shape, world.size, engine.free_bytes, on_cuda=on_cuda)
    estimate = min(world.gather(max(longest, fitting)))
    asked = {name: getattr(config, name).mb_spec.max_tokens_per_mb for name in budget.SECTIONS}
    numbers = {name: estimate if word == "auto" else int(word) for name, word in asked.items()}
    halvings = before.get("halvings", [])
    if halvings:
        numbers = {name: before[name] for name in budget.SECTIONS}
    largest, _ = largest_micro_batch(config, costs, world.dp_size, numbers["actor"], work)
    return {
        **numbers,
        "source": {name: "estimated" if word == "auto" else "config" for name, word in asked.items()},
        "asked": asked,
        "longest_pair": longest,
        "largest": {"actor": largest, "ref": numbers["ref"] if on_cuda else min(numbers["ref"], CPU_TOKENS)},
        "halvings": halvings,
    }


def describe(made: dict[str, Any]) -> str:
    """One line on the numbers of a run and where they are from."""
    parts = [f"{name} {made[name]:,} tokens ({made['source'][name]})" for name in budget.SECTIONS]
    halvings = len(made["halvings"])
    after = f", after {halvings} halving{'s' if halvings > 1 else ''}" if halvings else ""
    return f"micro-batches: {', '.join(parts)}{after}; the longest pair has {made['longest_pair']:,}"


def measured(
    engine: Engine, costs: np.ndarray, work: np.ndarray | None, made: dict[str, Any]
) -> dict[str, Any]:
    """The budget after the largest planned micro-batch really ran: halved until it fits.

    FSDP is of no use after an error in mid-pass: a rank alone loads its policy again before the next try. Of
    several, one may run out of memory while the others wait in a collective: there the error ends the ranks,
    and the supervisor halves and starts them again.

    Args:
        costs, work: as for `estimated`.
        made: from `estimated`; `actor` is `auto`.

    Raises:
        OutOfMemory: not even the longest pair fits, or there are other ranks.
    """
    world, tokens = engine.world, made["actor"]
    while True:
        largest, rows = largest_micro_batch(engine.config, costs, world.dp_size, tokens, work)
        failed = try_out(engine, rows)
        if failed is None:
            break
        less = budget.half(tokens, made["longest_pair"], largest)
        if less >= tokens or world.size > 1:
            raise OutOfMemory("measuring", failed, section="actor", tokens={"actor": tokens}) from failed
        tokens = less
        state.reload_policy(engine)
    source = {**made["source"], "actor": "measured"}
    changed = {"actor": tokens, "source": source, "largest": {**made["largest"], "actor": largest}}
    if made["asked"]["ref"] == "auto":
        changed["ref"] = changed["largest"]["ref"] = min(made["ref"], tokens)
        source["ref"] = "measured"
    return {**made, **changed}


def try_out(engine: Engine, rows: list[int]) -> Exception | None:
    """Runs these pairs as one micro-batch, beside room for what the first step brings.

    Returns:
        The error of running out of memory, without the frames that hold the memory; None when it fits.
    """
    try:
        with leaving_no_trace(engine.policy, first_step_bytes(engine)):
            run_micro_batch(engine, rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)
    return None


def run_micro_batch(engine: Engine, rows: list[int]) -> None:
    """Runs pairs as one micro-batch forward and backward, twice: in a step, gradients of earlier ones lie there."""
    share = engine.shares(engine.policy)
    batch = packing.pack([engine.train.pair(row) for row in rows], rows, share=share).to(engine.world.device)
    for _ in range(2):
        chosen, rejected = step.response_logps(engine.policy, batch)
        (chosen - rejected).sum().backward()


def first_step_bytes(engine: Engine) -> int:
    """Bytes that come to this rank with the first step only: AdamW's two states, and a resident reference."""
    config, shape, total = engine.config, engine.policy.shape, 0
    for weight in map(local, masters(engine.policy).values()):
        is_wide = weight.dtype == torch.float64  # keeps its states in float64, too
        total += 2 * weight.numel() * (8 if is_wide else DTYPE_BYTES[config.actor.optimizer.state_dtype])
    if second_model(config) and shape is not None:
        total += DTYPE_BYTES[config.ref.dtype] * shape.params // engine.world.size
    return total


@contextlib.contextmanager
def leaving_no_trace(policy: nn.Module, reserve_bytes: int = 0) -> Iterator[None]:
    """What runs inside leaves weights as they are; its gradients are dropped and the random numbers put back.

    Args:
        policy: as `pair_model.load` gives it.
        reserve_bytes: room that is kept from what runs inside, on the policy's device.
    """
    parameters = list(masters(policy).values())
    device = parameters[0].device
    on_cuda = device.type == "cuda"
    before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
    try:
        reserve: Any = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
        yield
    finally:
        reserve = None  # noqa: F841 - given back before the cache is emptied
        for parameter in parameters:
            parameter.grad = None
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], device)
            torch.cuda.empty_cache()
