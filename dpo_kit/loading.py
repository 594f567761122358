"""The models of a run and what the reference says: the policy, the frozen reference, its log-probs.

Values come from the cache where it holds them, and a few random ones are computed again: a cache that no longer
holds what this model computes (another torch, a file made by hand) is thrown away. What is missing is computed
slice by slice and kept after each, so that a run that ends in mid-pass has lost one slice.

Not here: the cache's files (reference), the pass itself (engine).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dpo_kit import builtin, engine, folders, model, reference, schedule
from dpo_kit.config import Config
from dpo_kit.engine import FIRST_STEP_NATS, FIRST_STEP_NATS_PER_TOKEN_BF16, Engine
from dpo_kit.parallel import DTYPES, World
from dpo_kit.preferences import PairStore

RECHECKED = 4  # pairs of the cache that every start computes again
SLICES = 20  # of a store; their borders do not depend on what is missing, so neither do the values
MIN_SLICE = 256  # pairs


def load_policy(config: Config, world: World, train: PairStore, valid: PairStore | None) -> model.PairModel:
    """The policy of a run, ready to be trained."""
    actor = config.actor
    policy = load_model(config, actor.path, actor.dtype, world, [train, valid], trainable=True)
    if actor.disable_dropout:
        model.disable_dropout(policy)
    return policy


def load_model(
    config: Config, path: str, dtype: str, world: World, stores: list[PairStore | None], *, trainable: bool
) -> model.PairModel:
    """The policy or the reference of a run, ready to score its pairs."""
    loaded = model.load(
        builtin.ensure(path),
        world,
        dtype=DTYPES[dtype],
        trainable=trainable,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        longest_tokens=_longest(stores),
        compiled=config.actor.compile,
    )
    if not loaded.packed and world.is_main:
        why = model.why_unpacked(builtin.ensure(path), _longest(stores))
        print(
            f"{'actor' if trainable else 'ref'}.path: rows are not packed, for {why}; each text runs whole, with the "
            "model's own attention: the same numbers, slower",
            flush=True,
        )
    return loaded


def prepare_reference(state: Engine, fileroot: Path, train_rows: np.ndarray | None = None) -> dict[str, str]:
    """Gives the engine its reference: values from the cache, computed where missing, or the resident model.

    Args:
        state: gets `ref_train` and `ref_valid`, or `ref_model`.
        fileroot: where the cache is.
        train_rows: of the training store; those that the run trains on when left out.

    Returns:
        The fingerprint of the weights of `actor` and `ref`.
    """
    config, world = state.config, state.world
    marks = [""] * 2
    if world.is_main:
        known = folders.known_hashes(fileroot)
        marks = [folders.fingerprint(builtin.ensure(p), known) for p in (config.actor.path, config.ref.path)]
    if world.size > 1:
        dist.broadcast_object_list(marks, 0)
    weights = dict(zip(("actor", "ref"), marks, strict=True))
    state.policy_is_reference = marks[0] == marks[1] and config.actor.dtype == config.ref.dtype
    if config.ref.logps == "online":
        state.ref_model = _load_reference(state)
        return weights
    unpacked = model.why_unpacked(builtin.ensure(config.ref.path), _longest([state.train, state.valid]))
    kernel = "plain" if unpacked else "shared" if config.actor.share_prompt else "unshared"
    folder = reference.cache_folder(fileroot, marks[1], config.ref.dtype, kernel)
    if train_rows is None:
        train_rows = schedule.rows_of_run(config, len(state.train))
    needs = [_Need(state, folder, state.train, train_rows)]
    if state.valid is not None:
        needs.append(_Need(state, folder, state.valid, np.arange(len(state.valid))))
    num_pairs, num_missing = sum(len(need.rows) for need in needs), sum(need.num_missing for need in needs)
    if world.is_main:
        print(f"reference: {num_pairs - num_missing} of {num_pairs} pairs from the cache", flush=True)
    source = state.policy if state.policy_is_reference else _load_reference(state)
    source.eval()
    if any(not need.recheck(source) for need in needs):
        num_missing = num_pairs
        for need in needs:
            need.found[:] = False
        if world.is_main:
            reference.discard(folder)
    done = 0
    for need in needs:
        done = need.fill(source, done, num_missing)
    state.ref_train = needs[0].table()
    state.ref_valid = needs[1].table() if state.valid is not None else None
    return weights


class _Need:
    """The rows of a store whose reference values a run needs, and those that it has.

    Rank 0 looks into the cache for all ranks: were each to look for itself, a run that writes meanwhile could give
    them different gaps to fill.
    """

    def __init__(self, state: Engine, folder: Path, store: PairStore, rows: np.ndarray):
        self.state, self.folder, self.store, self.rows = state, folder, store, rows
        world = state.world
        table = torch.empty(len(rows), 3, dtype=torch.float64)
        self.keys = np.empty((0, 16), np.uint8)  # of rank 0, who alone reads and writes
        if world.is_main:
            self.keys = reference.pair_keys(store, rows)
            table = torch.from_numpy(np.column_stack(reference.lookup(folder, self.keys)))
        if world.size > 1:
            dist.broadcast(table, 0)
        self.values = table[:, :2].numpy().copy()
        self.found = table[:, 2].numpy().astype(bool)

    @property
    def num_missing(self) -> int:
        return int((~self.found).sum())

    def recheck(self, source: model.PairModel) -> bool:
        """Computes a few random pairs of the cache again; False when one differs by more than rounding."""
        held = np.flatnonzero(self.found)
        if not len(held):
            return True
        world = self.state.world
        chosen = torch.from_numpy(
            np.random.default_rng().choice(held, min(RECHECKED, len(held)), replace=False)
        )
        if world.size > 1:
            dist.broadcast(chosen, 0)
        at = np.sort(chosen.numpy())
        again = engine.reference_pass(self.state, source, self.store, self.rows[at])
        off = np.abs(again - self.values[at])
        if self.state.config.ref.dtype == "bfloat16":
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

    def fill(self, source: model.PairModel, done: int, total: int) -> int:
        """Computes what is missing, keeping each slice in the cache; the pairs done until then."""
        size = max(MIN_SLICE, -(-len(self.rows) // SLICES))
        for start in range(0, len(self.rows), size):
            at = start + np.flatnonzero(~self.found[start : start + size])
            if not len(at):
                continue
            self.values[at] = engine.reference_pass(
                self.state, source, self.store, self.rows[at], done=done, total=total
            )
            done += len(at)
            if self.state.world.is_main:
                reference.add(self.folder, self.keys[at], self.values[at])
        return done

    def table(self) -> torch.Tensor:
        """The values as a table of all rows of the store; NaN where no step needs them."""
        table = np.full((len(self.store), self.values.shape[1]), np.nan)
        table[self.rows] = self.values
        return torch.from_numpy(table).to(self.state.world.device)


def _load_reference(state: Engine) -> model.PairModel:
    c = state.config
    return load_model(c, c.ref.path, c.ref.dtype, state.world, [state.train, state.valid], trainable=False)


def _longest(stores: list[PairStore | None]) -> int:
    """Tokens of the longest text."""
    return max(int(store.all_lengths()[:, 1:].max()) for store in stores if store is not None)
