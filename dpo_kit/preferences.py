"""Preference pairs as token arrays: the longest common prefix, and the pair store on disk.

A pair store is a folder that numpy alone reads: flat token arrays with offsets, one entry a pair, and
`meta.json`, which holds the size and sha256 of every array. It is written in one step (`folders.staged`), so that a
store is either complete or not there.

    <folder>/chosen_ids.npy      int32 (sum of chosen lengths,)     chosen_offsets.npy    int64 (P+1,)
             rejected_ids.npy    int32 (sum of rejected lengths,)   rejected_offsets.npy  int64 (P+1,)
             shared.npy  prompt.npy  context.npy  int32 (P,)        index.npy  prompt_key.npy  int64 (P,)
             meta.json

    chosen    P P P P P C C C e     shared = 5: the token-level LCP, run once
    rejected  P P P P P R R e       prompt <= shared: scoring starts here
                                    context: leading chosen tokens an answer is generated from

Deliberately not here: text, tokenizers, the config object (see `dataset.py`), torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.errors import DataError
from dpo_kit.system import folders
from dpo_kit.system.files import sha256

FORMAT = 1
ARRAYS: dict[str, str] = {
    "chosen_ids": "int32",
    "chosen_offsets": "int64",
    "rejected_ids": "int32",
    "rejected_offsets": "int64",
    "shared": "int32",
    "prompt": "int32",
    "context": "int32",
    "index": "int64",
    "prompt_key": "int64",
}


def longest_common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Number of leading tokens that `a` and `b` have in common.

    Equals `next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))`.

    Args:
        a: token ids, shape (A,), a list or an array.
        b: token ids, shape (B,).
    """
    num_common = min(len(a), len(b))
    if num_common == 0:
        return 0
    first, second = np.asarray(a[:num_common]), np.asarray(b[:num_common])
    if first.ndim != 1 or second.ndim != 1:
        raise ValueError(f"token ids must be one-dimensional, got shapes {first.shape} and {second.shape}")
    differs = first != second
    position = int(differs.argmax())
    return position if differs[position] else num_common


@dataclass(frozen=True)
class Pair:
    """One preference pair; both texts are whole, with the prompt and the end token."""

    chosen_ids: np.ndarray
    """int32 (C,)"""
    rejected_ids: np.ndarray
    """int32 (R,)"""
    shared: int
    """Token-level LCP of the two: what the engine runs once."""
    prompt: int
    """Where scoring starts; at most `shared`."""
    context: int
    """Leading chosen tokens from which an answer is generated."""
    index: int
    """Row in the source."""


@dataclass(frozen=True)
class PairStore:
    """P pairs as flat arrays (see the module docstring); `store.pair(i)` cuts one out."""

    path: Path
    meta: dict[str, Any]
    chosen_ids: np.ndarray
    chosen_offsets: np.ndarray
    rejected_ids: np.ndarray
    rejected_offsets: np.ndarray
    shared: np.ndarray
    prompt: np.ndarray
    context: np.ndarray
    index: np.ndarray
    prompt_key: np.ndarray
    """64-bit hash of the prompt's text: equal prompts have equal keys."""

    def __len__(self) -> int:
        return len(self.shared)

    def pair(self, i: int) -> Pair:
        """Pair `i` of the store, 0 <= i < len(store)."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of a store with {len(self)} pairs")
        chosen = slice(int(self.chosen_offsets[i]), int(self.chosen_offsets[i + 1]))
        rejected = slice(int(self.rejected_offsets[i]), int(self.rejected_offsets[i + 1]))
        return Pair(
            chosen_ids=np.asarray(self.chosen_ids[chosen]),
            rejected_ids=np.asarray(self.rejected_ids[rejected]),
            shared=int(self.shared[i]),
            prompt=int(self.prompt[i]),
            context=int(self.context[i]),
            index=int(self.index[i]),
        )

    def all_lengths(self) -> np.ndarray:
        """`lengths_of` every pair. Shape: (P, 3) int64"""
        return self.lengths_of(np.arange(len(self)))

    def lengths_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of some pairs, in the order given: shared prefix, whole chosen text, whole rejected text.

        Shape: (len(rows), 3) int64
        """
        at = np.asarray(rows, np.int64)
        texts = (offsets[at + 1] - offsets[at] for offsets in (self.chosen_offsets, self.rejected_offsets))
        return np.stack([np.asarray(column, np.int64) for column in (self.shared[at], *texts)], axis=1)

    @property
    def fingerprint(self) -> str:
        """sha256 of the arrays' content."""
        return self.meta["fingerprint"]

    @property
    def tokenizer_path(self) -> str:
        """The folder or name the tokenizer was loaded from."""
        return self.meta["tokenizer"]["path"]

    @property
    def report(self) -> dict[str, Any]:
        """The build report (`dataset.format_report` prints it)."""
        return self.meta["report"]


