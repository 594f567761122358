"""What no single field can tell: fields that contradict each other, `actor.backend` spelled out, names of runs.

Deliberately not here: anything that needs the machine, the data or a tokenizer; the launcher and the
data room check those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from dpo_kit.config.schema import ALL_LINEAR, Config
from dpo_kit.config.values import show
from dpo_kit.errors import ConfigError
from dpo_kit.loss_types import SMOOTHED
from dpo_kit.redaction import found_in


def check(config: Config) -> None:
    """Check a configuration whose fields are all well typed, e.g. after the launcher filled in the devices.

    Raises:
        ConfigError: with every contradiction.
    """
    problems = contradictions(config)
    if problems:
        raise ConfigError(problems)


def contradictions(config: Config, bad: Collection[str] = ()) -> list[str]:
    """One line for each contradiction.

    Args:
        config: the configuration, every field of the right type.
        bad: dotted fields that are wrong in themselves; nothing is said about them a second time.
    """

    def fine(*names: str) -> bool:
        return not any(name == b or name.startswith(b + ".") for name in names for b in bad)

    problems: list[str] = []
    parts = (_names, _secrets, _loss, _reference, _pair_granularity, _parallel, _lora, _data, _precision)
    for part in parts:
        problems += part(config, fine)
    return problems


Fine = Callable[..., bool]


def _names(config: Config, fine: Fine) -> Iterator[str]:
    names = {"experiment_name": config.experiment_name, "trial_name": config.trial_name}
    for field, name in names.items():
        if name is not None and fine(field) and (wrong := name_problem(name)):
            yield f"{field} = {show(name)} {wrong}"


def name_problem(name: str) -> str | None:
    """What is wrong with the name of an experiment or trial, which is a folder of its own; None when fine."""
    if not name:
        return "is empty; give a name"
    if len(name) > 128 or len(name.encode(errors="replace")) > 200:
        return f"is {len(name)} characters long; use at most 128 (200 bytes)"
    if "/" in name or "\\" in name or ".." in name:
        return "is a path; it names one folder, so leave out '/', '\\' and '..'"
    if name[0] in "-.~":
        return f"starts with {name[0]!r}; start with a letter or digit"
    if not name.isprintable() or name != name.strip():
        return "has control characters or white space at an end; leave them out"
    return None


def _secrets(config: Config, fine: Fine) -> Iterator[str]:
    """The run folder keeps the configuration, so no value may hold a secret."""

    def texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from texts(inner, f"{field}.{key}" if field else key)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from texts(inner, field)

    for field, text in texts(dataclasses.asdict(config), ""):
        if fine(field) and (secret := found_in(text)):
            yield f"{field} holds {secret}; the run folder keeps the configuration: take it out of the value"


def _loss(config: Config, fine: Fine) -> Iterator[str]:
    actor = config.actor
    fits = not actor.label_smoothing or actor.loss_type in SMOOTHED
    if fine("actor.loss_type", "actor.label_smoothing") and not fits:
        yield (
            f"actor.label_smoothing = {actor.label_smoothing} has no meaning for actor.loss_type = "
            f"{actor.loss_type!r}; use 0, or a loss_type of {' or '.join(SMOOTHED)}"
        )


def _reference(config: Config, fine: Fine) -> Iterator[str]:
    if fine("ref.optimizer") and config.ref.optimizer is not None:
        yield (
            f"ref.optimizer = {show(config.ref.optimizer)} must be null: the reference is frozen "
            "(settings of the policy's optimizer go into actor.optimizer)"
        )


def _pair_granularity(config: Config, fine: Fine) -> Iterator[str]:
    for section in ("actor", "ref"):
        field = f"{section}.mb_spec.granularity"
        value = getattr(config, section).mb_spec.granularity
        if fine(field) and value != 2:
            yield (
                f"{field} = {value} must be 2: a chosen and a rejected response are scheduled as one pair, "
                "never apart"
            )


def _backend(field: str, text: str) -> tuple[Backend | None, list[str]]:
    """The parsed backend and its own problems, as lines that name the field."""
    try:
        backend = parse_backend(text)
    except ConfigError as error:
        return None, [
            f"{field} = {problem.removeprefix('backend ').replace(': ', ' is wrong: ', 1)}"
            for problem in error.problems
        ]
    if backend.p != 1:
        d = f"fsdp:d{backend.d * backend.p}"
        return None, [
            f"{field} = {text!r}: p must be 1, because fsdp shards every layer over all its ranks and has no "
            f"pipeline stages; for the same {backend.d * backend.p} ranks use {d}"
            + (f"t{backend.t}" if backend.t > 1 else "")
        ]
    return backend, []


def _parallel(config: Config, fine: Fine) -> Iterator[str]:
    cluster = config.cluster
    if fine("cluster.n_nodes", "scheduler.type") and cluster.n_nodes > 1 and config.scheduler.type == "local":
        yield (
            f"cluster.n_nodes = {cluster.n_nodes} needs more than one machine, and scheduler.type = 'local' "
            "is one; use scheduler.type=ray (or slurm, torchrun), or cluster.n_nodes=1"
        )
    if not fine("actor.backend"):
        return
    backend, problems = _backend("actor.backend", config.actor.backend)
    yield from problems
    if backend is None:
        return
    if fine("cluster.n_nodes") and backend.explicit and backend.world_size < cluster.n_nodes:
        yield (
            f"actor.backend = {config.actor.backend!r} has {backend.world_size} ranks for cluster.n_nodes ="
            f" {cluster.n_nodes}; use fsdp:d{cluster.n_nodes} or more, or fewer nodes"
        )
    if fine("ref.backend"):
        yield from _same_ranks(config, backend)
    pairs = config.train_dataset.batch_size
    if fine("train_dataset.batch_size") and pairs < backend.d:
        yield (
            f"train_dataset.batch_size = {pairs} is less than {backend.d} data-parallel ranks; "
            f"use {backend.d} or more"
        )
    if fine("cluster.n_nodes", "cluster.n_gpus_per_node") and isinstance(cluster.n_gpus_per_node, int):
        yield from _devices(config, backend)


def _same_ranks(config: Config, backend: Backend) -> Iterator[str]:
    ref, problems = _backend("ref.backend", config.ref.backend)
    yield from problems
    if ref is not None and ref != backend:
        yield (
            f"ref.backend = {config.ref.backend!r} differs from actor.backend = {config.actor.backend!r}: "
            "the reference shares the actor's ranks; use ${actor.backend}"
        )


def _devices(config: Config, backend: Backend) -> Iterator[str]:
    cluster = config.cluster
    assert isinstance(cluster.n_gpus_per_node, int)
    devices = cluster.n_nodes * cluster.n_gpus_per_node
    if 0 < devices < backend.world_size:
        yield (
            f"actor.backend = {config.actor.backend!r} needs {backend.world_size} ranks, more than the "
            f"{devices} devices of cluster.n_nodes = {cluster.n_nodes} times cluster.n_gpus_per_node = "
            f"{cluster.n_gpus_per_node}; use fsdp:d{devices}, or cluster.n_gpus_per_node=0 for CPU ranks"
        )


def _lora(config: Config, fine: Fine) -> Iterator[str]:
    actor, targets = config.actor, config.actor.target_modules
    if not fine("actor.use_lora"):
        return
    if fine("saver.merged") and config.saver.merged and not actor.use_lora:
        yield (
            "saver.merged = true merges adapters into their base and actor.use_lora = false trains none; use "
            "actor.use_lora=true, or saver.merged=false"
        )
    if fine("actor.target_modules") and ALL_LINEAR in targets and len(targets) > 1:
        yield (
            f"actor.target_modules = {show(targets)} names all linear layers and others beside them; use "
            f"[{ALL_LINEAR}], or the others alone"
        )
    if not actor.use_lora or not fine("actor.backend"):
        return
    with contextlib.suppress(ConfigError):  # a backend that cannot be read is told by `_parallel`
        backend = parse_backend(actor.backend)
        if backend.t > 1:
            yield (
                f"actor.backend = {actor.backend!r}: adapters (actor.use_lora = true) are not cut over "
                f"tensor-parallel ranks (t = {backend.t}); use fsdp:d{backend.world_size}, or actor.use_lora=false"
            )


def _data(config: Config, fine: Fine) -> Iterator[str]:
    valid = config.valid_dataset
    if fine("saver.best", "valid_dataset") and config.saver.best and valid is None:
        yield "saver.best = true chooses by held-out pairs; add a valid_dataset, e.g. {from_train: 0.05}"
    if valid is None or not fine("valid_dataset.path", "valid_dataset.from_train"):
        return
    if valid.path and valid.from_train is not None:
        yield (
            f"valid_dataset.path = {show(valid.path)} and valid_dataset.from_train = {valid.from_train} "
            "exclude each other; set one of them to null"
        )
    if not valid.path and valid.from_train is None:
        yield (
            "valid_dataset.path is missing; give a path, or from_train: 0.05 to hold out 5 % of the training "
            "prompts"
        )


def _precision(config: Config, fine: Fine) -> Iterator[str]:
    gpus = config.cluster.n_gpus_per_node
    if not fine("cluster.n_gpus_per_node") or gpus in ("auto", 0):
        return
    for section in ("actor", "ref"):
        field = f"{section}.dtype"
        if fine(field) and getattr(config, section).dtype == "float64":
            yield (
                f"{field} = 'float64' runs on CPU ranks only and cluster.n_gpus_per_node = {gpus}; use "
                "float32 or bfloat16, or cluster.n_gpus_per_node=0"
            )


@dataclass(frozen=True)
class Backend:
    """A parsed backend: `kind` and the sizes of the data (d), pipeline (p) and tensor (t) dimension.

    `explicit` is False when no size was written: every device is taken.
    """

    kind: str
    d: int = 1
    p: int = 1
    t: int = 1
    explicit: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks, d * p * t."""
        return self.d * self.p * self.t

    def __str__(self) -> str:
        return f"{self.kind}:d{self.d}p{self.p}t{self.t}" if self.explicit else self.kind


