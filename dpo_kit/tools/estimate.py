"""What a run will need, before it starts: memory, tokens, time and disk.

    found = estimate.make(config)         a dict of plain numbers, bytes and seconds
    found = estimate.make(config, device_bytes=80 * 2**30)   of a machine that is not this one: no times
    print(estimate.text(found))           one table; its last line says whether the run fits
    estimate.refuse(found)                UserError where it does not, with a setting that does

Memory is `costs.step_bytes` at the largest micro-batch that the run plans; time comes from `time_probe`, a few
blocks of the same shape on the same ranks. Not here: what a launch refuses without data (`preflight`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit import config as config_module
from dpo_kit import dataset
from dpo_kit.config import Config, steps
from dpo_kit.engine import reference, schedule, token_budget
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.launch import preflight
from dpo_kit.model import builtin
from dpo_kit.model.costs import (
    DTYPE_BYTES,
    Shape,
    checkpoint_bytes,
    checkpoints_at_once,
    disk_need,
    export_bytes,
    memory_problem,
    step_bytes,
    tokens_that_fit,
    trained_params,
)
from dpo_kit.model.model_folder import fingerprint, known_hashes, read_shape, snapshot
from dpo_kit.model.packing import pair_costs, plan_step
from dpo_kit.preferences import PairStore
from dpo_kit.system import machine

# Steps of a run that are planned; more tell nothing new.
PLANNED_STEPS = 200
PROBED_MICRO_BATCHES = 2
# Seconds from the launch to loaded weights, and what a host reads or a model writes in a second.
START_S = {"cpu": 20.0, "cuda": 30.0}
READ_BYTES_PER_S = {"cpu": 1e10, "cuda": 1.5e12}
WRITE_BYTES_PER_S = 5e8
LAYER_S = 5e-4  # of one layer and token in generation, whatever its size
SAMPLES_BATCH = 8
METRICS_BYTES, EVALUATION_BYTES, CACHE_BYTES = 600, 350, 32
GIB = 2**30


def make(config: Config, *, probe: bool = True, device_bytes: int | None = None) -> dict[str, Any]:
    """The estimate of a run, as JSON values.

    Args:
        config: devices resolved (`launch.resolve_world`, `launch.plan_world`).
        probe: try a few blocks for the times; a run that does not fit in memory is never tried.
        device_bytes: memory of each device of a machine that is not this one, whose times, free disk and, it may be,
            data nobody knows here; None: the run is for this machine.

    Raises:
        UserError: the model's config.json is nowhere, its sizes do not divide, or the data cannot be used.
    """
    folder = model_folder(config.actor.path)
    shape = read_shape(str(folder))
    if no_split := preflight.not_split(config):
        raise ConfigError(no_split)
    num_ranks = config_module.parse_backend(config.actor.backend).world_size
    is_here = device_bytes is None
    train, valid = _stores(config, is_here)
    free = device_bytes or machine.free_bytes_of_rank(num_ranks, on_cuda=bool(config.cluster.n_gpus_per_node))
    tokens = _tokens(config, shape, train, num_ranks, free)
    largest, longest = tokens["largest_micro_batch"], tokens.get("longest_pair") or 1
    needed = step_bytes(shape, config, num_ranks=num_ranks, tokens=largest)
    found: dict[str, Any] = {
        "model": {
            **{"path": config.actor.path, "params": shape.params, "dtype": config.actor.dtype},
            "trained_params": trained_params(shape, config),
        },
        "ranks": num_ranks,
        "device": "cuda" if config.cluster.n_gpus_per_node else "cpu",
        "is_here": is_here,
        "memory": {**needed, "total": sum(needed.values()), "free": free},
        "tokens": tokens,
        "time": None,
        "disk": None,
        "problems": [],
    }
    no_memory = memory_problem(
        shape, config, num_ranks=num_ranks, tokens=largest, longest=longest, free_bytes=free
    )
    if probe and is_here and train is not None and not no_memory:
        found["time"] = _time(config, shape, folder, found, train, valid)
    found["disk"], no_disk = _disk(config, shape, found, train, valid)
    if not is_here:
        found["disk"]["free"], no_disk = None, ""
    found["problems"] = [problem for problem in (no_memory, no_disk) if problem]
    return found


def refuse(found: dict[str, Any]) -> None:
    """Raises UserError when the run of an estimate does not fit, naming the numbers and a setting that does."""
    if found["problems"]:
        raise UserError("; ".join(found["problems"]))


def model_folder(path: str) -> Path:
    """The folder with a model's config.json: built-in, local, or from the hub's cache.

    Raises:
        UserError: it is nowhere to be had.
    """
    folder = str(Path(builtin.ensure(path)).expanduser())
    try:
        return snapshot(folder, weights=False)
    except UserError as error:
        raise UserError(
            f"actor.path = {path!r}: its config.json is neither in a local folder nor given by the hub"
            f" ({type(error.__cause__).__name__}); download the model, or give a folder with config.json"
        ) from error


def _stores(config: Config, is_here: bool) -> tuple[PairStore | None, PairStore | None]:
    """The pair stores of training and validation; None where the data are on the hub.

    For another machine they are built below `runs/` where `cluster.fileroot` is not here, and are None where the
    model's folder has no tokenizer, either.
    """
    stores: list[PairStore | None] = []
    if not is_here:
        folder = Path(builtin.ensure(config.tokenizer_path))
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            return None, None
        if not Path(config.cluster.fileroot).is_dir():
            config = copy.deepcopy(config)
            config.cluster.fileroot = str(config_module.resolve_path("runs", config_module.project_root()))
    for split, section in (("train", config.train_dataset), ("valid", config.valid_dataset)):
        path = section and (section.path or config.train_dataset.path)
        is_local = path and (path == "sample" or Path(path).expanduser().exists())
        stores.append(dataset.build(config, split) if is_local else None)
    return stores[0], stores[1]


# --- tokens ---------------------------------------------------------------------------------------------------


def _tokens(
    config: Config, shape: Shape, store: PairStore | None, num_ranks: int, free: int
) -> dict[str, Any]:
    bound = micro_batch_bound(config, shape, num_ranks, free)
    fitting = tokens_that_fit(shape, config, num_ranks=num_ranks, free_bytes=free)
    if store is None:
        return {"pairs": None, "largest_micro_batch": bound, "bound": bound, "fitting_micro_batch": fitting}
    num_steps = steps.num_steps(config, len(store))
    planned = _planned(config, len(store), num_steps)
    lengths, shares = store.all_lengths(), config.actor.share_prompt
    costs = {share: pair_costs(lengths, share) for share in (True, False)}
    run = costs[shares]
    dp_size = config_module.parse_backend(config.actor.backend).d
    work = shape.work(lengths, shares) if dp_size > 1 else None
    largest, _ = token_budget.largest_micro_batch(config, run, dp_size, bound, work)
    per_rank, num_micro_batches = [], []
    for rows in planned:
        plan = plan_step(run[rows].tolist(), dp_size, bound, None if work is None else work[rows].tolist())
        sizes = [[int(sum(run[rows[i]] for i in members)) for members in rank] for rank in plan]
        per_rank.append(max(map(sum, sizes)))
        num_micro_batches.append(len(plan[0]))
    return {
        "pairs": len(store),
        "steps": num_steps,
        "shared_per_step": float(np.mean([costs[True][rows].sum() for rows in planned])),
        "unshared_per_step": float(np.mean([costs[False][rows].sum() for rows in planned])),
        "busiest_rank_per_step": float(np.mean(per_rank)),
        "micro_batches_per_step": float(np.mean(num_micro_batches)),
        "largest_micro_batch": largest,
        "longest_pair": int(run.max()),
        "bound": bound,
        "fitting_micro_batch": fitting,
    }


def micro_batch_bound(config: Config, shape: Shape, num_ranks: int, free: int) -> int:
    """Tokens of a training micro-batch at most; `auto` is what fits, as engine/token_budget settles it."""
    given = [config.actor.mb_spec.max_tokens_per_mb]
    if config.ref.logps == "online":
        given.append(config.ref.mb_spec.max_tokens_per_mb)
    on_cuda = bool(config.cluster.n_gpus_per_node)
    auto = max(1, token_budget.fitting_tokens(config, shape, num_ranks, free, on_cuda=on_cuda))
    return min(auto if tokens == "auto" else int(tokens) for tokens in given)


def _planned(config: Config, num_pairs: int, num_steps: int) -> list[np.ndarray]:
    """Rows of every step, or of `PLANNED_STEPS` spread over the run."""
    steps = np.unique(np.linspace(1, num_steps, min(num_steps, PLANNED_STEPS)).astype(int))
    return [schedule.step_rows(config, num_pairs, int(step)) for step in steps]


# --- time -----------------------------------------------------------------------------------------------------


def _time(
    config: Config,
    shape: Shape,
    folder: Path,
    found: dict[str, Any],
    train: PairStore,
    valid: PairStore | None,
) -> dict[str, Any]:
    """Seconds by part of the run, and of one step."""
    from dpo_kit.tools import time_probe

    tokens, device = found["tokens"], found["device"]
    dp_size = config_module.parse_backend(config.actor.backend).d
    costs = pair_costs(train.all_lengths(), config.actor.share_prompt)
    plan = _probed(config, costs, tokens, dp_size)
    seconds = time_probe.measure(config, str(folder), train, plan)
    layers = shape.layers
    probed = max(sum(costs[r] for members in rank for r in members) for rank in plan)
    forward = (seconds["forward"] + layers * seconds["block_forward"]) / probed
    backward = (seconds["backward"] + layers * seconds["block_backward"]) / probed
    online = config.ref.logps == "online"
    step = (forward * (2 if online else 1) + backward) * tokens["busiest_rank_per_step"]
    step += seconds["update"] * trained_params(shape, config) / seconds["params"]
    to_reference = 0 if online else _missing_tokens(config, train, valid)
    share = config.actor.share_prompt
    valid_tokens = 0 if valid is None else int(pair_costs(valid.all_lengths(), share).sum())
    num_evaluations, num_exports, _ = _counts(config, tokens["pairs"], step)
    parts = {
        "start": START_S[device] + 4 * shape.params / WRITE_BYTES_PER_S,
        "reference_pass": forward * to_reference / dp_size,
        "training": step * tokens["steps"],
        "evaluations": num_evaluations * forward * valid_tokens / dp_size,
        "exports": num_exports * export_bytes(shape, config) / WRITE_BYTES_PER_S,
        "samples": _samples_s(config, shape, valid, device),
    }
    return {**parts, "step": step, "evaluations_count": num_evaluations, "total": sum(parts.values())}


def _probed(config: Config, costs: np.ndarray, tokens: dict[str, Any], dp_size: int) -> list[list[list[int]]]:
    """The micro-batches to try: the first ones of the step that is closest to the mean."""
    steps = _planned(config, len(costs), tokens["steps"])
    rows = min(steps, key=lambda rows: abs(costs[rows].sum() - np.mean([costs[r].sum() for r in steps])))
    plan = plan_step([int(costs[r]) for r in rows], dp_size, tokens["bound"])
    return [[[int(rows[i]) for i in members] for members in rank[:PROBED_MICRO_BATCHES]] for rank in plan]


def _missing_tokens(config: Config, train: PairStore, valid: PairStore | None) -> int:
    """Tokens of the pairs of the run that the reference's cache does not hold."""
    root = Path(config.cluster.fileroot)
    mark = fingerprint(builtin.ensure(config.ref.path), known_hashes(root))
    share = config.actor.share_prompt
    cache = reference.cache_folder(root, mark, config.ref.dtype, "shared" if share else "unshared")
    missing = 0
    for store, rows in ((train, schedule.rows_of_run(config, len(train))), (valid, None)):
        if store is not None:
            rows = np.arange(len(store)) if rows is None else rows
            found = reference.lookup(cache, reference.pair_keys(store, rows))[1]
            missing += int(pair_costs(store.all_lengths(), share)[rows[~found]].sum())
    return missing


