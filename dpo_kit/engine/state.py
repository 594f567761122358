"""What a rank holds while it trains: its models, the data, where the reference's values come from.

Not here: where those values are kept and made (engine/reference), what is done with them (engine/step).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_kit.config import Config
from dpo_kit.model import lora, pair_model
from dpo_kit.model.pair_model import PairModel
from dpo_kit.model.parallel import DTYPES, World
from dpo_kit.preferences import PairStore
from dpo_kit.records.findings import Finding
from dpo_kit.system import machine

# A CPU is at its fastest with 2k to 4k tokens (docs/log.md); more only pushes activations out of its caches.
CPU_TOKENS = 4096
FIRST_STEP_NATS = 1e-3
FIRST_STEP_NATS_PER_TOKEN_BF16 = 1e-2


class Stopped(Exception):
    """The run was asked to stop; every rank raises it at the same point."""


@dataclass
class Engine:
    """What a rank holds while it trains: the model, the data and where the reference's values come from."""

    config: Config
    world: World
    policy: PairModel
    train: PairStore
    valid: PairStore | None
    free_bytes: int  # of this rank, before its weights were loaded
    # Tokens of a micro-batch.
    actor_tokens: int
    ref_tokens: int
    # The reference's log-probs of every row of a store, (rows, 2) float64 on the device, or the resident model.
    ref_train: Tensor | None = None
    ref_valid: Tensor | None = None
    ref_model: PairModel | None = None
    policy_is_reference: bool = False
    should_stop: Callable[[], bool] = field(default=lambda: False)
    progress: Callable[..., None] = field(default=lambda *_a, **_k: None)
    found: Callable[[Finding], None] = field(default=lambda _: None)

    @property
    def max_tokens(self) -> int:
        """Tokens of a training micro-batch; a resident reference runs it too, so its bound holds as well."""
        online = self.config.ref.logps == "online"
        return min(self.actor_tokens, self.ref_tokens) if online else self.actor_tokens

    def shares(self, *models: PairModel | None) -> bool:
        """Whether rows made for these models hold a common prefix once."""
        return self.config.actor.share_prompt and all(m.packed for m in models if m is not None)

    def load(self, name: str) -> PairModel:
        """The policy (`actor`, to be trained) or the reference (`ref`), ready for both stores."""
        stores = [self.train, self.valid]
        return load_model(self.config, name, self.world, stores, trainable=name == "actor")


def build(
    config: Config,
    world: World,
    train: PairStore,
    valid: PairStore | None = None,
    *,
    trainable: bool = True,
    **hooks: Any,
) -> Engine:
    """An engine with its policy; `micro_batch.settle` makes numbers of `auto`, `reference.prepare` adds the reference.

    Args:
        trainable: the policy will be trained, not only asked.
        hooks: `should_stop`, `progress` and `found` of `Engine`.
    """
    tokens = (section.mb_spec.max_tokens_per_mb for section in (config.actor, config.ref))
    actor_tokens, ref_tokens = (CPU_TOKENS if number == "auto" else int(number) for number in tokens)
    free = free_bytes(world)
    policy = load_model(config, "actor", world, [train, valid], trainable=trainable)
    return Engine(config, world, policy, train, valid, free, actor_tokens, ref_tokens, **hooks)


def reload_policy(engine: Engine) -> None:
    """Loads the policy again, after an error that left it of no use; its memory is given back first."""
    del engine.policy
    gc.collect()
    torch.cuda.empty_cache()
    engine.policy = engine.load("actor")


def free_bytes(world: World) -> int:
    """Memory that this rank may use: its device's, or its part of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return machine.free_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def load_model(
    config: Config, name: str, world: World, stores: list[PairStore | None], *, trainable: bool
) -> PairModel:
    """The policy (`actor`) or the reference (`ref`) of a run, ready for its pairs.

    Args:
        stores: all that it will see.
        trainable: its weights will be changed.
    """
    section, longest = getattr(config, name), longest_tokens(stores)
    loaded = pair_model.load(
        section.path,
        world,
        dtype=DTYPES[section.dtype],
        trainable=trainable,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        longest_tokens=longest,
        compiled=config.actor.compile,
        adapters=lora.options(config) if trainable else None,
    )
    if not loaded.packed and world.is_main:
        why = pair_model.why_unpacked(section.path, longest)
        print(
            f"{name}.path: rows are not packed, for {why}; each text runs whole, with the "
            "model's own attention: the same numbers, slower",
            flush=True,
        )
    if trainable and config.actor.disable_dropout:
        pair_model.disable_dropout(loaded)
    return loaded


def longest_tokens(stores: list[PairStore | None]) -> int:
    """Tokens of the longest text."""
    return max(int(store.all_lengths()[:, 1:].max()) for store in stores if store is not None)
