"""Small runs of the engine that tests and ranks share; importable, so that ranks can be sent here."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dpo_kit import config as config_module
from dpo_kit.engine import loop, reference, state
from dpo_kit.model import parallel
from dpo_kit.preferences import Pair, PairStore, arrays_of, longest_common_prefix, open_store, write_store

VOCAB = 200


def random_pairs(num_pairs: int, seed: int = 0, longest: int = 20) -> list[Pair]:
    """Pairs of random tokens; prefixes of 0 to 30 tokens, responses of 1 to `longest`."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(num_pairs):
        prefix = rng.integers(3, VOCAB, rng.integers(0, 30))
        chosen, rejected = (rng.integers(3, VOCAB, rng.integers(1, longest)) for _ in range(2))
        rejected[0] = chosen[0] + 1
        chosen_ids = np.concatenate([prefix, chosen]).astype(np.int32)
        rejected_ids = np.concatenate([prefix, rejected]).astype(np.int32)
        shared = longest_common_prefix(chosen_ids, rejected_ids)
        pairs.append(Pair(chosen_ids, rejected_ids, shared, max(shared - i % 3, 0), shared, i))
    return pairs


def pair_of(shared: int, chosen: int, rejected: int, prompt: int | None = None) -> Pair:
    """One pair of so many shared, chosen and rejected tokens, scored from `prompt` (the prefix's end) on."""
    rng = np.random.default_rng(shared * 10_000 + chosen * 100 + rejected)
    prefix, *tails = (rng.integers(3, VOCAB, n) for n in (shared, chosen, rejected))
    tails[1][0] = tails[0][0] + 1
    texts = (np.concatenate([prefix, tail]).astype(np.int32) for tail in tails)
    return Pair(*texts, shared, shared if prompt is None else prompt, shared, 0)


def store_of(pairs: list[Pair], folder: Path) -> PairStore:
    """Writes pairs as a store and opens it."""
    return write_store(folder, arrays_of(pairs), {"tokenizer": {"path": "tiny-random"}, "report": {}})


def both_texts(pairs: list[Pair]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Chosen and rejected token arrays of pairs."""
    return [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]


def tiny_config(fileroot: Path, *overrides: str):
    """tiny-random on the CPU, constants that make 20 steps visible, everything below `fileroot`."""
    tree = {
        "actor": {
            "path": "tiny-random",
            "dtype": "float64",
            "optimizer": {"lr": 1e-3, "warmup_steps_proportion": 0.1},
            "mb_spec": {"max_tokens_per_mb": 100_000},
        },
        "ref": {"path": "tiny-random"},
        "train_dataset": {"path": "sample", "batch_size": 8},
        "cluster": {"fileroot": str(fileroot), "n_gpus_per_node": 0},
        "total_train_epochs": 4,
        "total_train_steps": 20,
    }
    return config_module.from_tree(tree, overrides)


@contextmanager
def one_rank(*overrides: str):
    """A process group of this process alone, unless it is a rank: then `actor.backend` says who shares layers."""
    if dist.is_initialized():
        backend = tiny_config(Path(), *overrides).actor.backend
        yield parallel.init_world(cuda=False, tp_size=config_module.parse_backend(backend).t)
        return
    with parallel.alone(cuda=False) as world:
        yield world


def make_engine(world, config, train: PairStore, valid: PairStore | None = None) -> state.Engine:
    """An engine as the worker makes it, the reference included."""
    engine = state.build(config, world, train, valid)
    reference.prepare(engine)
    return engine


def train_tiny(folder: str, overrides: tuple[str, ...] = (), num_pairs: int = 40) -> list[dict]:
    """Trains on random pairs on the ranks at hand; returns the record of each step."""
    root = Path(folder)
    with one_rank(*overrides) as world:
        if world.is_main:
            store_of(random_pairs(num_pairs), root / "pairs")
        world.barrier()
        config = tiny_config(root / "runs", *overrides)
        engine = make_engine(world, config, open_store(root / "pairs"))
        steps: list[dict] = []
        hooks = loop.Hooks(
            stepped=steps.append,
            evaluated=lambda *_: None,
            due=lambda *_: False,
            save=lambda _: None,
        )
        loop.train(engine, hooks)
        return steps
