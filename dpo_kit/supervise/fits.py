"""Whether a run fits in this machine's memory and on its disk, told in a blink before anything of it starts.

Not here: the arithmetic and the words (model/costs), models and data that are not there (launch/preflight).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dpo_kit.config import Config, parse_backend
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.model import costs, model_folder
from dpo_kit.records.checkpoint_folders import steps
from dpo_kit.system import folders, machine
from dpo_kit.system.files import read_json


def check(config: Config) -> str:
    """Refuses a run that cannot fit; nothing is said while the model's sizes are not known.

    Args:
        config: devices resolved.

    Returns:
        What a run that writes checkpoints needs of the disk, in one line; else nothing.

    Raises:
        ConfigError: what is needed and what is free, and a setting that fits.
    """
    told = check_disk(config)
    if config.scheduler.type == "local":  # other machines' memory is asked there (`nodes`)
        check_memory(config)
    recover = config.recover
    return told if any((recover.freq_steps, recover.freq_epochs, recover.freq_secs)) else ""


def shape_of(config: Config) -> costs.Shape | None:
    """The policy's sizes; None where they are not known yet, or of a kind that the ranks refuse."""
    try:
        return model_folder.read_shape(config.actor.path)
    except (OSError, UserError):
        return None


def check_memory(config: Config, free_bytes: int | None = None) -> None:
    """Refuses what cannot fit whatever the micro-batches: weights, optimizer and the longest pair.

    Args:
        config: devices resolved.
        free_bytes: of one rank; None asks this machine, where all ranks are.
    """
    shape = shape_of(config)
    if shape is None:
        return
    num_ranks, longest = parse_backend(config.actor.backend).world_size, longest_known_pair(config)
    if free_bytes is None:
        free_bytes = machine.free_bytes_of_rank(num_ranks, on_cuda=bool(config.cluster.n_gpus_per_node))
    if problem := costs.memory_problem(
        shape, config, num_ranks=num_ranks, tokens=longest, longest=longest, free_bytes=free_bytes
    ):
        raise ConfigError([problem])


def check_disk(config: Config, free_bytes: int | None = None) -> str:
    """Refuses what does not fit beside the checkpoints that the run has already; what is needed, in one line.

    Args:
        config: devices resolved.
        free_bytes: below `cluster.fileroot`, as another machine sees it; None asks this one.
    """
    shape = shape_of(config)
    if shape is None:
        return ""
    root, there, left = Path(config.cluster.fileroot), 0, list[Path]()
    if config.trial_name is not None:
        own = root / config.experiment_name / config.trial_name / "checkpoints"
        there, left = len(steps(own)), folders.leftovers(own)
    if free_bytes is None:
        free_bytes = machine.free_disk(root)
    told, problem = costs.disk_need(
        shape,
        config,
        checkpoints=max(0, costs.checkpoints_at_once(config) - there),
        models=1 + config.saver.best,  # more when `saver` has a frequency, which only the data tell how often
        free_bytes=free_bytes + sum(map(machine.size_of, left)),  # they go before the run does
    )
    if problem:
        raise ConfigError([problem])
    return f"disk: {told}"


def longest_known_pair(config: Config) -> int:
    """Tokens run for the longest training pair, where a pair store of the data is built already; else 1."""
    from dpo_kit.preferences import open_store

    found = []
    for file in (Path(config.cluster.fileroot) / ".cache" / "pairs").glob("*/meta.json"):
        with contextlib.suppress(UserError):  # a damaged store is built again
            if _is_of(read_json(file, {}), config):
                shared, chosen, rejected = open_store(file.parent, check_hashes=False).all_lengths().T
                run = chosen + rejected - (shared if config.actor.share_prompt else 0)
                found.append(int(run.max()))
    # Several stores differ in what they leave out; the least one refuses nothing that could run.
    return min(found, default=1)


def _is_of(meta: dict[str, Any], config: Config) -> bool:
    """Whether a pair store was built from the config's training data, as far as names tell."""
    data, source, report = config.train_dataset, meta.get("source") or {}, meta.get("report") or {}
    built = (source.get("path"), source.get("split"), report.get("tokenizer"), report.get("max_length"))
    return built == (data.path, data.split, config.tokenizer_path, data.max_length)
