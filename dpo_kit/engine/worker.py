"""What each rank runs: `python -m dpo_kit.engine.worker RUN_DIR`, started by the supervisor.

Reads the resolved config and the pair stores of a run folder, joins the other ranks, trains, and lets rank 0
write what the run records. Exit status: 0 done, 3 stopped as asked, 2 a user's mistake, 4 out of memory, 1
anything else; for the last three the cause stands in `logs/rank-N.error.json`.

Not here: writing the records (recorder), building pairs, starting or ending processes, sampling text.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.engine import loop, reference, state, token_budget
from dpo_kit.engine.checkpoint import Keeper
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.engine.recorder import Recorder
from dpo_kit.engine.state import Engine, Stopped
from dpo_kit.errors import ExitStatus, UserError
from dpo_kit.model import builtin, export, pair_model
from dpo_kit.model.parallel import DTYPES, World, init_world
from dpo_kit.preferences import PairStore, open_store
from dpo_kit.records import budget, findings, metrics
from dpo_kit.records.status import write_rank_error
from dpo_kit.system import processes
from dpo_kit.system.files import read_json


def run(run_dir: Path, world: World, should_stop: Callable[[], bool]) -> None:
    """Trains the run of a folder on this rank and exports the model.

    Raises:
        Stopped: a stop was asked for; the weights so far are in `exports/`.
        UserError: config, data or numbers do not allow the run.
        token_budget.OutOfMemory: memory ran out, of the device or of the host.
    """
    config = config_module.load(run_dir / "config.yaml")
    recorder = Recorder(run_dir, config, world)
    try:
        _run(run_dir, config, world, recorder, should_stop)
    except Exception as error:
        if not token_budget.is_out_of_memory(error):
            raise
        settled = budget.read(run_dir)
        raise token_budget.OutOfMemory(recorder.phase, error, step=recorder.step, tokens=settled) from error


def _run(
    run_dir: Path, config: Config, world: World, recorder: Recorder, should_stop: Callable[[], bool]
) -> None:
    recorder.progress("load model")
    torch.manual_seed(config.seed)
    if config.actor.deterministic:  # matrix products on CUDA refuse to run without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.actor.deterministic)
    train, valid = _stores(run_dir)
    token_budget.check(config, train)
    told: dict = {"should_stop": should_stop, "progress": recorder.progress, "found": recorder.found}
    engine = state.build(config, world, train, valid, **told)
    token_budget.settle(engine, run_dir)
    recorder.write_weights(reference.prepare(engine))
    for finding in reference.swapped_columns(train, engine.ref_train):
        recorder.found(finding)
    optimizer = make_optimizer(engine.policy, config.actor.optimizer)
    keeper = Keeper(run_dir, engine, optimizer, recorder)
    done, owes_evaluation = keeper.resume()
    recorder.resume(done, owes_evaluation=owes_evaluation)
    hooks = _hooks(run_dir, engine, recorder, keeper)
    try:
        last = loop.train(engine, hooks, optimizer, done=done, owes_evaluation=owes_evaluation)
    finally:
        recorder.flush()
    if config.recover.keep == "all":
        keeper.save(last)
    hooks.save("model")


def _stores(run_dir: Path) -> tuple[PairStore, PairStore | None]:
    data = read_json(run_dir / "data.json")
    return open_store(Path(data["train"])), open_store(Path(data["valid"])) if data.get("valid") else None


def _hooks(run_dir: Path, engine: Engine, recorder: Recorder, keeper: Keeper) -> loop.Hooks:
    """What is written around the steps."""
    config, world = engine.config, engine.world
    tokenizer = builtin.load_tokenizer(config.tokenizer_path or config.actor.path)
    dtype, end_token_id = DTYPES[config.actor.dtype], int(engine.train.pair(0).chosen_ids[-1])

    def save(name: str) -> None:
        recorder.progress("export" if name == "model" else "checkpoint")
        found, card = findings.read(run_dir), ""
        if world.is_main:
            card = export.model_card(config, metrics.readable_metrics(run_dir), found)
        folder = run_dir / name
        told: dict[str, Any] = {"dtype": dtype, "end_token_id": end_token_id, "card": card}
        export.write(engine.policy, folder, tokenizer, world, merged=config.saver.merged, **told)

    def evaluated(step: int, means: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        recorder.write_evaluation(step, means, pairs)
        if config.saver.best and step and means["dpo-eval/loss"] < keeper.best:
            keeper.best = means["dpo-eval/loss"]
            save("exports/best")

    return loop.Hooks(recorder.record, evaluated, recorder.due, save, keeper.save)


def main(run_dir: Path) -> int:
    """Runs this rank; returns its exit status."""
    processes.die_with_parent()
    processes.answer_requests()
    stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    cuda = os.environ.get("DPO_KIT_DEVICE", "cpu") == "cuda"
    try:
        config = config_module.load(run_dir / "config.yaml")
        tp_size = config_module.parse_backend(config.actor.backend).t
        world = init_world(cuda=cuda, init_method=os.environ["DPO_KIT_INIT_METHOD"], tp_size=tp_size)
        run(run_dir, world, lambda: stop)
    except Stopped:
        status = ExitStatus.STOPPED
    except UserError as error:
        write_rank_error(run_dir, rank, error)
        status = ExitStatus.MISTAKE
    except token_budget.OutOfMemory as error:
        write_rank_error(run_dir, rank, error, out_of_memory=error.facts)
        traceback.print_exc()
        status = ExitStatus.OUT_OF_MEMORY
    except BaseException as error:
        write_rank_error(run_dir, rank, error)
        traceback.print_exc()
        status = ExitStatus.FAILED
    else:
        status = ExitStatus.DONE
    if status in (ExitStatus.DONE, ExitStatus.STOPPED):
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    pair_model.preload()
    processes.imported()
    processes.wait_to_go()
    processes.leave(main(Path(sys.argv[1])))