def parse_backend(text: str) -> Backend:
    """Read `fsdp` or `fsdp:dNpNtN`: the sizes in any order, each optional and 1 when left out.

    Raises:
        ConfigError: another kind, a size of 0, a size given twice, anything else behind the colon.
    """
    form = "write fsdp, or fsdp:dNpNtN with sizes of 1 or more, in any order, each optional (fsdp:d8p1t1)"
    kind, colon, sizes = text.strip().partition(":")
    if kind != "fsdp":
        raise ConfigError([f"backend {text!r}: {kind!r} is not a backend, only fsdp is; {form}"])
    if not colon:
        return Backend(kind, explicit=False)
    if not re.fullmatch(r"(?:[dpt][0-9]{1,9})+", sizes):
        raise ConfigError([f"backend {text!r}: {sizes!r} is not a list of sizes; {form}"])
    found: dict[str, int] = {}
    for letter, number in re.findall(r"([dpt])([0-9]+)", sizes):
        if letter in found:
            raise ConfigError([f"backend {text!r}: {letter} is given twice; {form}"])
        if number != str(int(number)):
            plain = f"{letter}{int(number)}"
            raise ConfigError([f"backend {text!r}: {letter} = {number} has a leading zero; write {plain}"])
        if int(number) < 1:
            raise ConfigError([f"backend {text!r}: {letter} = {number} leaves no rank; {form}"])
        found[letter] = int(number)
    return Backend(kind, d=found.get("d", 1), p=found.get("p", 1), t=found.get("t", 1))
