"""What the benchmarks run on: model folders, with random weights where asked for, and stores of pairs.

Not here: how a measurement is run, timed and laid out (`common`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit import config as config_module
from dpo_kit.model import builtin, costs
from dpo_kit.model.model_folder import TINY
from dpo_kit.preferences import Pair, PairStore, arrays_of, open_store, write_store

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "benchmarks"
DATA = "../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
SEED = 1
# Shapes of well-known models; `random:NAME` is one of them with random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"model_type": "llama", "sizes": (2, 64, 128, 4, 2, 16), "vocab_size": 512, "tied": True},
    "toy-qwen2": {"model_type": "qwen2", "sizes": (2, 64, 160, 4, 2, 16), "vocab_size": 512, "tied": False},
    "smollm2-135m": {
        "model_type": "llama",
        "sizes": (30, 576, 1536, 9, 3, 64),
        "vocab_size": 49152,
        "tied": True,
    },
    "qwen2-0.15b": {
        "model_type": "qwen2",
        "sizes": (12, 768, 3072, 12, 2, 64),
        "vocab_size": 65536,
        "tied": True,
    },
    "0.5b": {"model_type": "qwen2", "sizes": (24, 896, 4864, 14, 2, 64), "vocab_size": 151936, "tied": True},
    "1.5b": {
        "model_type": "qwen2",
        "sizes": (28, 1536, 8960, 12, 2, 128),
        "vocab_size": 151936,
        "tied": True,
    },
    "7b": {
        "model_type": "qwen2",
        "sizes": (28, 3584, 18944, 28, 4, 128),
        "vocab_size": 152064,
        "tied": False,
    },
}


def model_folder(name: str, layers: int = 0) -> str:
    """The folder of a model: a built-in name, a folder, or `random:SHAPE`, made on first use.

    Args:
        layers: another number of layers for a random model.
    """
    if not name.startswith("random:"):
        return builtin.ensure(name)
    shape = name.removeprefix("random:")
    folder = WORK / "models" / (f"{shape}-{layers}" if layers else shape)
    if not (folder / "config.json").exists():
        _write_random(folder, SHAPES[shape], layers)
    return str(folder)


def _write_random(folder: Path, shape: dict[str, Any], layers: int) -> None:
    """Config, seeded bf16 weights one file a block (so that no more is in memory), the tiny tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    num_layers, hidden, intermediate, heads, kv_heads, head_dim = shape["sizes"]
    config = AutoConfig.for_model(
        shape["model_type"],
        vocab_size=shape["vocab_size"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
        tie_word_embeddings=shape["tied"],
    )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(lm).__name__]
    files: dict[str, list[tuple[str, Any]]] = {}
    for name, value in lm.named_parameters():  # tied weights once
        files.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(
            (name, value)
        )
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for number, parts in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, value in parts:
            if value.ndim == 1:
                tensor = torch.full(value.shape, float("norm" in name))
            else:
                tensor = torch.empty(value.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] = tensor.to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    index_text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(index_text)
    builtin.load_tokenizer(TINY).save_pretrained(folder)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)  # last: its presence says that the folder is whole


def shape_of(folder: str) -> costs.Shape:
    """The sizes of a model folder, for the formulas."""
    return costs.Shape.of(json.loads((Path(folder) / "config.json").read_text()))


def pair_store(o: argparse.Namespace, folder: str) -> PairStore:
    """The pairs of a run, longest first: real rows, or synthetic ones when `--shape` says so."""
    mark = hashlib.sha256(json.dumps([folder, o.pairs, o.data, o.shape]).encode()).hexdigest()[:12]
    place = WORK / "pairs" / mark
    if (place / "meta.json").exists():
        return open_store(place)
    made = synthetic_pairs(o.shape, o.pairs, shape_of(folder).vocab) if o.shape else _real_pairs(o, folder)
    return write_pairs(
        sorted(made, key=lambda p: -max(len(p.chosen_ids), len(p.rejected_ids))), place, folder
    )


def write_pairs(pairs: Sequence[Pair], place: Path, folder: str) -> PairStore:
    """Writes pairs as a store, in the order given."""
    return write_store(place, arrays_of(pairs), {"tokenizer": {"path": folder}, "report": {}})


def _real_pairs(o: argparse.Namespace, folder: str) -> list[Pair]:
    from dpo_kit import dataset

    data = (ROOT / o.data).resolve()
    tree = {
        "actor": {"path": folder},
        "ref": {"path": folder},
        "train_dataset": {"path": str(data), "num_rows": o.pairs + 8 + o.pairs // 4, "max_length": 2048},
        "cluster": {"fileroot": str(WORK), "n_gpus_per_node": 0},
    }
    store = dataset.build(config_module.from_tree(tree, []))
    if len(store) < o.pairs:
        raise SystemExit(f"{o.data} has {len(store)} usable pairs, --pairs asks for {o.pairs}")
    return [store.pair(i) for i in range(o.pairs)]


def synthetic_pairs(shape: str, num_pairs: int, vocab: int) -> list[Pair]:
    """Pairs of random tokens with prompt and response lengths P/C/R.

    Args:
        shape: `P/C/R`, or `P/C/R~S`: each length times exp(S * normal), so that means stay near P, C and R.
    """
    sizes, _, spread = shape.partition("~")
    means, sigma = np.array([int(n) for n in sizes.split("/")]), float(spread or 0)
    rng = np.random.default_rng(SEED)
    pairs = []
    for i in range(num_pairs):
        factors = np.exp(sigma * rng.standard_normal(3) - sigma**2 / 2)
        prompt, chosen, rejected = (int(n) for n in np.maximum(means * factors, 2))
        ids = [rng.integers(3, min(vocab, 256), n, dtype=np.int32) for n in (prompt, chosen, rejected)]
        ids[2][0] = ids[1][0] + 1  # the shared prefix ends here
        texts = [np.concatenate([ids[0], response]) for response in ids[1:]]
        pairs.append(Pair(*texts, shared=prompt, prompt=prompt, context=prompt, index=i))
    return pairs


def flops(shape: costs.Shape, store: PairStore, *, share: bool) -> float:
    """Useful FLOPs of one training pass over a store: three forwards."""
    return 3 * sum(shape.pair_flops(store.lengths(i), share) for i in range(len(store)))


def padded_flops(shape: costs.Shape, store: PairStore, batch_size: int, *, all_positions: bool) -> float:
    """FLOPs of one training pass over padded batches of whole texts in the store's order.

    Args:
        all_positions: every position runs through the output layer, also the prompt's and the padding's.
    """
    total = 0.0
    for first in range(0, len(store), batch_size):
        lengths = [store.lengths(i) for i in range(first, min(first + batch_size, len(store)))]
        longest = max(max(c, r) for _, c, r in lengths)
        own = sum(c + r - 2 * s for s, c, r in lengths)
        scored = len(lengths) * 2 * longest if all_positions else own
        total += len(lengths) * shape.pair_flops((0, longest, longest), False, 0)
        total += 2.0 * shape.head_params * scored
    return 3 * total
