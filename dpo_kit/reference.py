"""The frozen reference's log-probs, kept on disk and shared by runs.

    <fileroot>/.cache/reference/<weights and kernel key>/
        values.npz   keys (N, 16) uint8: content key of each pair, sorted
                     logps (N, 2) float64: summed log-probs of chosen and rejected, nats

A pair's key is a hash of its two token arrays and of where scoring starts, so a changed row, tokenizer or
boundary misses for exactly the pairs it changed; beta, loss_type and lr are no part of it. The folder's key is
the weights' fingerprint, the dtype and the kernel. Not here: computing the values and checking them (`loading`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_kit.preferences import PairStore

# Part of the folder's key: raised when the same weights may give other numbers.
KERNEL = "flash-2"
VALUE_SHAPE = 2


def pair_keys(store: PairStore, rows: np.ndarray | None = None) -> np.ndarray:
    """Content key of the pairs of `rows` (all when left out). Shape: (P, 16), uint8"""
    rows = np.arange(len(store)) if rows is None else rows
    keys = np.empty((len(rows), 16), dtype=np.uint8)
    for i, row in enumerate(rows):
        pair = store.pair(int(row))
        digest = hashlib.blake2b(digest_size=16)
        digest.update(
            np.array([len(pair.chosen_ids), len(pair.rejected_ids), pair.prompt], np.int64).tobytes()
        )
        digest.update(np.asarray(pair.chosen_ids, dtype=np.int32).tobytes())
        digest.update(np.asarray(pair.rejected_ids, dtype=np.int32).tobytes())
        keys[i] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return keys


def cache_folder(fileroot: Path, weights: str, dtype: str, kernel: str) -> Path:
    """Where the values of one reference live.

    Args:
        fileroot: the runs' root.
        weights: fingerprint of the model.
        dtype: what it computes in.
        kernel: how rows are run: `shared`, `unshared` or `plain`.
    """
    key = f"{weights}:{dtype}:{KERNEL}:{kernel}"
    return fileroot / ".cache" / "reference" / hashlib.sha256(key.encode()).hexdigest()[:16]


def lookup(folder: Path, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of the pairs that the cache holds.

    Args:
        keys: from `pair_keys`. Shape: (P, 16)

    Returns:
        Log-probs (P, 2) float64, NaN where missing, and the mask (P,) of those found.
    """
    values = np.full((len(keys), VALUE_SHAPE), np.nan)
    found = np.zeros(len(keys), dtype=bool)
    held = _read(folder)
    if held is None or not len(held[0]):
        return values, found
    have, logps = _sortable(held[0]), held[1]
    want = _sortable(keys)
    at = np.minimum(np.searchsorted(have, want), len(have) - 1)
    found = have[at] == want
    values[found] = logps[at[found]]
    return values, found & np.isfinite(values).all(1)


def add(folder: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Merges values into the cache, one process at a time; the file is written beside and renamed in, never half.

    Of a pair that is held already the new values stay. What is no number is not kept.
    """
    finite = np.isfinite(values).all(1)
    keys, values = keys[finite], values[finite]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for part in folder.glob("*.part"):  # of a process that ended in mid-write: nobody else writes now
            part.unlink()
        held = _read(folder)
        if held is not None:
            keys, values = np.concatenate([keys, held[0]]), np.concatenate([values, held[1]])
        order = np.unique(_sortable(keys), return_index=True)[1]
        part = folder / "values.part"
        with open(part, "wb") as file:
            np.savez(file, keys=keys[order], logps=values[order])
        os.replace(part, folder / "values.npz")


def discard(folder: Path) -> None:
    """Forgets the values of a cache that turned out to be stale."""
    with _alone(folder):
        (folder / "values.npz").unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets the next one in when this one dies."""
    with open(folder / "lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with open(folder / "values.npz", "rb") as file, np.load(file, allow_pickle=False) as held:
            keys, logps = held["keys"], held["logps"]
    except (
        Exception
    ):  # a flipped byte makes zipfile and numpy raise nearly anything; what is unreadable is no cache
        return None
    ok = keys.ndim == 2 and keys.shape[1] == 16 and logps.shape == (len(keys), VALUE_SHAPE)
    return (keys, logps) if ok else None


def _sortable(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view([("high", ">u8"), ("low", ">u8")])[:, 0]
