"""What the frozen reference says of each pair: its log-probs, computed once and kept for every later run.

    <fileroot>/.cache/reference/<weights and kernel key>/

Values come from the cache where it holds them, and a few random ones are computed again: a cache that no longer
holds what this model computes (another torch, a file made by hand) is thrown away. What is missing is computed
slice by slice and kept after each, so that a run that ends in mid-pass has lost one slice.

Not here: the pass itself (`step`), loading models (`state`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from dpo_kit.engine import schedule, step
from dpo_kit.engine.state import FIRST_STEP_NATS, FIRST_STEP_NATS_PER_TOKEN_BF16, Engine, longest_tokens
from dpo_kit.model import builtin, model_folder, pair_model
from dpo_kit.preferences import PairStore
from dpo_kit.records.findings import Finding

RECHECKED = 4  # pairs of the cache that every start computes again
SLICES = 20  # of a store; their borders do not depend on what is missing, so neither do the values
MIN_SLICE = 256  # pairs


def prepare(engine: Engine, train_rows: np.ndarray | None = None) -> dict[str, str]:
    """Gives the engine its reference: values from the cache, computed where missing, or the resident model.

    Args:
        engine: gets `ref_train` and `ref_valid`, or `ref_model`.
        train_rows: of the training store; those that the run trains on when left out.

    Returns:
        The fingerprint of the weights of `actor` and `ref`.
    """
    config, world, fileroot = engine.config, engine.world, Path(engine.config.cluster.fileroot)
    weights = {}
    if world.is_main:
        known = model_folder.known_hashes(fileroot)
        paths = {"actor": config.actor.path, "ref": config.ref.path}
        weights = {
            name: model_folder.fingerprint(builtin.ensure(path), known) for name, path in paths.items()
        }
    weights = world.of_main(weights)
    same = weights["actor"] == weights["ref"]
    engine.policy_is_reference = same and config.actor.dtype == config.ref.dtype
    if config.ref.logps == "online":
        is_inside = engine.policy_is_reference and engine.policy.adapted
        engine.ref_model = engine.policy if is_inside else engine.load("ref")
        return weights
    unpacked = pair_model.why_unpacked(config.ref.path, longest_tokens([engine.train, engine.valid]))
    kernel = "plain" if unpacked else "shared" if config.actor.share_prompt else "unshared"
    folder = cache_folder(fileroot, weights["ref"], config.ref.dtype, kernel)
    if train_rows is None:
        train_rows = schedule.rows_of_run(config, len(engine.train))
    needs = [_Need(engine, folder, engine.train, train_rows)]
    if engine.valid is not None:
        needs.append(_Need(engine, folder, engine.valid, np.arange(len(engine.valid))))
    num_pairs, num_missing = sum(len(need.rows) for need in needs), sum(need.num_missing for need in needs)
    if world.is_main:
        print(f"reference: {num_pairs - num_missing} of {num_pairs} pairs from the cache", flush=True)
    source = engine.policy if engine.policy_is_reference else engine.load("ref")
    source.eval()
    with source.as_reference():
        if any(not need.recheck(source) for need in needs):
            num_missing = num_pairs
            for need in needs:
                need.found[:] = False
            if world.is_main:
                discard(folder)
        done = 0
        for need in needs:
            done = need.fill(source, done, num_missing)
    engine.ref_train = needs[0].table()
    engine.ref_valid = needs[1].table() if engine.valid is not None else None
    return weights


class _Need:
    """The rows of a store whose reference values a run needs, and those that it has.

    Rank 0 looks into the cache for all ranks: were each to look for itself, a run that writes meanwhile could give
    them different gaps to fill.
    """

    def __init__(self, engine: Engine, folder: Path, store: PairStore, rows: np.ndarray):
        self.engine, self.folder, self.store, self.rows = engine, folder, store, rows
        # Of rank 0, who alone reads and writes.
        self.keys = pair_keys(store, rows) if engine.world.is_main else None
        held = lookup(folder, self.keys) if self.keys is not None else None
        self.values, self.found = engine.world.of_main(held)

    @property
    def num_missing(self) -> int:
        return int((~self.found).sum())

    def recheck(self, source: pair_model.PairModel) -> bool:
        """Computes a few random pairs of the cache again; False when one differs by more than rounding."""
        held = np.flatnonzero(self.found)
        if not len(held):
            return True
        world = self.engine.world
        chosen = np.random.default_rng().choice(held, min(RECHECKED, len(held)), replace=False)
        at = np.sort(world.of_main(chosen))
        again = step.reference_pass(self.engine, source, self.store, self.rows[at])
        off = np.abs(again - self.values[at])
        if self.engine.config.ref.dtype == "bfloat16":
            off = off / np.maximum(self.store.lengths_of(self.rows[at])[:, 1:], 1)
            allowed, unit = FIRST_STEP_NATS_PER_TOKEN_BF16, "nats a token"
        else:
            allowed, unit = FIRST_STEP_NATS, "nats"
        same = bool((off <= allowed).all())  # also False for what is not a number
        if world.is_main:
            worst = int(np.argmax(np.nan_to_num(off, nan=np.inf).max(1)))
            row = int(self.store.index[self.rows[at[worst]]])
            print(
                f"reference: {len(at)} random pairs of the cache computed again, largest difference "
                f"{off[worst].max():.2g} {unit} (row {row}; allowed {allowed:g})"
                + ("" if same else ": the cache is stale, all pairs are computed anew"),
                flush=True,
            )
        return same

    def fill(self, source: pair_model.PairModel, done: int, total: int) -> int:
        """Computes what is missing, keeping each slice in the cache; the pairs done until then."""
        size = max(MIN_SLICE, -(-len(self.rows) // SLICES))
        for start in range(0, len(self.rows), size):
            at = start + np.flatnonzero(~self.found[start : start + size])
            if not len(at):
                continue
            self.values[at] = step.reference_pass(
                self.engine, source, self.store, self.rows[at], done=done, total=total
            )
            done += len(at)
            if self.keys is not None:
                add(self.folder, self.keys[at], self.values[at])
        return done

    def table(self) -> torch.Tensor:
        """The values as a table of all rows of the store; NaN where no step needs them."""
        table = np.full((len(self.store), self.values.shape[1]), np.nan)
        table[self.rows] = self.values
        return torch.from_numpy(table).to(self.engine.world.device)


# With many pairs a small lean is certain and means nothing: swapped columns lean far.
SWAPPED_P, SWAPPED_SHARE = 0.01, 0.4


def swapped_columns(store: PairStore, values: Tensor | None) -> Iterator[Finding]:
    """Swapped columns show where the untrained reference itself prefers what is called rejected, token by token.

    Args:
        values: the reference's log-probs of the store's rows in nats, NaN where there are none; None: not known.
            Shape: (P, 2)
    """
    if values is None:
        return
    logps = values.cpu().numpy()
    rows = np.flatnonzero(np.isfinite(logps).all(1))
    # Nats a token: the sum would follow the lengths.
    tokens = store.lengths_of(rows)[:, 1:] - np.maximum(np.asarray(store.prompt)[rows], 1)[:, None]
    a_token = np.unique(logps[rows] / np.maximum(tokens, 1), axis=0)  # a pair that repeats is one toss
    wins, num_pairs = int((a_token[:, 0] > a_token[:, 1]).sum()), len(a_token)
    chance = at_most(wins, num_pairs)
    if chance < SWAPPED_P and wins <= SWAPPED_SHARE * num_pairs:
        yield Finding(
            "look",
            "preference",
            f"the reference finds the rejected answer likelier, token by token, in {num_pairs - wins} of {num_pairs}"
            f" pairs (by chance in {100 * chance:.2g} % of cases): are the columns chosen and rejected swapped?",
        )


def at_most(wins: int, tosses: int) -> float:
    """Probability of at most this many heads of a fair coin; over 1,000 tosses by the normal curve."""
    if tosses > 1000:
        return 0.5 * math.erfc((tosses / 2 - wins - 0.5) / math.sqrt(tosses / 2))
    return sum(math.comb(tosses, k) for k in range(wins + 1)) / 2**tosses


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
        sizes = np.array([len(pair.chosen_ids), len(pair.rejected_ids), pair.prompt], np.int64)
        for part in (sizes, pair.chosen_ids, pair.rejected_ids):  # the ids are int32 in every store
            digest.update(part.tobytes())
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
    with FileLock(folder / "lock"):
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
    with FileLock(folder / "lock"):
        (folder / "values.npz").unlink(missing_ok=True)


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with open(folder / "values.npz", "rb") as file, np.load(file, allow_pickle=False) as held:
            keys, logps = held["keys"], held["logps"]
    except Exception:  # of any kind, after a flipped byte: what is unreadable is no cache
        return None
    ok = keys.ndim == 2 and keys.shape[1] == 16 and logps.shape == (len(keys), VALUE_SHAPE)
    return (keys, logps) if ok else None


def _sortable(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view([("high", ">u8"), ("low", ">u8")])[:, 0]
