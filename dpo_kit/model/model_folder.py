"""What lies in a model's folder, told without torch: its config, the headers of its weight files, what they hold.

The weight files are those that transformers takes: `model.safetensors`, else what `model.safetensors.index.json`
names; other safetensors beside them are none of the model's. A header gives each tensor's name, dtype, shape and
place in the file, in milliseconds whatever the size.

Deliberately not here: whether the weights are the model that config.json describes (`pair_model.check`), loading them
(`pair_model`), making built-in models (`builtin`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import UserError
from dpo_kit.model.costs import Shape
from dpo_kit.system import hub
from dpo_kit.system.files import remembered

if TYPE_CHECKING:
    import numpy as np


CHECKS_VERSION = 2
"""Raised when a check whose answer is remembered (`known_checks`) answers otherwise."""
SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny-random"
NAMES = frozenset({SMOLLM2, TINY})
# The last figure counts the conversion of `builtin`: raise it when what `_make_*` writes changes.
FOLDERS = {SMOLLM2: f"{SMOLLM2}-0.1.2-1", TINY: f"{TINY}-1"}
MANIFEST = "dpo_kit.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEEDS_PEFT = 'actor.use_lora = true needs peft, which is not installed; run: pip install "dpo-kit[lora]"'
# Small files that belong to a model: tokenizer, chat template, generation config, licence.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_THE_MODELS = ("*.index.json", "dpo_kit.json", "trainer_state.json", "*_results.json")
# The bits that are all set in an infinity and in what is not a number, by the name of a safetensors dtype.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
}
# A buffer of old files that holds the least number there is, and that no model reads any more.
_NO_WEIGHT = ".masked_bias"
_CHUNK = 1 << 20  # values
_READERS = ("transformers", "tokenizers", "safetensors")
_LFS = b"version https://git-lfs"

Progress = Callable[[int, int], None]
"""Called with bytes read, and bytes in all."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a file: its bytes stand from `start` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def cache_dir() -> Path:
    """Where built-in models are kept: `$DPO_KIT_CACHE`, else `dpo-kit` in the platform's user cache."""
    own = os.environ.get("DPO_KIT_CACHE")
    if own:
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dpo-kit"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpo-kit"


def cached(name: str) -> bool:
    """Whether a built-in name is complete in the cache, so that `builtin.ensure` would return at once."""
    if name not in NAMES:
        return False
    folder = cache_dir() / FOLDERS[name]
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / file).stat().st_size == size for file, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def at_hand(path: str) -> Path:
    """Where a model lies if it is here already: a built-in one in the cache, else the path as it is."""
    return cache_dir() / FOLDERS[path] if cached(path) else Path(path)


def snapshot(path: str, *, weights: bool = True) -> Path:
    """The local folder of a model: a folder as it is, a hub id through the hub's cache.

    Args:
        weights: fetch them, too, not only the small files.

    Raises:
        UserError: no such folder and the hub cannot be reached or does not know it.
    """
    return Path(path) if Path(path).is_dir() else _fetched(path, weights)


@functools.cache
def _fetched(path: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    unreachable = ""
    try:
        with hub.cache_only_when_unreachable() as unreachable:
            folder = Path(snapshot_download(path, allow_patterns=list(_SMALL), ignore_patterns=["*/*"]))
            # Only what is read: many hold a second copy of their weights under another name.
            index = folder / INDEX
            names = (_object(index).get("weight_map") if index.exists() else None) or {"": WEIGHTS}
            wanted = sorted(set(names.values()))
            return Path(snapshot_download(path, allow_patterns=wanted)) if weights else folder
    except Exception as e:
        cause = unreachable or (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{path!r} is neither a local folder nor a model the hub gives ({cause}); "
            "give a folder with config.json and *.safetensors, or the built-in smollm2-135m-instruct"
        ) from e


# --- config and headers ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        UserError: there is none, it is broken, or the folder holds no model that can be trained.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), not a whole model; merge it into its base with peft"
            " (merge_and_unload, then save_pretrained) and give that folder; a run with saver.merged=true writes one"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a model folder as save_pretrained writes it")
    made = _object(folder / "config.json")
    if quantized := made.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{folder}/config.json: quantized weights ({method}) cannot be trained; give the model they were made from"
        )
    return made


