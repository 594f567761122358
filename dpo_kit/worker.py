"""What each rank runs: `python -m dpo_kit.worker RUN_DIR`, started by the supervisor.

Reads the resolved config and the pair stores of a run folder, joins the other ranks, trains, and lets rank 0
write what the run records. Exit status: 0 done, 3 stopped as asked, 2 a user's mistake, 1 anything else; for the
last two the cause stands in `logs/rank-N.error.json`.

Not here: building pairs, starting or ending processes, sampling text.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo_kit import builtin, card, engine, model, processes, records, reference, schedule
from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.engine import Engine, Hooks
from dpo_kit.errors import UserError
from dpo_kit.files import atomic_write, read_json, to_json
from dpo_kit.parallel import DTYPES, World, init_world
from dpo_kit.preferences import PairStore, open_store

PROGRESS_EVERY_S = 0.2


class Recorder:
    """Rank 0 writes what the run records; the other ranks keep quiet. One instance a rank."""

    def __init__(self, run_dir: Path, config: Config, world: World):
        self.run_dir, self.config, self.world = run_dir, config, world
        self.due_at: dict[str, float] = {}
        self.shown: tuple[str, float] = ("", 0.0)
        self.untold: dict[str, Any] | None = None
        self.tensorboard = (
            _tensorboard(run_dir) if world.is_main and config.stats_logger.tensorboard else None
        )

    def progress(
        self, phase: str, done: int = 0, total: int | None = None, *, step: int | None = None
    ) -> None:
        """Shows where the run is; at most a few times a second within one phase."""
        now = time.monotonic()
        total_steps = total if phase == "first step" else None
        self.untold = {"phase": phase, "done": done, "total": total, "step": step, "total_steps": total_steps}
        if phase != self.shown[0] or now - self.shown[1] > PROGRESS_EVERY_S or done == total:
            self.shown = (phase, now)
            self.flush()

    def flush(self) -> None:
        """Shows what `progress` held back, so that a run that ends early says at which step."""
        if self.world.is_main and self.untold:
            records.write_progress(self.run_dir, **self.untold)
        self.untold = None

    def record(self, values: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl` and to the TensorBoard events."""
        if not self.world.is_main:
            return
        records.append_metrics(self.run_dir, values)
        if self.tensorboard:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(name, value, values["step"])
            self.tensorboard.flush()

    def write_evaluation(self, step: int, means: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        """Records the means of an evaluation and its per-pair lines (`evaluations/step-N.jsonl`)."""
        if self.world.is_main:
            folder = self.run_dir / "evaluations"
            folder.mkdir(exist_ok=True)
            atomic_write(folder / f"step-{step}.jsonl", "".join(to_json(pair) + "\n" for pair in pairs))
        self.record({"step": step, **means})

    def write_weights(self, fingerprints: dict[str, str]) -> None:
        """Adds what the run starts from to its manifest."""
        if self.world.is_main:
            made = read_json(self.run_dir / "manifest.json", {})
            made["weights"] = {
                name: {"path": getattr(self.config, name).path, "fingerprint": fingerprint}
                for name, fingerprint in fingerprints.items()
            }
            atomic_write(self.run_dir / "manifest.json", to_json(made, indent=2))

    def due(self, section: str, step: int, steps_per_epoch: int) -> bool:
        """Whether `saver` or `evaluator` is due after a step; rank 0's clock decides for all ranks."""
        freq = getattr(self.config, section)
        if freq.freq_steps and step % freq.freq_steps == 0:
            return True
        if freq.freq_epochs and step % (freq.freq_epochs * steps_per_epoch) == 0:
            return True
        if not freq.freq_secs:
            return False
        now = torch.tensor(time.time(), dtype=torch.float64)
        if self.world.size > 1:
            dist.broadcast(now, 0)
        due = float(now) >= self.due_at.setdefault(section, float(now) + freq.freq_secs)
        if due:
            self.due_at[section] = float(now) + freq.freq_secs
        return due


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            'no TensorBoard events: pip install "dpo-kit[tracking]"; metrics.jsonl has every number',
            flush=True,
        )
        return None
    return SummaryWriter(str(run_dir / "tensorboard"))


