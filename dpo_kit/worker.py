"""What each rank runs: `python -m dpo_kit.worker RUN_DIR`, started by the supervisor.

Reads the resolved config and the pair stores of a run folder, joins the other ranks, trains, and lets rank 0
write what the run records. Exit status: 0 done, 3 stopped as asked, 2 a user's mistake, 4 out of memory, 1
anything else; for the last three the cause stands in `logs/rank-N.error.json`.

Not here: writing the records (recorder), building pairs, starting or ending processes, sampling text.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_kit import (
    budget,
    builtin,
    card,
    engine,
    export,
    findings,
    halving,
    hangs,
    history,
    loading,
    manifest,
    measures,
    memory,
    packing,
    processes,
    records,
    resuming,
)
from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.costs import Shape
from dpo_kit.engine import Engine, Hooks
from dpo_kit.errors import UserError
from dpo_kit.files import read_json
from dpo_kit.keeper import Keeper
from dpo_kit.parallel import DTYPES, World, init_world
from dpo_kit.preferences import PairStore, open_store
from dpo_kit.recorder import Recorder


def run(run_dir: Path, world: World, should_stop: Any) -> None:
    """Trains the run of a folder on this rank and exports the model.

    Raises:
        engine.Stopped: a stop was asked for; the weights so far are in `exports/`.
        UserError: config, data or numbers do not allow the run.
        budget.OutOfMemory: memory ran out, of the device or of the host.
    """
    config = config_module.load(run_dir / "config.yaml")
    recorder = Recorder(run_dir, config, world)
    recorder.progress("load model")
    try:
        _run(run_dir, config, world, recorder, should_stop)
    except Exception as error:
        if not budget.is_out_of_memory(error):
            raise
        settled = halving.read(run_dir)
        raise budget.OutOfMemory(recorder.phase, error, step=recorder.step, tokens=settled) from error


def _run(run_dir: Path, config: Config, world: World, recorder: Recorder, should_stop: Any) -> None:
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.actor.deterministic)
    data = read_json(run_dir / "data.json")
    train = open_store(Path(data["train"]))
    valid = open_store(Path(data["valid"])) if data.get("valid") else None
    check_micro_batch(config, train)
    free = budget.free_bytes(world)
    state = Engine(
        config=config,
        world=world,
        policy=loading.load_policy(config, world, train, valid),
        train=train,
        valid=valid,
        should_stop=should_stop,
        progress=recorder.progress,
        found=recorder.found,
    )
    settle_budget(run_dir, state, free)
    recorder.write_weights(loading.prepare_reference(state, Path(config.cluster.fileroot)))
    for finding in measures.swapped_columns(train, state.ref_train):
        recorder.found(finding)
    optimizer = engine.make_optimizer(state)
    keeper = Keeper(run_dir, state, optimizer, recorder)
    facts = keeper.resume()
    recorder.resume(facts["step"], owes_evaluation=facts["owes_evaluation"])
    tokenizer = builtin.load_tokenizer(builtin.ensure(config.tokenizer_path or config.actor.path))
    end_token_id = int(train.pair(0).chosen_ids[-1])
    dtype = DTYPES[config.actor.dtype]

    def save(folder: Path, phase: str = "checkpoint") -> None:
        recorder.progress(phase)
        found = findings.read(run_dir)
        text = card.model_card(config, history.readable_metrics(run_dir), found) if world.is_main else ""
        export.write(
            state.policy, folder, tokenizer, world, dtype=dtype, end_token_id=end_token_id, card=text
        )

    def evaluated(step: int, means: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        recorder.write_evaluation(step, means, pairs)
        if config.saver.best and step and means["dpo-eval/loss"] < keeper.best:
            keeper.best = means["dpo-eval/loss"]
            save(run_dir / "exports" / "best")

    hooks = Hooks(
        stepped=recorder.record,
        evaluated=evaluated,
        due=recorder.due,
        save=lambda step: save(run_dir / "exports" / f"step-{step}"),
        checkpoint=keeper.save,
    )
    try:
        last = engine.train(
            state, hooks, optimizer, done=facts["step"], owes_evaluation=facts["owes_evaluation"]
        )
    finally:
        recorder.flush()
    if config.recover.keep == "all":
        keeper.save(last)
    save(run_dir / "model", "export")


def check_micro_batch(config: Config, train: PairStore) -> None:
    """Refuses a micro-batch budget that the longest pair does not fit in."""
    longest = int(packing.pair_costs(train.all_lengths(), config.actor.share_prompt).max())
    if problem := resuming.micro_batch_problem(config, longest):
        raise UserError(f"{problem}, or lower train_dataset.max_length = {config.train_dataset.max_length}")


# ---------------------------------------------------------------- the budget of micro-batches


def settle_budget(run_dir: Path, state: Engine, free: int) -> None:
    """Settles how many tokens a micro-batch may have, tells the engine, and writes it to the run.

    Args:
        state: gets `actor_tokens` and `ref_tokens`; on one CUDA rank its policy may be loaded again.
        free: bytes of this rank before the policy was loaded (`budget.free_bytes`).
    """
    config, world = state.config, state.world
    shape, lengths, share = state.policy.shape, state.train.all_lengths(), state.shares(state.policy)
    costs = packing.pair_costs(lengths, share)
    work = shape.work(lengths, share) if shape is not None and world.size > 1 else None
    on_cuda = world.device.type == "cuda"
    before = halving.read(run_dir)
    made = budget.settle(
        config, world, shape=shape, costs=costs, free=free, before=before, on_cuda=on_cuda, work=work
    )
    _write_budget(run_dir, world, made)
    if on_cuda and config.actor.mb_spec.max_tokens_per_mb == "auto":
        made = budget.measured(made, config, costs, world.size, _trial(state, shape, made), work)
        _write_budget(run_dir, world, made)
    state.actor_tokens, state.ref_tokens = made["actor"], made["ref"]
    if world.is_main:
        print(budget.told(made), flush=True)


def _write_budget(run_dir: Path, world: World, made: dict[str, Any]) -> None:
    if world.is_main:
        halving.write(run_dir, made)
        manifest.write_commands(run_dir)
    world.barrier()


def _trial(state: Engine, shape: Shape | None, made: dict[str, Any]) -> Callable[[list[int]], None]:
    """What `budget.measured` runs: a micro-batch of these rows, beside room for what the first step brings.

    FSDP is of no use after an error in mid-pass: a rank alone loads its policy again before the next try. Of
    several, one may run out of memory while the others wait in a collective: there the error ends the ranks,
    and the supervisor halves and starts them again.
    """
    config, world = state.config, state.world
    broken = False

    def try_rows(rows: list[int]) -> None:
        nonlocal broken
        if broken:
            gc.collect()
            torch.cuda.empty_cache()
            state.policy = loading.load_policy(config, world, state.train, state.valid)
        broken = True
        reserve = budget.optimizer_bytes(state.policy, memory.DTYPE_BYTES[config.actor.optimizer.state_dtype])
        if config.ref.logps == "online" and shape is not None:
            reserve += memory.DTYPE_BYTES[config.ref.dtype] * shape.params // world.size
        try:
            with budget.leaving_no_trace(state.policy, reserve):
                run_micro_batch(state, rows)
        except Exception as error:
            if not budget.is_out_of_memory(error):
                raise
            if world.size > 1:
                raise budget.OutOfMemory("measuring", error, section="actor", tokens=made) from error
            del state.policy  # its memory is needed for the next try
            raise
        broken = False

    return try_rows


def run_micro_batch(state: Engine, rows: list[int]) -> None:
    """Runs pairs as one micro-batch forward and backward, twice: in a step, gradients of earlier ones lie there."""
    share = state.shares(state.policy)
    batch = packing.pack([state.train.pair(row) for row in rows], rows, share=share).to(state.world.device)
    for _ in range(2):
        chosen, rejected = engine.response_logps(state.policy, batch)
        (chosen - rejected).sum().backward()


def main(run_dir: Path) -> int:
    """Runs this rank; returns its exit status."""
    processes.die_with_parent()
    hangs.answer_requests()
    stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    cuda = os.environ.get("DPO_KIT_DEVICE", "cpu") == "cuda"
    try:
        world = init_world(cuda=cuda, init_method=f"file://{os.environ['DPO_KIT_INIT_FILE']}")
        run(run_dir, world, lambda: stop)
    except engine.Stopped:
        status = 3
    except UserError as error:
        records.write_rank_error(run_dir, rank, error)
        status = 2
    except budget.OutOfMemory as error:
        records.write_rank_error(run_dir, rank, error, out_of_memory=error.facts)
        traceback.print_exc()
        status = halving.OUT_OF_MEMORY
    except BaseException as error:
        records.write_rank_error(run_dir, rank, error)
        traceback.print_exc()
        status = 1
    else:
        status = 0
    if status in (0, 3):
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    # os._exit: a rank that failed must not wait for peers in the process group's destructor.
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