def _counts(config: Config, num_pairs: int | None, step_s: float) -> tuple[int, int, int | None]:
    """Evaluations, exports (`model/`, `exports/best/`, those of `saver`) and checkpoints of a run.

    Without the pairs the first two are the least there can be, and the last is None.
    """
    if num_pairs is None:
        return 0, 1, None
    evaluations, exports, checkpoints = (
        schedule.times_due(section, config, num_pairs, step_s)
        for section in (config.evaluator, config.saver, config.recover)
    )
    evaluations = 0 if config.valid_dataset is None else 1 + config.evaluator.before_training + evaluations
    return evaluations, 1 + config.saver.best + exports, checkpoints


def _samples_s(config: Config, shape: Shape, valid: PairStore | None, device: str) -> float:
    """Answers of reference and policy; one token of a batch reads all weights once."""
    if valid is None or not config.evaluator.num_samples:
        return 0.0
    num_prompts = min(config.evaluator.num_samples, len(valid))
    token_s = shape.layers * LAYER_S
    token_s += shape.params * DTYPE_BYTES[config.actor.dtype] / READ_BYTES_PER_S[device]
    return 2 * -(-num_prompts // SAMPLES_BATCH) * config.evaluator.max_new_tokens * token_s


# --- disk -----------------------------------------------------------------------------------------------------


def _disk(
    config: Config, shape: Shape, found: dict[str, Any], train: PairStore | None, valid: PairStore | None
) -> tuple[dict[str, int], str]:
    """Bytes that the run adds below `cluster.fileroot`, by part, and what is free there; why they do not fit."""
    root, tokens = Path(config.cluster.fileroot), found["tokens"]
    stores = [store for store in (train, valid) if store is not None]
    step_s = found["time"]["step"] if found["time"] else 0.0
    evaluations, exports, due = _counts(config, tokens["pairs"], step_s)
    checkpoints = checkpoints_at_once(config, due)
    num_pairs = sum(map(len, stores))
    num_valid = len(valid) if valid is not None else 0
    parts = {
        "pair_store": sum(f.stat().st_size for store in stores for f in store.path.iterdir()),
        "reference_cache": 0 if config.ref.logps == "online" else CACHE_BYTES * num_pairs,
        "exports": exports * export_bytes(shape, config),
        "checkpoints": checkpoints * checkpoint_bytes(shape, config),
        "records": tokens.get("steps", 0) * METRICS_BYTES + evaluations * num_valid * EVALUATION_BYTES,
    }
    free, other = machine.free_disk(root), sum(parts.values()) - parts["exports"] - parts["checkpoints"]
    _, problem = disk_need(
        shape, config, checkpoints=checkpoints, models=exports, free_bytes=free, other_bytes=other
    )
    return {**parts, "total": sum(parts.values()), "free": free}, problem


# --- the table ------------------------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
    """The estimate as a table; the last line says `fits`, or what does not."""
    model, tokens = found["model"], found["tokens"]
    trained = model["trained_params"]
    some = f" ({trained / 1e6:,.1f} M in adapters are trained)" if trained != model["params"] else ""
    lines = [
        f"{model['path']}: {model['params'] / 1e6:,.1f} M parameters{some}, {model['dtype']},"
        f" {found['ranks']} {found['device'].upper()} rank{'s' * (found['ranks'] > 1)}",
        "",
        *_rows("memory a rank", found["memory"], _gib),
        *_rows("tokens", {k: v for k, v in tokens.items() if v is not None}, lambda v: f"{v:,.0f}"),
        *_rows("time", found["time"] or {}, _seconds),
        *_rows("disk", {k: v for k, v in found["disk"].items() if v is not None}, _gib),
    ]
    if tokens["pairs"] is None:
        lines.append("training data or tokenizer are not on this machine: full micro-batches assumed")
    if not found["is_here"]:
        lines.append("no times, nor what is free on the disk: only the machine that is planned could tell")
    elif not found["time"]:
        lines.append("no times: not probed")
    return "\n".join([*lines, "", "; ".join(found["problems"]) or "fits"])


def _rows(title: str, values: dict[str, Any], show: Any) -> list[str]:
    lines = []
    for i, (name, value) in enumerate(values.items()):
        told = f"{value:,.0f}" if name.endswith("count") else show(value)
        lines.append(f"{title if i == 0 else '':14}  {name.replace('_', ' '):24}{told:>14}")
    return lines


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f} GiB" if value >= GIB / 100 else f"{value / 2**20:,.2f} MiB"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:,.1f} s"
    return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"