def run(run_dir: Path, world: World, should_stop: Any) -> None:
    """Trains the run of a folder on this rank and exports the model.

    Raises:
        engine.Stopped: a stop was asked for; the weights so far are in `exports/`.
        UserError: config, data or numbers do not allow the run.
    """
    config = config_module.load(run_dir / "config.yaml")
    recorder = Recorder(run_dir, config, world)
    recorder.progress("load model")
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.actor.deterministic)
    data = read_json(run_dir / "data.json")
    train = open_store(Path(data["train"]))
    valid = open_store(Path(data["valid"])) if data.get("valid") else None
    check_micro_batch(config, train)
    dtype = DTYPES[config.actor.dtype]
    policy = load_model(config, config.actor.path, config.actor.dtype, world, [train, valid], trainable=True)
    if config.actor.disable_dropout:
        model.disable_dropout(policy)
    state = Engine(
        config=config,
        world=world,
        policy=policy,
        train=train,
        valid=valid,
        should_stop=should_stop,
        progress=recorder.progress,
    )
    weights = prepare_reference(state, Path(config.cluster.fileroot))
    recorder.write_weights(weights)
    tokenizer = builtin.load_tokenizer(builtin.ensure(config.tokenizer_path or config.actor.path))
    end_token_id = int(train.pair(0).chosen_ids[-1])

    def save(folder: Path) -> None:
        text = card.model_card(config, records.read_metrics(run_dir)) if world.is_main else ""
        model.export(policy, folder, tokenizer, world, dtype=dtype, end_token_id=end_token_id, card=text)

    best = math.inf

    def evaluated(step: int, means: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        nonlocal best
        recorder.write_evaluation(step, means, pairs)
        if config.saver.best and step and means["dpo-eval/loss"] < best:
            best = means["dpo-eval/loss"]
            save(run_dir / "exports" / "best")

    hooks = Hooks(
        stepped=recorder.record,
        evaluated=evaluated,
        due=recorder.due,
        save=lambda step: save(run_dir / "exports" / f"step-{step}"),
    )
    try:
        engine.train(state, hooks)
    finally:
        recorder.flush()
    recorder.progress("export")
    save(run_dir / "model")


def check_micro_batch(config: Config, train: PairStore) -> None:
    """Refuses a micro-batch budget that the longest pair does not fit in."""
    longest = max(engine.pair_cost(train.lengths(i), config.actor.share_prompt) for i in range(len(train)))
    for name, spec in (("actor", config.actor.mb_spec), ("ref", config.ref.mb_spec)):
        tokens = spec.max_tokens_per_mb
        if tokens != "auto" and longest > int(tokens):
            raise UserError(
                f"{name}.mb_spec.max_tokens_per_mb = {tokens} is less than the longest pair ({longest} tokens); "
                f"use {longest} or more, or lower train_dataset.max_length = {config.train_dataset.max_length}"
            )


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
    folder = reference.cache_folder(fileroot, marks[1], config.ref.dtype, share=config.actor.share_prompt)
    if train_rows is None:
        train_rows = schedule.rows_of_run(config, len(state.train))
    needs = [(state.train, train_rows)]
    if state.valid is not None:
        needs.append((state.valid, np.arange(len(state.valid))))
    keys = [reference.pair_keys(store, rows) for store, rows in needs]
    values, found = map(list, zip(*(reference.lookup(folder, k) for k in keys), strict=True))
    num_pairs, num_missing = sum(map(len, keys)), sum(int((~f).sum()) for f in found)
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
    tables = [_spread(v, rows, len(store)) for v, (store, rows) in zip(values, needs, strict=True)]
    state.ref_train, state.ref_valid = tables[0], tables[1] if state.valid is not None else None
    return weights


def _spread(values: np.ndarray, rows: np.ndarray, num_pairs: int) -> np.ndarray:
    """Values of some rows as a table of all rows; NaN where no step needs them."""
    table = np.full((num_pairs, values.shape[1]), np.nan)
    table[rows] = values
    return table


def _load_reference(state: Engine) -> model.PairModel:
    c = state.config
    return load_model(c, c.ref.path, c.ref.dtype, state.world, [state.train, state.valid], trainable=False)


def load_model(
    config: Config, path: str, dtype: str, world: World, stores: list[PairStore | None], *, trainable: bool
) -> model.PairModel:
    """The policy or the reference of a run, ready to score its pairs."""
    longest = max(max(s.lengths(i)[1:]) for s in stores if s is not None for i in range(len(s)))
    return model.load(
        builtin.ensure(path),
        world,
        dtype=DTYPES[dtype],
        trainable=trainable,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        longest_tokens=longest,
    )


def main(run_dir: Path) -> int:
    """Runs this rank; returns its exit status."""
    processes.die_with_parent()
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
    except BaseException as error:
        records.write_rank_error(run_dir, rank, error)
        status = 2 if isinstance(error, UserError) else 1
        if status == 1:
            import traceback

            traceback.print_exc()
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
