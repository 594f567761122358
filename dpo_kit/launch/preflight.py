"""What can be told of a run in a blink, before its folder is made: files that are missing or no data at all,
models that are nowhere or cannot be split as asked, a reference with another tokenizer.

Deliberately not here: the configuration by itself (config), memory and disk (supervise/fits), hubs, what needs a
tokenizer or all of the data (dataset).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from dpo_kit.config import Config, parse_backend, paths
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.model import model_folder, split_sizes
from dpo_kit.supervise import fits

# A larger file takes seconds to read; the supervisor's prepare step finds the same mistakes.
_QUICK_BYTES = 32 * 2**20
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def check(config: Config, *, trains: bool = True) -> str:
    """Refuses a run whose models or data are plainly not there, or that cannot fit in memory or on the disk.

    Args:
        config: devices resolved where it trains.
        trains: False where the models are only run forward.

    Returns:
        What a run that writes checkpoints needs of the disk (see `fits.check`).

    Raises:
        ConfigError: with every problem of the models, or what memory they need.
        DataError: with the first problem of the data.
    """
    check_models(config)
    told = fits.check(config) if trains else ""
    check_data(config)
    return told


def check_models(config: Config) -> None:
    """Refuses models that are nowhere or not whole, and a reference that reads other tokens than the policy.

    Of weights only the headers are read.
    """
    no_peft = config.actor.use_lora and importlib.util.find_spec("peft") is None
    problems = [model_folder.NEEDS_PEFT] if no_peft else []
    for field, path in paths.named_models(config).items():
        if path in model_folder.NAMES:
            continue
        if Path(path).is_dir():
            if field != "tokenizer_path":
                problems += _not_whole(field, Path(path))
        elif Path(path).exists() or not re.fullmatch(_HUB_ID, path):
            problems.append(
                f"{field} = {path!r} is no folder and no hub id; give a folder with config.json and *.safetensors,"
                f" a hub id, or one of {', '.join(sorted(model_folder.NAMES))}"
            )
    if not problems and config.ref.path != config.tokenizer_path:
        from dpo_kit.dataset.tokens import vocabulary_problems

        problems = vocabulary_problems(config, _vocabulary)
    if problems := problems or not_split(config):
        raise ConfigError(problems)


def not_split(config: Config) -> list[str]:
    """Models at hand that the backend's tensor-parallel ranks cannot share, a line each."""
    tp_size, problems = parse_backend(config.actor.backend).t, []
    for field in ("actor", "ref"):
        path = getattr(config, field).path
        with contextlib.suppress(UserError, KeyError, ValueError):  # not at hand; of no known kind
            if problem := split_sizes.problem(model_folder.read_config(model_folder.at_hand(path)), tp_size):
                backend = f"actor.backend = {config.actor.backend!r} has t = {tp_size}"
                problems.append(f"{backend}, and of {field}.path = {path!r} {problem}")
    return list(dict.fromkeys(problems))


def _not_whole(field: str, folder: Path) -> list[str]:
    try:
        model_folder.read_config(folder)
        model_folder.tensors(folder)
    except UserError as error:
        return [f"{field}: {error}"]
    return []


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


def _vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json; None when that is not to be had at once."""
    try:
        tokenizer: Any = json.loads((model_folder.at_hand(path) / "tokenizer.json").read_text("utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: a list of [token, score]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
