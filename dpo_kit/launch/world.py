"""Devices and ranks of a run: `auto` becomes numbers, and what is not there is refused.

Deliberately not here: how devices are found (system/machine).
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.supervise import nodes
from dpo_kit.system import machine
from dpo_kit.system.processes import physical_cores

Say = Callable[[str], None]
# What a scheduler needs; an extra of its name installs it.
_PACKAGES = {"ray": "ray", "slurm": "submitit"}


def resolve_world(config: Config, say: Say | None = None) -> Config:
    """Fills in devices and ranks: `cluster.n_gpus_per_node` becomes a number, the backend gets its sizes.

    Args:
        config: loaded; not changed.
        say: where to say what was chosen; prints by default.

    Raises:
        UserError: more ranks or devices than there are (both numbers named), a scheduler whose package is missing,
            or a contradiction that only shows with the numbers filled in.
    """
    say = say or print_line
    check_package(config.scheduler.type)
    config = copy.deepcopy(config)
    visible = machine.visible_devices()
    wanted = config.cluster.n_gpus_per_node
    if config.scheduler.type == "torchrun":
        _take_sizes(config)
    if config.scheduler.type == "slurm":
        _check_job(config)
    is_here = config.scheduler.type in ("local", "torchrun")
    if wanted == "auto":
        config.cluster.n_gpus_per_node = visible
    elif is_here and int(wanted) > visible:
        raise ConfigError([machine.too_many(int(wanted), visible)])
    _fill_backend(config, automatic=is_here and wanted == "auto")
    config_module.check(config)
    say(_devices_text(config, visible) if config.scheduler.type == "local" else _nodes_text(config))
    return config


def plan_world(config: Config, num_devices: int | None = None, say: Say | None = None) -> Config:
    """`resolve_world` for machines that are not this one, nor torchrun's or a scheduler's here.

    Args:
        config: loaded; not changed.
        num_devices: CUDA devices of all `cluster.n_nodes` together. None: as many as the configuration says, and
            where it leaves that open, one a rank, or one a node.
        say: as for `resolve_world`.

    Raises:
        UserError: the devices cannot be spread over the nodes, or are fewer than the ranks.
    """
    config = copy.deepcopy(config)
    cluster, backend = config.cluster, config_module.parse_backend(config.actor.backend)
    if num_devices is not None and (num_devices < 1 or num_devices % cluster.n_nodes):
        raise UserError(
            f"--devices {num_devices} cannot be shared out over cluster.n_nodes = {cluster.n_nodes}; give a multiple of"
            f" {cluster.n_nodes}, such as {max(1, num_devices // cluster.n_nodes) * cluster.n_nodes}"
        )
    if num_devices is not None:
        cluster.n_gpus_per_node = num_devices // cluster.n_nodes
    elif cluster.n_gpus_per_node in ("auto", 0):
        cluster.n_gpus_per_node = -(-backend.world_size // cluster.n_nodes) if backend.explicit else 1
    _fill_backend(config, automatic=False)
    config_module.check(config)
    (say or print_line)(_nodes_text(config))
    return config


def check_package(scheduler: str) -> None:
    """Refuses a scheduler whose package is not installed."""
    package = _PACKAGES.get(scheduler)
    if package and importlib.util.find_spec(package) is None:
        extra = f"dpo-kit[{scheduler}]"
        raise UserError(f'scheduler.type = {scheduler!r} needs {package}; run: pip install "{extra}"')


def _take_sizes(config: Config) -> None:
    """The world is torchrun's: the backend gets its sizes, or must have them."""
    num_ranks, num_nodes = _torchrun_sizes()
    backend = config_module.parse_backend(config.actor.backend)
    if backend.explicit and backend.world_size != num_ranks:
        raise ConfigError(
            [
                f"actor.backend = {config.actor.backend!r} has {backend.world_size} ranks, and torchrun has started"
                f" {num_ranks} processes; use fsdp:d{num_ranks}, or another --nproc-per-node"
            ]
        )
    config.cluster.n_nodes = num_nodes
    if not backend.explicit:
        config.actor.backend = config.ref.backend = f"{backend.kind}:d{num_ranks}p1t1"


def _check_job(config: Config) -> None:
    """Refuses what is no job of Slurm, or one of fewer nodes."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        raise UserError(
            "scheduler.type = 'slurm': this is no job of Slurm; `dpo-kit train --config FILE scheduler.type=slurm`"
            " submits one (scheduler.notebook=notebooks/train.ipynb runs a notebook in it), or use scheduler.type=local"
        )
    wanted, has = config.cluster.n_nodes, int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if wanted > has:
        raise ConfigError(
            [
                f"cluster.n_nodes = {wanted} is more than the {has} nodes of job {job}; use cluster.n_nodes={has}, or"
                f" sbatch --nodes={wanted}"
            ]
        )


def _torchrun_sizes() -> tuple[int, int]:
    """Processes that torchrun has started, and the machines that they are on."""
    try:
        num_ranks, on_each = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "scheduler.type = 'torchrun' is for processes that torchrun has started (torchrun --nproc-per-node=N -m"
            " dpo_kit train --config FILE scheduler.type=torchrun); use scheduler.type=local here"
        ) from None
    return num_ranks, -(-num_ranks // on_each)


def check_alone(config: Config | None = None) -> None:
    """Refuses to be one of several processes that all start the same run.

    Args:
        config: with `scheduler.type` torchrun that is as it should be; None: never is.
    """
    for name, many in (("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")):
        number = os.environ.get(name, "")
        if name == "WORLD_SIZE" and "TORCHELASTIC_RUN_ID" not in os.environ:
            continue
        if not number.isdigit() or int(number) < 2:
            continue
        if config is None:
            raise UserError(
                f"{many} has started this notebook {number} times, and each would start the same run; start it once:"
                " ranks are started by the run itself (actor.backend, cluster.n_nodes, scheduler.type)"
            )
        if not (many == "torchrun" and config.scheduler.type == "torchrun"):
            way = "leave srun out: ranks are started by the run itself"
            if many == "torchrun":
                way = "add scheduler.type=torchrun"
            raise UserError(
                f"{many} has started {number} processes, and each would start the same run; {way}"
            )


def _fill_backend(config: Config, *, automatic: bool) -> None:
    backend = config_module.parse_backend(config.actor.backend)
    num_devices = int(config.cluster.n_gpus_per_node)
    if not backend.explicit:
        sized = f"{backend.kind}:d{config.cluster.n_nodes * max(1, num_devices)}p1t1"
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


def _nodes_text(config: Config) -> str:
    """What runs where, and once which backend would take all devices."""
    cluster, backend = config.cluster, config_module.parse_backend(config.actor.backend)
    num_ranks, num_devices = backend.world_size, cluster.n_nodes * int(cluster.n_gpus_per_node)
    each = ", ".join(map(str, sorted(set(nodes.layout(config)), reverse=True)))
    kind = "CUDA" if num_devices else "CPU"
    told = f"{num_ranks} {kind} rank{'s' * (num_ranks > 1)} ({'NCCL' if num_devices else 'gloo'})"
    told += f" on {cluster.n_nodes} node{'s' * (cluster.n_nodes > 1)}, {each} on each"
    if num_ranks < num_devices:
        width, unused = num_devices // backend.t, num_devices - num_ranks
        more = f" train_dataset.batch_size={width}" if config.train_dataset.batch_size < width else ""
        told += f"; {unused} of {num_devices} devices stay unused: actor.backend=fsdp:d{width}p1t{backend.t}{more}"
        told += " would use all"
    return told


def print_line(text: str) -> None:
    print(text, flush=True)
