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

import numpy as np
import torch
import torch.distributed as dist

from dpo_kit import (
    budget,
    builtin,
    card,
    engine,
    halving,
    hangs,
    manifest,
    memory,
    model,
    packing,
    processes,
    records,
    reference,
    schedule,
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
        policy=load_policy(config, world, train, valid),
        train=train,
        valid=valid,
        should_stop=should_stop,
        progress=recorder.progress,
    )
    settle_budget(run_dir, state, free)
    recorder.write_weights(prepare_reference(state, Path(config.cluster.fileroot)))
    optimizer = engine.make_optimizer(state)
    keeper = Keeper(run_dir, state, optimizer)
    facts = keeper.resume()
    recorder.resume(facts["step"])
    tokenizer = builtin.load_tokenizer(builtin.ensure(config.tokenizer_path or config.actor.path))
    end_token_id = int(train.pair(0).chosen_ids[-1])
    dtype = DTYPES[config.actor.dtype]

    def save(folder: Path) -> None:
        text = card.model_card(config, records.read_metrics(run_dir)) if world.is_main else ""
        model.export(
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
    recorder.progress("export")
    if config.recover.keep == "all":
        keeper.save(last)
    save(run_dir / "model")
    keeper.finish()


def check_micro_batch(config: Config, train: PairStore) -> None:
    """Refuses a micro-batch budget that the longest pair does not fit in."""
    longest = int(packing.pair_costs(train.all_lengths(), config.actor.share_prompt).max())
    for name, spec in (("actor", config.actor.mb_spec), ("ref", config.ref.mb_spec)):
        tokens = spec.max_tokens_per_mb
        if tokens != "auto" and longest > int(tokens):
            raise UserError(
                f"{name}.mb_spec.max_tokens_per_mb = {tokens} is less than the longest pair ({longest} tokens); "
                f"use {longest} or more, or lower train_dataset.max_length = {config.train_dataset.max_length}"
            )


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
            state.policy = load_policy(config, world, state.train, state.valid)
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


# ---------------------------------------------------------------- the reference and the models


def prepare_reference(state: Engine, fileroot: Path, train_rows: np.ndarray | None = None) -> dict[str, str]:
    """Gives the engine its reference: values from the cache, computed where missing, or the resident model.

    Args:
        state: gets `ref_train` and `ref_valid`, or `ref_model`.
        fileroot: where the cache is.
        train_rows: of the training store; those that the run trains on when left out.

    Returns:
        The fingerprint of the weights of `actor` and `ref`.
    """
    config, world = state.config, state.world
    marks = [""] * 2
    if world.is_main:
        known = fileroot / ".cache" / "fingerprints.json"
        marks = [model.fingerprint(builtin.ensure(p), known) for p in (config.actor.path, config.ref.path)]
    if world.size > 1:
        dist.broadcast_object_list(marks, 0)
    weights = dict(zip(("actor", "ref"), marks, strict=True))
    state.policy_is_reference = marks[0] == marks[1] and config.actor.dtype == config.ref.dtype
    if config.ref.logps == "online":
        state.ref_model = _load_reference(state)
        return weights
    unpacked = model.why_unpacked(builtin.ensure(config.ref.path), _longest([state.train, state.valid]))
    kernel = "plain" if unpacked else "shared" if config.actor.share_prompt else "unshared"
    folder = reference.cache_folder(fileroot, marks[1], config.ref.dtype, kernel)
    if train_rows is None:
        train_rows = schedule.rows_of_run(config, len(state.train))
    needs = [(state.train, train_rows)]
    if state.valid is not None:
        needs.append((state.valid, np.arange(len(state.valid))))
    keys, values, found = map(list, zip(*(_look_up(world, folder, *need) for need in needs), strict=True))
    num_pairs, num_missing = sum(map(len, values)), sum(int((~f).sum()) for f in found)
    if world.is_main:
        print(f"reference: {num_pairs - num_missing} of {num_pairs} pairs from the cache", flush=True)
    if num_missing:
        source = state.policy if state.policy_is_reference else _load_reference(state)
        source.eval()
        done = 0
        for i, (store, rows) in enumerate(needs):
            missing = ~found[i]
            if missing.any():
                run = engine.reference_pass(state, source, store, rows[missing], done=done, total=num_missing)
                values[i][missing] = run
                done += len(run)
        if world.is_main:
            fresh_keys, fresh_values = (
                np.concatenate([a[~f] for a, f in zip(arrays, found, strict=True)])
                for arrays in (keys, values)
            )
            reference.add(folder, fresh_keys, fresh_values)
    tables = [
        _spread(v, rows, len(store)).to(world.device) for v, (store, rows) in zip(values, needs, strict=True)
    ]
    state.ref_train, state.ref_valid = tables[0], tables[1] if state.valid is not None else None
    return weights


def _look_up(
    world: World, folder: Path, store: PairStore, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (rank 0's alone are used), values and mask of what the cache holds; rank 0 looks for all.

    Were each rank to look for itself, a run that writes meanwhile could give them different gaps to fill.
    """
    keys = reference.pair_keys(store, rows) if world.is_main else np.empty((0, 16), np.uint8)
    table = torch.empty(len(rows), 3, dtype=torch.float64)
    if world.is_main:
        values, found = reference.lookup(folder, keys)
        table = torch.from_numpy(np.column_stack([values, found]))
    if world.size > 1:
        dist.broadcast(table, 0)
    return keys, table[:, :2].numpy().copy(), table[:, 2].numpy().astype(bool)


def _spread(values: np.ndarray, rows: np.ndarray, num_pairs: int) -> torch.Tensor:
    """Values of some rows as a table of all rows; NaN where no step needs them."""
    table = np.full((num_pairs, values.shape[1]), np.nan)
    table[rows] = values
    return torch.from_numpy(table)


def _load_reference(state: Engine) -> model.PairModel:
    c = state.config
    return load_model(c, c.ref.path, c.ref.dtype, state.world, [state.train, state.valid], trainable=False)


def load_policy(config: Config, world: World, train: PairStore, valid: PairStore | None) -> model.PairModel:
    """The policy of a run, ready to be trained."""
    actor = config.actor
    policy = load_model(config, actor.path, actor.dtype, world, [train, valid], trainable=True)
    if actor.disable_dropout:
        model.disable_dropout(policy)
    return policy


def load_model(
    config: Config, path: str, dtype: str, world: World, stores: list[PairStore | None], *, trainable: bool
) -> model.PairModel:
    """The policy or the reference of a run, ready to score its pairs."""
    loaded = model.load(
        builtin.ensure(path),
        world,
        dtype=DTYPES[dtype],
        trainable=trainable,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        longest_tokens=_longest(stores),
        compiled=config.actor.compile,
    )
    if not loaded.packed and world.is_main:
        why = model.why_unpacked(builtin.ensure(path), _longest(stores))
        print(
            f"{'actor' if trainable else 'ref'}.path: rows are not packed, for {why}; each text runs whole, with the "
            "model's own attention: the same numbers, slower",
            flush=True,
        )
    return loaded


def _longest(stores: list[PairStore | None]) -> int:
    """Tokens of the longest text."""
    return max(int(store.all_lengths()[:, 1:].max()) for store in stores if store is not None)


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
