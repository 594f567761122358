"""Devices and ranks of a run on this machine: `auto` becomes numbers, and what is not there is refused.

Deliberately not here: how devices are found (system/machine).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.system import machine
from dpo_kit.system.processes import physical_cores

Say = Callable[[str], None]


def resolve_world(config: Config, say: Say | None = None) -> Config:
    """Fills in devices and ranks: `cluster.n_gpus_per_node` becomes a number, the backend gets its sizes.

    Args:
        config: loaded; not changed.
        say: where to say what was chosen; prints by default.

    Raises:
        UserError: more ranks or devices than there are (both numbers named), a scheduler that is not built
            yet, or a contradiction that only shows with the numbers filled in.
    """
    say = say or print_line
    if config.scheduler.type != "local":
        raise UserError(
            f"scheduler.type = {config.scheduler.type!r} loads, but launching on it comes later;"
            " use scheduler.type=local"
        )
    config = copy.deepcopy(config)
    visible = machine.visible_devices()
    wanted = config.cluster.n_gpus_per_node
    if wanted == "auto":
        config.cluster.n_gpus_per_node = visible
    elif int(wanted) > visible:
        raise ConfigError([machine.too_many(int(wanted), visible)])
    _fill_backend(config, automatic=wanted == "auto")
    config_module.check(config)
    say(_devices_text(config, visible))
    return config


def _fill_backend(config: Config, *, automatic: bool) -> None:
    backend = config_module.parse_backend(config.actor.backend)
    num_devices = int(config.cluster.n_gpus_per_node)
    if not backend.explicit:
        sized = f"{backend.kind}:d{max(1, num_devices)}p1t1"
        if config.ref.backend == config.actor.backend:
            config.ref.backend = sized
        config.actor.backend = sized
        return
    cores = os.cpu_count() or 1
    # `n_gpus_per_node: 0` asks for CPU ranks, however many; `auto` only falls back to them.
    if automatic and num_devices == 0 and backend.world_size > cores:
        raise ConfigError(
            [
                f"actor.backend = {config.actor.backend!r} needs {backend.world_size} ranks, and there are 0 CUDA"
                f" devices and {cores} CPU cores here; use actor.backend=fsdp, or cluster.n_gpus_per_node=0 for"
                f" {backend.world_size} CPU ranks all the same"
            ]
        )


def _devices_text(config: Config, visible: int) -> str:
    num_ranks = config_module.parse_backend(config.actor.backend).world_size
    plural = "s" if num_ranks > 1 else ""
    if not config.cluster.n_gpus_per_node:
        threads = max(1, physical_cores() // num_ranks)
        return f"{num_ranks} CPU rank{plural} (gloo), {threads} thread{'s' if threads > 1 else ''} each"
    spare = f"; {visible - num_ranks} of {visible} visible devices stay unused" if num_ranks < visible else ""
    return f"{num_ranks} CUDA rank{plural} (NCCL){spare}"


def print_line(text: str) -> None:
    print(text, flush=True)
