"""How long a step takes, tried on the real ranks with a model of three blocks: `measure(...)`.

The probe has the config's shape, dtype, recomputation and optimizer, random weights, and runs micro-batches
of real pairs. Where one block starts and ends is read off by hooks, so that a step of all layers is

    rest + layers * block + update * parameters / parameters of the probe

    forward   | embedding | block 0 | block 1 | block 2 | head |        a block: from the start of the first
    backward  | head | block 2 | block 1 | block 0 | embedding |        to that of the last, over two

What FSDP gathers and reduces for a block lies inside. Not here: which steps a run has, what it writes
(`estimate`).
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.engine import state
from dpo_kit.engine.optimizer import local, make_optimizer, update
from dpo_kit.launch.on_ranks import spawn
from dpo_kit.losses import preference_loss
from dpo_kit.model import model_folder, pair_model
from dpo_kit.model.packing import MicroBatch, pack, response_sums
from dpo_kit.model.parallel import World, init_world, masters, publish
from dpo_kit.preferences import PairStore, open_store

NUM_BLOCKS = 3
BUDGET_S = 6.0
PARTS = ("forward", "block_forward", "backward", "block_backward", "update")


def measure(
    config: Config, model_folder: str, store: PairStore, plan: list[list[list[int]]]
) -> dict[str, Any]:
    """Seconds of one pass over some micro-batches, on ranks of their own.

    Args:
        config: of the run; devices resolved.
        model_folder: a folder with the model's config.json.
        store: the training pairs.
        plan: `plan[dp_rank][micro_batch]` = rows of the store.

    Returns:
        Median seconds over the repeats on the slowest rank: `forward` and `backward` of the whole probe without
        its blocks, `block_forward` and `block_backward` of one block, `update`; and the probe's `params`.

    Raises:
        RuntimeError: a rank failed, for example without memory.
    """
    cuda = bool(config.cluster.n_gpus_per_node)
    found = spawn(
        run_rank,
        config_module.to_tree(config),
        model_folder,
        str(store.path),
        plan,
        num_ranks=len(plan) * config_module.parse_backend(config.actor.backend).t,
        backend="nccl" if cuda else "gloo",
    )
    slowest = {part: max(rank[part] for rank in found) for part in PARTS}
    return {**slowest, "params": found[0]["params"], "repeats": found[0]["repeats"]}


def run_rank(tree: dict[str, Any], model_folder: str, store_path: str, plan: list[list[list[int]]]) -> dict:
    """What one rank of the probe runs; called by `measure` in a process of its own."""
    config = config_module.from_tree(tree)
    tp_size = config_module.parse_backend(config.actor.backend).t
    world = init_world(cuda=bool(config.cluster.n_gpus_per_node), tp_size=tp_size)
    store = open_store(Path(store_path))
    with tempfile.TemporaryDirectory() as folder:
        write_small_model(Path(model_folder), Path(folder))
        config.actor.path = folder
        policy = state.load_model(config, "actor", world, [store], trainable=True)
    for name, param in ((name, local(param)) for name, param in masters(policy).items()):
        torch.nn.init.constant_(param, 1.0) if "norm" in name else torch.nn.init.normal_(param, std=0.02)
    publish(policy)
    optimizer = make_optimizer(policy, config.actor.optimizer)
    rows = plan[world.dp_rank]
    batches = [_pack(config, store, members or rows[0]).to(world.device) for members in rows]
    clock = Clock(policy, world)
    warm = _passes(config, clock, policy, optimizer, batches, 1)
    # The same on every rank: collectives run in lockstep.
    repeats = min(world.gather(min(5, max(2, int(BUDGET_S / sum(warm[0].values()))))))
    runs = _passes(config, clock, policy, optimizer, batches, repeats)
    median = {part: float(torch.tensor([run[part] for run in runs]).median()) for part in PARTS}
    num_params = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    return {**median, "params": num_params, "repeats": repeats}


def write_small_model(source: Path, folder: Path) -> None:
    """A folder with the config of `source` cut to `NUM_BLOCKS` blocks and weights of zeros (a sparse file)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.num_hidden_layers = NUM_BLOCKS
    config.tie_word_embeddings = model_folder.config_in_effect(source)["tie_word_embeddings"]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:NUM_BLOCKS]
    config.save_pretrained(folder)
    with torch.device("meta"):
        params = dict(AutoModelForCausalLM.from_config(config).named_parameters(remove_duplicate=True))
    header, end = {}, 0
    for name, param in params.items():
        start, end = end, end + 2 * param.numel()
        header[name] = {"dtype": "BF16", "shape": list(param.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _pack(config: Config, store: PairStore, rows: list[int]) -> MicroBatch:
    return pack([store.pair(r) for r in rows], rows, share=config.actor.share_prompt)


def _passes(
    config: Config,
    clock: Clock,
    policy: pair_model.PairModel,
    optimizer: Any,
    batches: list[MicroBatch],
    repeats: int,
) -> list[dict[str, float]]:
    """Seconds by part of each repeat: forward and backward of every micro-batch, then one update."""
    runs, options = [], config.actor.optimizer
    for _ in range(repeats):
        total = dict.fromkeys(PARTS, 0.0)
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            for part, seconds in _one(config, clock, policy, batch).items():
                total[part] += seconds
        start = clock.now()
        update(policy, optimizer, lr=options.lr, clip=options.gradient_clipping)
        total["update"] = clock.now() - start
        runs.append(total)
    return runs


def _one(config: Config, clock: Clock, policy: pair_model.PairModel, batch: MicroBatch) -> dict[str, float]:
    start = clock.start()
    chosen, rejected = response_sums(policy(batch), batch)
    middle = clock.now()
    zeros = torch.zeros_like(chosen)
    loss = preference_loss(chosen, rejected, zeros, zeros, beta=config.actor.beta)
    loss.sum().backward()
    end = clock.now()
    forward, backward = clock.block()
    return {
        "forward": max(0.0, middle - start - NUM_BLOCKS * forward),
        "block_forward": forward,
        "backward": max(0.0, end - middle - NUM_BLOCKS * backward),
        "block_backward": backward,
    }


class Clock:
    """Notes when each block begins in the forward and ends in the backward."""

    def __init__(self, policy: pair_model.PairModel, world: World):
        self.cuda = world.device.type == "cuda"
        self.forward: list[float] = []
        self.backward: list[float] = []
        for layer in policy.lm.model.layers:
            # Before FSDP's own hook, so that what it gathers and reduces counts for the block.
            layer.register_forward_pre_hook(self._begins, prepend=True)

    def now(self) -> float:
        """Seconds; the device has done what it was asked to."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> float:
        """Begins a new micro-batch."""
        self.forward, self.backward = [], []
        return self.now()

    def block(self) -> tuple[float, float]:
        """Seconds of one block in the forward and in the backward of the last micro-batch."""
        forward, backward = ((at[-1] - at[0]) / (NUM_BLOCKS - 1) for at in (self.forward, self.backward))
        return forward, backward

    def _begins(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(self.forward) == NUM_BLOCKS:  # run again in the backward
            return
        self.forward.append(self.now())
        hidden = arguments[0]
        if not hidden.requires_grad:  # of a frozen embedding; asked for, so that the backward comes this far
            hidden.requires_grad_()
        hidden.register_hook(lambda grad: self.backward.append(self.now()))
