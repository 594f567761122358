"""What can be told of a run in a blink, before its folder is made: files that are missing or no data at all,
models that are nowhere, a reference with another tokenizer, weights that this machine's memory does not hold.

Deliberately not here: the configuration by itself (config), hubs, what needs a tokenizer or all of the data
(dataset).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from dpo_kit.config import Config, parse_backend, paths
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.model import builtin, costs, model_folder
from dpo_kit.model.costs import Shape
from dpo_kit.records.checkpoints import steps
from dpo_kit.system import folders, machine
from dpo_kit.system.files import read_json

# A larger file takes seconds to read; the supervisor's prepare step finds the same mistakes.
_QUICK_BYTES = 32 * 2**20
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def check(config: Config, *, trains: bool = True) -> str:
    """Refuses a run whose models or data are plainly not there, or that cannot fit in memory or on the disk.

    Args:
        config: devices resolved where it trains.
        trains: False where the models are only run forward.

    Returns:
        What a run that writes checkpoints needs of the disk (see `check_disk`).

    Raises:
        ConfigError: with every problem of the models, or what memory they need.
        DataError: with the first problem of the data.
    """
    check_models(config)
    told = ""
    if trains:
        told = check_disk(config)
        check_memory(config)
    check_data(config)
    recover = config.recover
    return told if any((recover.freq_steps, recover.freq_epochs, recover.freq_secs)) else ""


def check_models(config: Config) -> None:
    """Refuses models that are nowhere or not whole, and a reference that reads other tokens than the policy.

    Of weights only the headers are read.
    """
    problems = []
    for field, path in paths.named_models(config).items():
        if path in builtin.NAMES:
            continue
        if Path(path).is_dir():
            if field != "tokenizer_path":
                problems += _not_whole(field, Path(path))
        elif Path(path).exists() or not re.fullmatch(_HUB_ID, path):
            problems.append(
                f"{field} = {path!r} is no folder and no hub id; give a folder with config.json and *.safetensors,"
                f" a hub id, or one of {', '.join(sorted(builtin.NAMES))}"
            )
    problems += [] if problems else _other_tokenizer(config)
    if problems:
        raise ConfigError(problems)


def _not_whole(field: str, folder: Path) -> list[str]:
    try:
        model_folder.read_config(folder)
        model_folder.tensors(folder)
    except UserError as error:
        return [f"{field}: {error}"]
    return []


def _shape(config: Config) -> Shape | None:
    """The policy's sizes; None where they are not known yet, or of a kind that the ranks refuse."""
    try:
        return Shape.of(model_folder.config_in_effect(builtin.at_hand(config.actor.path)))
    except (OSError, ValueError, KeyError):
        return None


def shape_is_known(config: Config) -> bool:
    """Whether memory and disk can be told before the model is loaded."""
    return _shape(config) is not None


def check_memory(config: Config) -> None:
    """Refuses what cannot fit whatever the micro-batches: weights, optimizer and the longest pair."""
    shape = _shape(config)
    if shape is None:
        return
    num_ranks = parse_backend(config.actor.backend).world_size
    longest = longest_known_pair(config)
    free = machine.free_bytes_of_rank(num_ranks, on_cuda=bool(config.cluster.n_gpus_per_node))
    needed = sum(costs.step_bytes(shape, config, num_ranks=num_ranks, tokens=longest).values())
    if needed > free:
        on_device = bool(config.cluster.n_gpus_per_node)
        where, times = (
            ("a device", 1) if on_device else (f"{num_ranks} CPU rank{'s' * (num_ranks > 1)}", num_ranks)
        )
        raise ConfigError(
            [
                f"actor.path = {config.actor.path!r}: weights, optimizer and the longest pair need"
                f" {times * needed / 2**30:.2f} GiB on {where}, and {times * free / 2**30:.2f} GiB are free; "
                + costs.remedy(shape, config, num_ranks=num_ranks, free_bytes=free, longest=longest)
            ]
        )


def check_disk(config: Config) -> str:
    """Refuses a run whose checkpoints, exports and final model do not fit on the disk, beside those it has already.

    Returns:
        What they need and what is free, in one line; empty while the model's sizes are not known.
    """
    shape = _shape(config)
    if shape is None:
        return ""
    root, there, left = Path(config.cluster.fileroot), 0, list[Path]()
    if config.trial_name is not None:
        own = root / config.experiment_name / config.trial_name / "checkpoints"
        there, left = len(steps(own)), folders.leftovers(own)
    number = max(0, costs.checkpoints_at_once(config) - there)
    checkpoints = number * costs.checkpoint_bytes(shape, config)
    exports = 1 + config.saver.best  # more when `saver` has a frequency, which only the data tell how often
    models = exports * shape.params * costs.DTYPE_BYTES[config.actor.dtype]
    free = machine.free_disk(root) + sum(map(machine.size_of, left))  # they go before the run does
    told = (
        f"{number} checkpoint{'s' * (number != 1)} and {exports} model{'s' * (exports > 1)} need"
        f" {machine.size_text(checkpoints + models)}, and {machine.size_text(free)} are free"
    )
    if checkpoints + models > free:
        where = shlex.quote(str(root))
        raise ConfigError(
            [
                f"cluster.fileroot = {str(root)!r}: {told}; use recover.keep=1, free space (dpo-kit runs prune"
                f" --fileroot {where}, dpo-kit cache rm --fileroot {where}), or another cluster.fileroot"
            ]
        )
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


def check_data(config: Config) -> None:
    """Refuses data files that are missing or are no preference data, where that is seen in a blink."""
    from dpo_kit.dataset.readers import format_of
    from dpo_kit.dataset.rows import open_source

    for section in ("train_dataset", "valid_dataset"):
        data = getattr(config, section)
        if data is None or not data.path:
            continue
        path = Path(data.path).expanduser()
        is_hub_id = not path.exists() and not format_of(path) and re.fullmatch(_HUB_ID, data.path)
        is_large = path.is_dir() or (path.is_file() and path.stat().st_size > _QUICK_BYTES)
        if not (is_large or is_hub_id):
            open_source(data.path, name=data.name, split=data.split, section=section)


def _other_tokenizer(config: Config) -> list[str]:
    """The reference scores the policy's tokens: both must read the same ids."""
    own, other = _vocabulary(config.tokenizer_path), _vocabulary(config.ref.path)
    if config.ref.path == config.tokenizer_path or own is None or other is None or own == other:
        return []
    from dpo_kit.dataset.tokens import vocabulary_problem

    return [vocabulary_problem(config, own, other)]


def _vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json; None when that is not to be had at once."""
    try:
        tokenizer: Any = json.loads((builtin.at_hand(path) / "tokenizer.json").read_text("utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: a list of [token, score]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