def arrays_of(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Pairs as `write_store` takes them, in the order given."""
    texts = {"chosen": [p.chosen_ids for p in pairs], "rejected": [p.rejected_ids for p in pairs]}
    arrays = {f"{side}_ids": np.concatenate(ids) for side, ids in texts.items()}
    arrays |= {f"{side}_offsets": np.cumsum([0, *map(len, ids)]) for side, ids in texts.items()}
    return arrays | {
        name: np.array([getattr(p, name) for p in pairs]) for name in ("shared", "prompt", "context", "index")
    }


def open_store(path: str | os.PathLike[str], *, check_hashes: bool = True) -> PairStore:
    """Open the store at `path` after checking that it is whole.

    Args:
        path: the store's folder.
        check_hashes: compare the sha256 of every array too (about 1 s per GB); without it only sizes,
            types and offsets are compared.

    Raises:
        DataError: the folder is no pair store, or one that was cut short or changed.
    """
    folder = Path(path)
    meta = _read_meta(folder)
    arrays = {name: _open_array(folder, name, meta["arrays"][name], check_hashes) for name in ARRAYS}
    problem = _structure_problem(arrays)
    if problem:
        raise _damaged(folder, problem)
    if meta["fingerprint"] != _fingerprint(meta["arrays"]):
        raise _damaged(folder, "meta.json: the fingerprint is not that of the arrays")
    return PairStore(path=folder, meta=meta, **arrays)


class TokenFile:
    """int32 tokens that grow in a file without a name, for stores that are larger than memory.

    Args:
        folder: on the disk that the store will be on; the system's folder for temporary files when left out.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives and vanishes with this object
        self.size = 0

    def __del__(self) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return 4 * self.size

    def append(self, ids: np.ndarray) -> None:
        """Adds tokens at the end."""
        self.file.write(ids.astype(np.int32, copy=False).tobytes())
        self.size += len(ids)

    def save(self, file: Any) -> None:
        """Writes the tokens as `np.save` would, without holding them."""
        header = {"descr": "<i4", "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(file, header)
        self.file.seek(0)
        shutil.copyfileobj(self.file, file, 1 << 20)


def write_store(
    folder: str | os.PathLike[str], arrays: Mapping[str, np.ndarray | TokenFile], meta: Mapping[str, Any]
) -> PairStore:
    """Write a store in one step and return it opened; a whole store that is already there wins.

    Args:
        folder: the store's folder; its parents are made. A damaged store there is replaced.
        arrays: one-dimensional; every name of `ARRAYS` but `prompt_key`, which defaults to zeros; cast to the
            store's types.
        meta: JSON values; `tokenizer` ({"path", ...}) and `report` are expected by readers. `format`,
            `fingerprint` and `arrays` are added.

    Raises:
        DataError: the folder cannot be written; nothing is left.
    """
    folder = Path(folder)
    num_pairs = len(arrays["shared"])
    filled = {"prompt_key": np.zeros(num_pairs, np.int64), **arrays}
    cast = {
        name: given if isinstance(given := filled[name], TokenFile) else np.ascontiguousarray(given, dtype)
        for name, dtype in ARRAYS.items()
    }
    problem = _structure_problem(cast)
    assert problem is None, problem
    try:
        with folders.staged(folder, "keep", _is_whole) as part:
            described = {name: _write_array(part, name, array) for name, array in cast.items()}
            whole = {
                **meta,
                "format": FORMAT,
                "num_pairs": num_pairs,
                "fingerprint": _fingerprint(described),
                "arrays": described,
            }
            (part / "meta.json").write_text(json.dumps(whole, indent=1))
    except OSError as error:
        size_mib = sum(array.nbytes for array in cast.values()) / 2**20
        raise DataError(
            f"pair store {folder} cannot be written ({error.strerror or error}); it needs {size_mib:.1f} MiB there: "
            "free some disk, or set cluster.fileroot to a folder that can be written"
        ) from error
    return open_store(folder)


def _is_whole(folder: Path) -> bool:
    try:
        open_store(folder)
    except DataError:
        return False
    return True


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a pair store: no such folder")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder} is not a pair store: it has no meta.json") from None
    except ValueError:
        raise _damaged(folder, "meta.json is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise _damaged(folder, f"meta.json does not say format {FORMAT}")
    missing = set(ARRAYS) - set(meta.get("arrays") or {})
    if missing or "fingerprint" not in meta:
        raise _damaged(folder, f"meta.json lacks {', '.join(sorted(missing)) or 'fingerprint'}")
    return meta


def _open_array(folder: Path, name: str, described: Mapping[str, Any], check_hash: bool) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _damaged(folder, f"{path.name} is missing") from None
    if size != described["bytes"]:
        raise _damaged(folder, f"{path.name} has {size} bytes, meta.json says {described['bytes']}")
    if check_hash and sha256(path) != described["sha256"]:
        raise _damaged(folder, f"{path.name} is not what was written (sha256)")
    try:
        array = np.load(path, mmap_mode="r" if described["shape"] != [0] else None, allow_pickle=False)
    except ValueError:
        raise _damaged(folder, f"{path.name} is not a numpy array") from None
    if array.dtype != ARRAYS[name] or list(array.shape) != described["shape"]:
        raise _damaged(folder, f"{path.name} is {array.dtype} {array.shape}")
    return array


def _damaged(folder: Path, problem: str) -> DataError:
    return DataError(f"pair store {folder} is damaged: {problem}; delete the folder and build it again")


def _structure_problem(arrays: Mapping[str, Any]) -> str | None:
    """What keeps the arrays from being P pairs, or None."""
    num_pairs = len(arrays["shared"])
    for name in ("prompt", "context", "index", "prompt_key"):
        if arrays[name].shape != (num_pairs,):
            return f"{name} has {len(arrays[name])} entries for {num_pairs} pairs"
    lengths = {}
    for side in ("chosen", "rejected"):
        offsets = arrays[f"{side}_offsets"]
        if offsets.shape != (num_pairs + 1,) or offsets[0] != 0 or offsets[-1] != len(arrays[f"{side}_ids"]):
            return f"{side}_offsets does not cover {side}_ids"
        lengths[side] = np.diff(offsets)
        if num_pairs and lengths[side].min() < 1:
            return f"{side}_offsets holds an empty text"
    shared, prompt, context = arrays["shared"], arrays["prompt"], arrays["context"]
    if (shared < 0).any() or (shared > np.minimum(lengths["chosen"], lengths["rejected"])).any():
        return "shared is longer than a text"
    if (prompt < 0).any() or (prompt > shared).any():
        return "prompt is longer than shared"
    if (context < 0).any() or (context > lengths["chosen"]).any():
        return "context is longer than the chosen text"
    return None


def _write_array(folder: Path, name: str, array: np.ndarray | TokenFile) -> dict[str, Any]:
    path = folder / f"{name}.npy"
    with path.open("wb") as file:
        if isinstance(array, TokenFile):
            array.save(file)
        else:
            np.save(file, array, allow_pickle=False)
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "shape": [len(array)]}


def _fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(f"{name} {described[name]['sha256']}\n".encode())
    return digest.hexdigest()