def _object(file: Path) -> dict[str, Any]:
    try:
        made = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from None
    if not isinstance(made, dict):
        raise UserError(f"{file} holds no JSON object; download it again")
    return made


def config_in_effect(folder: Path) -> dict[str, Any]:
    """config.json with `tie_word_embeddings` as the weights have it, where they are there to be asked.

    Raises:
        UserError: see `read_config`.
    """
    made = read_config(folder)
    tied = bool(made.get("tie_word_embeddings", False))
    if tied:
        with contextlib.suppress(UserError):
            tied = not has_own_head(tensors(folder))
    return {**made, "tie_word_embeddings": tied}


def read_shape(path: str) -> Shape:
    """The sizes of a model that is at hand.

    Raises:
        UserError: it has no config.json that can be read, or one of a kind whose size is not known.
    """
    made = config_in_effect(at_hand(path))
    try:
        return Shape.of(made)
    except (KeyError, ValueError) as error:
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else f"a size that is none ({error})"
        raise UserError(
            f"actor.path = {path!r}: its config.json has {what}, so its size is not known;"
            " llama, qwen2, qwen3 and mistral models can be estimated"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in name order.

    Raises:
        UserError: there are none, or some are missing; what is there instead is named.
    """
    named = _object(folder / "config.json").get("transformers_weights")
    first = folder / (named or WEIGHTS)
    if first.is_file() and not first.name.endswith(".index.json"):
        return [first]
    index = first if named else folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: needs {first.name} or {INDEX}, found {_instead(folder)}")
    shards = _object(index).get("weight_map")
    if not shards or not isinstance(shards, dict):
        raise UserError(f"{index} has no weight_map, so it names no file; download it again")
    files = sorted({folder / name for name in shards.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index} names {len(files)} files, and {len(missing)} of them are missing:"
            f" {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}; download them again"
        )
    return files


def _instead(folder: Path) -> str:
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        names = ", ".join(others[:3])
        return f"only {names}, which no index names; save the model again with save_pretrained"
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        return (
            f"only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded; convert them with"
            " save_pretrained"
        )
    return "none; give a model folder as save_pretrained writes it"


def tensors(folder: Path) -> dict[str, Weight]:
    """The tensors of a model's files by name, from the headers alone.

    Raises:
        UserError: a file is missing, cut, or no safetensors file; it is named.
    """
    return {name: weight for file in weight_files(folder) for name, weight in _header(file).items()}


def _header(file: Path) -> dict[str, Weight]:
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(len(_LFS))
        if head == _LFS:
            raise UserError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` there")
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        f.seek(8)
        try:
            if not 2 <= length <= size - 8:
                raise ValueError
            entries = json.loads(f.read(length))
            found = {
                name: Weight(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + at for at in entry["data_offsets"]),
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            what = "is empty" if size == 0 else "is no safetensors file, or its beginning is damaged"
            raise UserError(f"{file} {what}; download it again") from None
    end = max((weight.end for weight in found.values()), default=8 + length)
    if end != size:
        what = "is cut" if size < end else "holds more than its header tells of"
        raise UserError(f"{file} {what}: it has {size:,} bytes, by its header {end:,}; download it again")
    return found


# --- what the weights hold ------------------------------------------------------------------------------------


def has_own_head(held: dict[str, Weight]) -> bool:
    """Whether the files hold an output layer that is not the embedding, whatever config.json says.

    transformers ties the two only where one is missing or both are equal.
    """
    head = _named(held, "lm_head.weight")
    embedding = _named(held, "embed_tokens.weight")
    return head is not None and embedding is not None and not _equal(head, embedding)


def _named(held: dict[str, Weight], end: str) -> Weight | None:
    return next((weight for name, weight in held.items() if f".{name}".endswith(f".{end}")), None)


def _equal(a: Weight, b: Weight) -> bool:
    if a.shape != b.shape:
        return False
    pieces = zip(_chunks(a), _chunks(b), strict=True)
    return all((_values(x, a.dtype) == _values(y, b.dtype)).all() for x, y in pieces)


def _chunks(weight: Weight) -> Iterator[np.ndarray]:
    """The bytes of a tensor in pieces of so many values, through a memory map."""
    import numpy as np

    if weight.end == weight.start:
        return
    size = max(1, (weight.end - weight.start) // math.prod(weight.shape))
    mapped = np.memmap(weight.file, np.uint8, "r")
    for start in range(weight.start, weight.end, _CHUNK * size):
        yield mapped[start : min(start + _CHUNK * size, weight.end)]


def _values(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    return data.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(dtype, "u1"))


def known_hashes(fileroot: Path | str) -> Path:
    """The file that remembers the hashes of weight files, for all runs of a root."""
    return Path(fileroot) / ".cache" / "fingerprints.json"


def known_checks(fileroot: Path | str) -> Path:
    """The file that remembers what was found in folders of a `stamp`, for all runs of a root."""
    return Path(fileroot) / ".cache" / f"checks-{CHECKS_VERSION}.json"


def fingerprint(path: str, cache: Path | None = None, progress: Progress = lambda done, total: None) -> str:
    """sha256 over the config and weight files: two folders with equal content have one fingerprint.

    Every value is looked at in the same pass.

    Args:
        cache: a JSON file that remembers file hashes by path, size and time, so that large files are read once.
        progress: called now and then while files are read.

    Raises:
        UserError: weights that are not finite numbers; file and tensor are named.
    """
    folder = snapshot(path)
    total = hashlib.sha256()
    config = read_config(folder)
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(key, None)
    total.update(json.dumps(config, sort_keys=True).encode())
    files = weight_files(folder)
    sizes = [file.stat().st_size for file in files]
    for i, file in enumerate(files):
        # The last word: hashes that earlier versions kept tell nothing of the values.
        key = f"{file.resolve()}:{sizes[i]}:{file.stat().st_mtime_ns}:{file.stat().st_ctime_ns}:finite"
        before, whole = sum(sizes[:i]), sum(sizes)

        def told(done: int, before: int = before, whole: int = whole) -> None:
            progress(before + done, whole)

        total.update(remembered(cache, key, functools.partial(_hash, file, told)).encode())
    return total.hexdigest()


def _hash(file: Path, progress: Callable[[int], None]) -> str:
    """sha256 of a weight file, tensor by tensor as they lie; each is looked at on the way."""
    held = sorted(_header(file).items(), key=lambda item: item[1].start)
    digest = hashlib.sha256()
    at = min((weight.start for _, weight in held), default=file.stat().st_size)
    with file.open("rb") as f:
        digest.update(f.read(at))
    for name, weight in held:
        if weight.start != at:
            raise UserError(f"{file}: {name} does not begin where the tensor before ends; download it again")
        for chunk in _chunks(weight):
            digest.update(chunk.data)
            at += len(chunk)
            if not _finite(chunk, weight.dtype) and not name.endswith(_NO_WEIGHT):
                raise UserError(
                    f"{file}: {name} holds values that are not finite numbers (NaN or infinity), with which every"
                    " log-prob is NaN; download the model again, or go back to weights before they broke"
                )
            progress(at)
    return digest.hexdigest()


def _finite(data: np.ndarray, dtype: str) -> bool:
    if dtype not in _EXPONENTS or not len(data):
        return True
    kind, exponent = _EXPONENTS[dtype]
    bits = data.view(kind)
    return bool((bits & bits.dtype.type(exponent)).max() != exponent)


def stamp(path: str) -> str:
    """What tells that a local model or tokenizer folder is as it was, and is read by the same packages; "" of a hub id.

    Small files count by content, weights as for `fingerprint` by place, size and time.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return ""
    parts: list[Any] = [str(folder.resolve()), *map(importlib.metadata.version, _READERS)]
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.is_file():
            state = file.stat()
            parts.append([str(file.relative_to(folder)), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    parts += [hashlib.sha256(content).hexdigest() for content in side_files(folder).values()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def side_files(folder: Path) -> dict[str, bytes]:
    """The small files of a model by name, config.json among them; what training left beside them is no part of it."""
    paths = {path for pattern in _SMALL for path in folder.glob(pattern) if path.is_file()}
    paths -= {path for pattern in _NOT_THE_MODELS for path in folder.glob(pattern)}
    paths |= set((folder / "additional_chat_templates").glob("*.jinja"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}
