"""What pairs cost, by formula: parameters, FLOPs and bytes from a model's config.json. Plain arithmetic, no torch.

One pair with prompt P and responses C and R (tokens), N_b body and N_h head parameters, a forward:

    without sharing   2 N_b (2P + C + R) + A(P + C, 0) + A(P + R, 0) + 2 N_h S
    shared            2 N_b (P + C + R)  + A(P + C, 0) + A(R, P)     + 2 N_h S

with A(q, k0) = 4 L h hd (q k0 + q^2 / 2) for q queries after k0 earlier keys, and S scored tokens. A training
step is three forwards; what is run again to save memory is no useful work. Not here: seconds
(tools/estimate), what is run in which order (`packing`), what is free (system/machine).
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from dpo_kit.config import Config, parse_backend
from dpo_kit.system.machine import size_text

if TYPE_CHECKING:
    import numpy as np


# Elements of one [tokens, vocabulary] chunk of the log-prob head: 32 Mi are 128 MiB in fp32; fewer rows a chunk make
# thin, slow matmuls. A GPU wants 4k tokens and more (performance figures of the field, not measured here).
HEAD_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 29}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only language model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the fields of a config.json (`config.to_dict()` of a loaded one).

        Raises:
            KeyError: a field is missing.
            ValueError: a field is no number of anything.
        """

        def size(value: Any) -> int:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{value!r} is no size")
            return value

        def field(name: str, older: str) -> int:
            return size(config[name] if config.get(name) is not None else config[older])

        heads, hidden = field("num_attention_heads", "n_head"), field("hidden_size", "n_embd")
        return cls(
            layers=field("num_hidden_layers", "n_layer"),
            hidden=hidden,
            intermediate=size(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
            heads=heads,
            kv_heads=size(config.get("num_key_value_heads") or heads),
            head_dim=size(config.get("head_dim") or hidden // heads),
            vocab=size(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def block_params(self) -> int:
        """Matrix parameters of one decoder block (norms and biases, below a thousandth, left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def body_params(self) -> int:
        """N_b: matrix parameters of all blocks."""
        return self.layers * self.block_params

    @property
    def head_params(self) -> int:
        """N_h: parameters of the output layer."""
        return self.hidden * self.vocab

    @property
    def params(self) -> int:
        """Parameters that are stored: blocks, output layer, and the embedding unless it is the same matrix."""
        return self.body_params + self.head_params * (1 if self.tied else 2)

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block, by the names that these families have."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            **dict.fromkeys(("k_proj", "v_proj"), (self.hidden, keys)),
            "o_proj": (queries, self.hidden),
            **dict.fromkeys(("gate_proj", "up_proj"), (self.hidden, self.intermediate)),
            "down_proj": (self.intermediate, self.hidden),
        }

    def part(self, tp_size: int) -> Shape:
        """What one of so many tensor-parallel ranks holds: every matrix is split, the hidden states are not."""
        sizes = {
            name: getattr(self, name) // tp_size for name in ("heads", "kv_heads", "intermediate", "vocab")
        }
        return replace(self, **sizes)

    def work(self, lengths: np.ndarray, share: bool) -> np.ndarray:
        """`pair_flops` of each row of lengths, by which ranks are balanced. Shapes: (P, 3) -> (P,)"""
        import numpy as np  # listing runs does without

        return np.array([self.pair_flops(pair, share) for pair in lengths.tolist()])

    def attention_flops(self, queries: int, earlier: int) -> float:
        """A(q, k0): causal attention of q queries that also see k0 earlier keys, a forward, all layers."""
        return 4.0 * self.layers * self.heads * self.head_dim * (queries * earlier + queries**2 / 2)

    def pair_flops(self, lengths: Sequence[int], share: bool, scored: int | None = None) -> float:
        """FLOPs of one forward over a pair.

        Args:
            lengths: (shared prefix, whole chosen text, whole rejected text), tokens.
            share: whether the prefix is run once.
            scored: tokens that get a log-prob; what follows the prefix when left out.
        """
        shared, chosen, rejected = lengths
        if scored is None:
            scored = chosen + rejected - 2 * shared
        prefix = shared if share else 0
        body = 2.0 * self.body_params * (chosen + rejected - prefix)
        attention = self.attention_flops(chosen, 0) + self.attention_flops(rejected - prefix, prefix)
        return body + attention + 2.0 * self.head_params * scored


DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
PROCESS_BYTES = {"cpu": 400 * 2**20, "cuda": 1200 * 2**20}
# Of the tokens of a pair, how many are its shared prefix: on CUDA their keys and values are kept twice.
TYPICAL_PREFIX_SHARE = 0.4
# glibc hands pieces from this size on back to the system at once; smaller ones leave holes.
LARGEST_HEAP_PIECE = 32 * 2**20
# Bytes a small parameter: on one rank; with FSDP2, which gathers and reduces in buffers of other sizes, more.
HEAP_SLACK = 1.2
SHARDED_HEAP_SLACK = 4.0
# Small gradients of adapters lie among what blocks leave behind: holes, as a share of what all blocks keep, measured.
ADAPTER_HOLES = 0.6
CUDA_SLACK = 0.08
MOST_TOKENS = 1 << 24
# More tokens a micro-batch are not worth a word.
PROPOSED_TOKENS = 16384


def adapted_layers(shape: Shape, config: Config) -> dict[str, tuple[int, int]]:
    """Those of `Shape.linear_layers` that get adapters; all of them where a target has a name of another family."""
    layers = shape.linear_layers
    names = {target.rpartition(".")[2] for target in config.actor.target_modules}
    return {name: layers[name] for name in names} if names and names <= layers.keys() else layers


def trained_params(shape: Shape, config: Config) -> int:
    """Parameters that have gradients and optimizer states: those of the adapters, or all."""
    if not config.actor.use_lora:
        return shape.params
    ends = sum(inputs + outputs for inputs, outputs in adapted_layers(shape, config).values())
    return shape.layers * config.actor.lora_rank * ends


def export_bytes(shape: Shape, config: Config) -> int:
    """Bytes of the weights that an export holds."""
    is_whole = config.saver.merged or not config.actor.use_lora
    return (shape.params if is_whole else trained_params(shape, config)) * DTYPE_BYTES[config.actor.dtype]


def second_model(config: Config) -> bool:
    """Whether a reference lies in memory beside the policy; one that is the policy's base does not."""
    actor, ref = config.actor, config.ref
    is_base = actor.use_lora and (actor.path, actor.dtype) == (ref.path, ref.dtype)
    return ref.logps == "online" and not is_base


def step_bytes(shape: Shape, config: Config, *, num_ranks: int, tokens: int) -> dict[str, int]:
    """Bytes of one rank at the peak of a step, by part (see the module's docstring).

    Args:
        shape: of the policy; an online reference is taken to have the same.
        config: dtype, gradient checkpointing, optimizer states, reference and tensor-parallel ranks are read.
        num_ranks: of the run, over which the weights are sharded.
        tokens: tokens run in the largest micro-batch.
    """
    actor = config.actor
    tp_size = parse_backend(actor.backend).t
    shape, is_sharded, num_ranks = shape.part(tp_size), num_ranks > 1, num_ranks // tp_size
    compute = DTYPE_BYTES[actor.dtype]
    master = max(compute, 4)
    device = _device(config)
    trained = trained_params(shape, config)
    frozen = shape.params if actor.use_lora else 0  # in the compute dtype, without a master
    head = head_bytes(shape, tokens, compute, device, trained=not frozen)
    parts = {
        "weights": (trained * master + frozen * compute) // num_ranks,
        "optimizer": 2 * trained * _state_bytes(config) // num_ranks,
        "gradients": trained * master // num_ranks,
        "copies": _copies(shape, trained, compute, is_sharded, held=master),
        "reference": 0,
        "activations": tokens * kept_bytes(shape, config),
        "working": max(head, tokens * _recomputed(shape, config)),
    }
    if second_model(config):
        own = DTYPE_BYTES[config.ref.dtype]
        copies = _copies(shape, shape.params, own, is_sharded, held=own)
        parts["reference"] = shape.params * own // num_ranks + copies
    if device == "cuda":
        slack = CUDA_SLACK * (parts["activations"] + parts["working"] + parts["copies"])
    else:
        each = SHARDED_HEAP_SLACK + 2 * compute if is_sharded else HEAP_SLACK
        slack = each * _heap_params(shape)
        if actor.use_lora:
            slack += ADAPTER_HOLES * tokens * shape.layers * _block_bytes(shape, config)
    return {**parts, "allocator": int(slack), "process": PROCESS_BYTES[device]}


def tokens_that_fit(shape: Shape, config: Config, *, num_ranks: int, free_bytes: int) -> int:
    """The largest micro-batch whose step fits in `free_bytes` a rank; 0 when not even the weights fit.

    Args:
        num_ranks: of the run.
        free_bytes: of one rank. CPU ranks share the machine's memory: hand over their part of it.

    Returns:
        Tokens run, at most 2^24.
    """
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if sum(step_bytes(shape, config, num_ranks=num_ranks, tokens=middle).values()) <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def checkpoint_bytes(shape: Shape, config: Config) -> int:
    """Bytes of the trained weights' masters and both optimizer states, of all ranks together."""
    return trained_params(shape, config) * (
        max(DTYPE_BYTES[config.actor.dtype], 4) + 2 * _state_bytes(config)
    )


def checkpoints_at_once(config: Config, due: int | None = None) -> int:
    """Checkpoints that lie in a run's folder at once: those kept and the one being written; a stop writes one, too.

    Args:
        due: how many the run will write by its frequencies; None when that is not known.
    """
    recover = config.recover
    if not any((recover.freq_epochs, recover.freq_steps, recover.freq_secs)):
        return 1
    most = 1 + (due or 1 if recover.keep == "all" else int(recover.keep))
    return most if due is None else min(most, due + 1)


def _device(config: Config) -> str:
    return "cuda" if config.cluster.n_gpus_per_node not in (0, "auto") else "cpu"


def _state_bytes(config: Config) -> int:
    if config.actor.dtype == "float64":
        return 8
    return DTYPE_BYTES[config.actor.optimizer.state_dtype]


def memory_problem(
    shape: Shape, config: Config, *, num_ranks: int, tokens: int, longest: int, free_bytes: int
) -> str:
    """Why a step does not fit in memory, and a setting that does; empty when it fits.

    Args:
        num_ranks: of the run.
        tokens: tokens run in the largest micro-batch.
        longest: tokens run for the longest pair, which a micro-batch must hold.
        free_bytes: of one rank.
    """
    needed = sum(step_bytes(shape, config, num_ranks=num_ranks, tokens=tokens).values())
    if needed <= free_bytes:
        return ""
    is_cpu = _device(config) == "cpu"
    where, times = (f"{num_ranks} CPU rank{'s' * (num_ranks > 1)}", num_ranks) if is_cpu else ("a device", 1)
    what = f"a step with {tokens} tokens a micro-batch needs"
    if tokens <= longest:
        what = "weights, optimizer and the longest pair need"
    return (
        f"actor.path = {config.actor.path!r}: {what} {times * needed / 2**30:.2f} GiB on {where}, and"
        f" {times * free_bytes / 2**30:.2f} GiB are free; "
        + remedy(shape, config, num_ranks=num_ranks, free_bytes=free_bytes, longest=longest)
    )


def disk_need(
    shape: Shape, config: Config, *, checkpoints: int, models: int, free_bytes: int, other_bytes: int = 0
) -> tuple[str, str]:
    """What a run writes and what is free, in words, and why that does not fit; the second is empty when it does.

    Args:
        checkpoints: that lie on the disk at once.
        models: exports and the final model.
        free_bytes: below `cluster.fileroot`.
        other_bytes: of pairs and records.
    """
    needed = checkpoints * checkpoint_bytes(shape, config) + other_bytes
    needed += models * export_bytes(shape, config)
    told = (
        f"{checkpoints} checkpoint{'s' * (checkpoints != 1)} and {models} model{'s' * (models > 1)} need"
        f" {size_text(needed)}, and {size_text(free_bytes)} are free"
    )
    where, fewer = shlex.quote(config.cluster.fileroot), "recover.keep=1"
    if models > 1 + config.saver.best:
        fewer += ", saver.freq_steps=null saver.freq_epochs=null"
    problem = (
        f"cluster.fileroot = {config.cluster.fileroot!r}: {told}; use {fewer}, free space (dpo-kit runs prune"
        f" --fileroot {where}, dpo-kit cache rm --fileroot {where}), or another cluster.fileroot"
    )
    return told, problem if needed > free_bytes else ""


def remedy(shape: Shape, config: Config, *, num_ranks: int, free_bytes: int, longest: int) -> str:
    """Settings with which a step fits in `free_bytes` a rank, in words.

    Args:
        longest: tokens run for the longest pair, which a micro-batch must hold.
    """
    fitting = tokens_that_fit(shape, config, num_ranks=num_ranks, free_bytes=free_bytes)
    if fitting >= longest:
        setting = f"actor.mb_spec.max_tokens_per_mb={fitting}"
        return f"use {setting} or less (the longest pair has {longest} tokens)"
    for settings in _cheaper(config):
        tried = copy.deepcopy(config)
        for field, value in settings.items():
            section, _, name = field.rpartition(".")
            setattr(attrgetter(section)(tried), name, value)
        fitting = tokens_that_fit(shape, tried, num_ranks=num_ranks, free_bytes=free_bytes)
        if fitting >= longest:
            words = " ".join(f"{field}={str(value).lower()}" for field, value in settings.items())
            return f"use {words} actor.mb_spec.max_tokens_per_mb={min(fitting, PROPOSED_TOKENS)}"
    least = sum(step_bytes(shape, config, num_ranks=num_ranks, tokens=longest).values())
    what = f"the longest pair alone ({longest} tokens) needs" if longest > 1 else "the weights alone need"
    return (
        f"{what} {least / 2**30:.2f} GiB a rank, and no setting makes it fit; use a smaller model, a lower"
        " train_dataset.max_length, or a machine with more memory"
    )


def _cheaper(config: Config) -> list[dict[str, Any]]:
    """Settings that need less memory: each alone, the mildest first, then more and more of them together."""
    steps: list[dict[str, Any]] = []
    if config.actor.gradient_checkpointing is not True:
        steps.append({"actor.gradient_checkpointing": True})
    if config.ref.logps == "online":
        steps.append({"ref.logps": "cached"})
    if _state_bytes(config) == 4:
        steps.append({"actor.optimizer.state_dtype": "bfloat16"})
    if config.actor.dtype != "bfloat16":
        steps.append({"actor.dtype": "bfloat16"})
    together = [dict(pair for step in steps[: n + 1] for pair in step.items()) for n in range(1, len(steps))]
    return [*steps, *together]


def block_bytes(shape: Shape, dtype_bytes: int, prefix_share: float = 0.0) -> int:
    """Bytes that the backward of one decoder block needs, a token.

    Two norms (input, normalised, output), queries and the attention's output, keys and values, four tensors of
    the gated layer.

    Args:
        prefix_share: of the tokens, those whose keys and values are gathered a second time (CUDA).
    """
    norms = 2 * (3 * dtype_bytes if dtype_bytes >= 4 else 4 + 2 * dtype_bytes) * shape.hidden
    attention = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim * (1 + prefix_share)
    return int(norms + dtype_bytes * (attention + 4 * shape.intermediate))


def kept_bytes(shape: Shape, config: Config) -> int:
    """Bytes a token that all blocks keep from the forward to the backward."""
    compute = DTYPE_BYTES[config.actor.dtype]
    mode = config.actor.gradient_checkpointing
    if mode is False:
        return shape.layers * _block_bytes(shape, config)
    kept = shape.hidden
    if mode == "selective":  # attention, and of the matmuls queries, values, the gate and the last one
        matmuls = shape.hidden + shape.head_dim * (shape.heads + shape.kv_heads) + shape.intermediate
        kept += shape.heads * shape.head_dim + matmuls
        if config.actor.use_lora:  # three matmuls a layer: others are the second ones, up to two of a layer
            kept += matmuls + len(adapted_layers(shape, config)) * config.actor.lora_rank
    return shape.layers * compute * kept


def _block_bytes(shape: Shape, config: Config) -> int:
    twice = TYPICAL_PREFIX_SHARE if _device(config) == "cuda" else 0.0
    compute = DTYPE_BYTES[config.actor.dtype]
    # What lies between the two matrices of an adapter.
    inner = len(adapted_layers(shape, config)) * config.actor.lora_rank if config.actor.use_lora else 0
    return block_bytes(shape, compute, twice) + compute * inner


def _recomputed(shape: Shape, config: Config) -> int:
    """Bytes a token of the one block that is run again in the backward."""
    if config.actor.gradient_checkpointing is False:
        return 0
    # The sum of a layer and its adapter takes two more of its outputs while it is made.
    sums = 2 * DTYPE_BYTES[config.actor.dtype] * shape.intermediate if config.actor.use_lora else 0
    return _block_bytes(shape, config) + sums


def head_bytes(
    shape: Shape, tokens: int, dtype_bytes: int, device: str = "cpu", *, trained: bool = True
) -> int:
    """Bytes that one chunk of the log-prob head needs in the backward, and the gradient of its weight if trained."""
    elements = min(HEAD_CHUNK_ELEMENTS[device], tokens * shape.vocab)
    upcast = max(dtype_bytes, 4)
    chunk = elements * (upcast + (dtype_bytes if dtype_bytes < upcast else 0))
    return chunk + (shape.head_params * upcast if trained else 0)


def _copies(shape: Shape, params: int, dtype_bytes: int, is_sharded: bool, held: int) -> int:
    """Weights that are held a second time at the peak.

    Args:
        params: that are kept in `held` bytes, all or the trained ones.
        dtype_bytes: of a value in the compute dtype.
        is_sharded: by FSDP2, which gathers them.
        held: bytes of a value of the weights that stay: on one rank there is no copy where both are the same.
    """
    if not is_sharded:
        return 0 if held == dtype_bytes else dtype_bytes * params
    head = shape.head_params * (1 if shape.tied else 2)
    return dtype_bytes * (head + min(2, shape.layers) * shape.block_params)


def _heap_params(shape: Shape) -> int:
    """Parameters of the blocks whose matrices are small enough to live in glibc's heap."""
    is_small = 4 * shape.hidden * shape.intermediate < LARGEST_HEAP_PIECE
    return shape.body_params if is_small else 0
