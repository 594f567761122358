"""What can be told of a run in a blink, before its folder is made: files that are missing or no data at all,
models that are nowhere, a reference with another tokenizer.

Deliberately not here: the configuration by itself (config), hubs, what needs a tokenizer or all of the data
(prepare, dataset).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dpo_kit import builtin
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError

# A larger file takes seconds to read; the supervisor's prepare step finds the same mistakes.
_QUICK_BYTES = 32 * 2**20
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def check(config: Config) -> None:
    """Refuses a run whose models or data are plainly not there.

    Raises:
        ConfigError: with every problem of the models.
        DataError: with the first problem of the data.
    """
    problems = []
    for field, path in _models(config).items():
        if path in builtin.NAMES or Path(path).is_dir():
            continue
        if Path(path).exists() or not re.fullmatch(_HUB_ID, path):
            problems.append(
                f"{field} = {path!r} is no folder and no hub id; give a folder with config.json and *.safetensors,"
                f" a hub id, or one of {', '.join(sorted(builtin.NAMES))}"
            )
    problems += [] if problems else _other_tokenizer(config)
    if problems:
        raise ConfigError(problems)
    _check_data(config)


def _models(config: Config) -> dict[str, str]:
    """The fields that name models; a path that several fields share stands under the first one only."""
    fields = {
        "actor.path": config.actor.path,
        "ref.path": config.ref.path,
        "tokenizer_path": config.tokenizer_path,
    }
    first = {path: field for field, path in reversed(fields.items())}
    return {field: path for field, path in fields.items() if first[path] == field}


def _check_data(config: Config) -> None:
    from dpo_kit.readers import format_of
    from dpo_kit.rows import open_source

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
    return [tokenizer_problem(config, own, other)]


def tokenizer_problem(config: Config, own: dict[str, int], other: dict[str, int]) -> str:
    """The message for two vocabularies (token -> id) that differ."""
    tokens = own.keys() | other.keys()
    differing = sum(own.get(token) != other.get(token) for token in tokens)
    return (
        f"ref.path = {config.ref.path!r} has another tokenizer than {config.tokenizer_path!r}: {differing} of"
        f" {len(tokens)} tokens differ; use a reference of the same family, by default ${{actor.path}}"
    )


def _vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json; None when that is not to be had at once."""
    if path in builtin.NAMES:
        if not builtin.cached(path):
            return None
        path = builtin.ensure(path)
    try:
        tokenizer: Any = json.loads((Path(path) / "tokenizer.json").read_text("utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: a list of [token, score]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
