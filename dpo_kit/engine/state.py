"""What a rank holds while it trains: its models, the data, where the reference's values come from.

Not here: where those values are kept and made (engine/reference), what is done with them (engine/step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dpo_kit.config import Config
from dpo_kit.model import pair_model
from dpo_kit.model.pair_model import PairModel
from dpo_kit.model.parallel import DTYPES, World
from dpo_kit.preferences import PairStore
from dpo_kit.records.findings import Finding

CPU_FORWARD_TOKENS = 4096
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
    # Tokens of a micro-batch, settled by `micro_batch`.
    actor_tokens: int = CPU_FORWARD_TOKENS
    ref_tokens: int = CPU_FORWARD_TOKENS
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


def raise_if_stopped(engine: Engine) -> None:
    """Raises `Stopped` on every rank as soon as one was asked to stop; a collective."""
    if any(engine.world.gather(engine.should_stop())):
        raise Stopped


def load_policy(
    config: Config, world: World, train: PairStore, valid: PairStore | None
) -> pair_model.PairModel:
    """The policy of a run, ready to be trained."""
    actor = config.actor
    policy = load_model(config, actor.path, actor.dtype, world, [train, valid], trainable=True)
    if actor.disable_dropout:
        pair_model.disable_dropout(policy)
    return policy


def load_model(
    config: Config, path: str, dtype: str, world: World, stores: list[PairStore | None], *, trainable: bool
) -> pair_model.PairModel:
    """The policy or the reference of a run, ready to score its pairs."""
    loaded = pair_model.load(
        path,
        world,
        dtype=DTYPES[dtype],
        trainable=trainable,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        longest_tokens=longest_tokens(stores),
        compiled=config.actor.compile,
    )
    if not loaded.packed and world.is_main:
        why = pair_model.why_unpacked(path, longest_tokens(stores))
        print(
            f"{'actor' if trainable else 'ref'}.path: rows are not packed, for {why}; each text runs whole, with the "
            "model's own attention: the same numbers, slower",
            flush=True,
        )
    return loaded


def longest_tokens(stores: list[PairStore | None]) -> int:
    """Tokens of the longest text."""
    return max(int(store.all_lengths()[:, 1:].max()) for store in stores if store is not None)
