"""Ranks, devices and FSDP2 sharding; the same calls on gloo (CPU) and NCCL (CUDA).

    ranks   0 1 | 2 3 | 4 5      d3t2: neighbours share a layer (`tp`) and run the same pairs;
    dp_rank  0  |  1  |  2       weights are split over `tp`, and what a rank then holds is sharded over `dp`

What is sharded and in which order: the embedding, [norm, lm_head] in one group (with the embedding too when
weights are tied), each decoder block, then the root. Master weights stay in fp32 (float64 when asked for),
blocks compute in `dtype`, gradients are summed, never averaged, in fp32 or better: the loss is already divided
by the global number of pairs.

One rank shards nothing: FSDP2 would copy every weight and every gradient in each micro-batch (a quarter of a
step's time on a CPU). There the model holds its weights in `dtype` and, where they are trained in fp32, a master
beside each (`add_masters`, `publish`). Both ways give the same bits.

Not here: starting processes (supervise), what is computed (engine).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    `rank` of `size` counts all of them: who writes, who fails together, over whom weights are sharded. `dp_rank` of
    `dp_size` tells whose pairs are whose, `tp_rank` of `tp_size` whose part of each layer.

    Args:
        mesh: its dimension `dp` holds the data-parallel ranks, its dimension `tp`, where there is one, those that
            share each layer.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.mesh["dp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        return self.mesh["dp"].size()

    @property
    def tp_rank(self) -> int:
        return self.mesh["tp"].get_local_rank() if self.tp_size > 1 else 0

    @property
    def tp_size(self) -> int:
        return self.mesh["tp"].size() if "tp" in (self.mesh.mesh_dim_names or ()) else 1

    def sum(self, values: Tensor) -> Tensor:
        """Sums what the data-parallel ranks have of their pairs, in place; every rank gets the same bits.

        Ranks that share their pairs have them all: the first of them counts.
        """
        if self.tp_rank:
            values.zero_()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank; reduced on the CPU, so that nobody waits for a device."""
        found = torch.tensor(float(flag))
        if self.size > 1:
            dist.all_reduce(found)
        return bool(found > 0)

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def of_main(self, value: Any) -> Any:
        """A plain value or an array of rank 0, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()


def init_world(*, cuda: bool, init_method: str | None = None, tp_size: int = 1) -> World:
    """Joins the process group of the run; rank and size come from RANK and WORLD_SIZE.

    Args:
        tp_size: neighbouring ranks that share each layer; divides the number of ranks.
        cuda: NCCL on the device LOCAL_RANK, else gloo on the CPU.
        init_method: torch.distributed address, by preference `file://...`, which opens no port.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    shape, names = ((size // tp_size, tp_size), ("dp", "tp")) if tp_size > 1 else ((size,), ("dp",))
    return World(rank, size, device, init_device_mesh(device.type, shape, mesh_dim_names=names))


@contextlib.contextmanager
def alone(*, cuda: bool) -> Iterator[World]:
    """A process group of this process; the environment is put back, for this may be a notebook or a test."""
    mine = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield init_world(cuda=cuda, init_method=f"file://{folder}/init")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Applies FSDP2 over the data-parallel ranks to a `pair_model.PairModel`, in place.

    Args:
        model: a module whose `.lm` is a transformers causal language model, on any device, also meta, its
            weights in the dtype of the masters.
        dtype: what the blocks compute in.
    """
    # Gradients are reduced in fp32 (float64 stays float64).
    reduce_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
    options: dict[str, Any] = {"mesh": world.mesh["dp"], "mp_policy": precision}
    lm: Any = model.lm
    body = getattr(lm, "model", None)
    # A model of another family may be built otherwise: then the root alone is sharded.
    known = all(hasattr(body, name) for name in ("embed_tokens", "norm", "layers")) and hasattr(lm, "lm_head")
    if known:
        _shard_parts(lm, options)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            with contextlib.suppress(AttributeError):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _shard_parts(lm: Any, options: dict[str, Any]) -> None:
    body = lm.model
    if lm.lm_head.weight is body.embed_tokens.weight:
        fully_shard([body.embed_tokens, body.norm, lm.lm_head], reshard_after_forward=False, **options)
    else:
        # Its backward needs no weight, and FSDP2 would gather it again for it.
        fully_shard(body.embed_tokens, reshard_after_forward=False, **options)
        fully_shard([body.norm, lm.lm_head], reshard_after_forward=False, **options)
    for block in body.layers:
        fully_shard(block, reshard_after_forward=True, **options)


def add_masters(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives each trained weight of a model of one rank a master in `dtype`, empty, which collects its gradients."""
    for param in (p for p in model.parameters() if p.requires_grad):
        param.master = nn.Parameter(torch.empty_like(param, dtype=dtype))  # type: ignore[attr-defined]
        param.register_post_accumulate_grad_hook(_hand_over)


def _hand_over(param: Tensor) -> None:
    master: nn.Parameter = param.master  # type: ignore[attr-defined]
    assert param.grad is not None
    if master.grad is None:
        master.grad = param.grad.to(master.dtype)
    else:
        master.grad.add_(param.grad)
    param.grad = None


@torch.no_grad()
def publish(model: nn.Module) -> None:
    """Copies the masters that an optimizer has changed into the weights that the model computes with."""
    pairs = [(p, p.master) for p in model.parameters() if hasattr(p, "master")]
    if pairs:
        torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def reshard(model: nn.Module) -> None:
    """Frees the gathered weights that a forward without backward leaves behind.

    Until then `model.parameters()` are the gathered copies in the compute dtype, not the master weights:
    an optimizer made or weights written at that moment would miss the masters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(param: Tensor) -> tuple[slice, ...]:
    """What of the whole tensor this rank holds: rows and, where tensor parallelism cuts them, columns."""
    part = [slice(0, size) for size in param.shape]
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        # Cut over `tp` first, then what is left over `dp`, as FSDP2 cuts: the last ranks may hold fewer rows or none.
        for dim in reversed(range(mesh.ndim)):
            if (at := getattr(param.placements[dim], "dim", None)) is not None:
                start, stop = part[at].start, part[at].stop
                size = -(-(stop - start) // mesh.size(dim))
                first = min(stop, start + size * mesh.get_local_rank(dim))
                part[at] = slice(first, min(stop, first + size))
    return tuple(part)


@torch.no_grad()
def copy_into(param: Tensor, whole: Any) -> None:
    """Copies a whole tensor into a parameter that may be sharded or have a master: each rank takes its own part.

    Args:
        whole: a tensor, or a slice of a safetensors file, which reads what it is asked for.
    """
    part = whole[own_part(param)]
    if isinstance(param, DTensor):
        param.to_local().copy_(part)
        return
    param.copy_(part)
    if hasattr(param, "master"):
        param.master.copy_(part)


def full_tensor(param: Tensor) -> Tensor:
    """The whole tensor of a parameter that may be sharded. A collective: every rank calls it."""
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def masters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer changes, by name; see `weights`."""
    return {name: param for name, param in weights(model).items() if param.requires_grad}


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights as they are kept, by name, tied ones once: sharded ones, masters, or those computed with."""
    reshard(model)
    params = dict(model.named_parameters(remove_duplicate=True))
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    assert all(isinstance(p, DTensor) == is_sharded for p in params.values()), (
        "gathered weights are no masters"
    )
    return {name: getattr(p, "master", p) for name, p in params.items()}


def grad_norm(params: Sequence[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients, before clipping; a scalar on the device, without a host sync."""
    grads = [p.grad for p in params if p.grad is not None]
    if grads and isinstance(grads[0], DTensor) and grads[0].device_mesh.ndim > 1:
        return _norm_over_mesh(grads)
    return full_tensor(torch.nn.utils.get_total_norm(grads))


def _norm_over_mesh(grads: Sequence[Any]) -> Tensor:
    """The same of gradients that are cut twice; those that all ranks of `tp` hold alike count once."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].to_local().device)
    for is_cut in (True, False):
        parts = [grad.to_local() for grad in grads if grad.placements[1].is_replicate() != is_cut]
        squares = torch.stack(torch._foreach_norm(parts)).double().square()
        total += squares.sum() / (1 if is_cut else grads[0].device_mesh.size(1))
    dist.all_reduce(total)
    return total.sqrt().to(parts[0].dtype)
