"""Layers split over the ranks of a tensor-parallel group: blocks by the model's own plan, the rest by vocabulary.

Shape legend: t = ranks of the group, T = tokens of a row, D = hidden size, V = vocabulary.

    embedding        V / t words on each rank: what it holds, else 0      summed over the ranks: (T, D) on all
    block, colwise   a t-th of the outputs on each rank (whole heads)     the gradient of its input is summed
    block, rowwise   a t-th of the inputs on each rank                    summed over the ranks: (T, D) on all
    head             V / t words on each rank                             `logprobs.token_logps`

A block costs two sums of (T, D) in the forward and two in the backward. Every weight becomes a DTensor over the
group, split or the same on all, and modules compute with their local tensors; FSDP2 then shards what a rank holds
over the data-parallel ranks. What stands between the blocks is the same on all ranks of a group, and so are the
gradients of weights that are not split; those of weights on a split layer's own heads (norms of Qwen3) are summed.

Not here: which models can be split (`split_sizes`), FSDP2 (`parallel`).
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dpo_kit.model.logprobs import own_targets

COLWISE, ROWWISE, ON_HEADS = "colwise", "rowwise", "replicated_with_grad_allreduce"


def split(lm: Any, mesh: DeviceMesh) -> None:
    """Splits a causal language model over the ranks of a group, in place, before FSDP2.

    Args:
        lm: of transformers, its head a `LogprobHead`, on any device, also meta; `split_sizes` has no objection.
        mesh: the group, of one dimension.

    Raises:
        ValueError: the model's plan splits a layer in a way that is not known here.
    """
    group, body = mesh.get_group(), lm.model
    plan = {re.sub(r"\d+", "*", name): style for name, style in (lm.config.base_model_tp_plan or {}).items()}
    if unknown := set(plan.values()) - {COLWISE, ROWWISE, ON_HEADS}:
        raise ValueError(f"{lm.config.model_type}: its plan of tensor parallelism has {sorted(unknown)}")
    is_tied = lm.lm_head.weight is body.embed_tokens.weight
    styles = {name: plan.get(re.sub(r"\d+", "*", name)) for name, _ in body.named_modules()}
    split_layers = {name.rpartition(".")[0] for name, style in styles.items() if style == COLWISE}
    for name, module in body.named_modules():
        style = styles[name]
        if style == COLWISE:
            _take_over(module, mesh, _plainly, {"weight": Shard(0), "bias": Shard(0)})
        elif style == ROWWISE:
            _take_over(module, mesh, _rowwise, {"weight": Shard(1)})
        elif module is body.embed_tokens:
            _take_over(module, mesh, _embed, {"weight": Shard(0)})
        elif module._parameters:
            _take_over(module, mesh, _on_heads if name.rpartition(".")[0] in split_layers else _plainly, {})
    for name in split_layers:
        body.get_submodule(name).register_forward_pre_hook(_sum_gradient_of_input(group), with_kwargs=True)
    if is_tied:
        lm.lm_head.weight = body.embed_tokens.weight
    _take_over(lm.lm_head, mesh, _plainly, {"weight": Shard(0)})


def _take_over(module: Any, mesh: DeviceMesh, forward: Any, placements: dict[str, Any]) -> None:
    """Makes DTensors of a module's own parameters (the same on all ranks where nothing is said), and runs `forward`."""
    for name, param in module._parameters.items():
        if param is not None and not isinstance(param, DTensor):
            made = distribute_tensor(param, mesh, [placements.get(name, Replicate())], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(made, requires_grad=param.requires_grad))
    module.group = mesh.get_group()
    module.forward = types.MethodType(forward, module)


# --- forwards ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _local_tensors(module: nn.Module, summed: Any = None) -> Iterator[None]:
    """The module's own parameters are this rank's parts; their gradients are summed over the ranks of `summed`."""
    held = dict(module._parameters)
    try:
        for name, param in held.items():
            if isinstance(param, DTensor):
                local = param.to_local()
                module._parameters[name] = local if summed is None else _SumInBackward.apply(local, summed)
        yield
    finally:
        module._parameters.update(held)


def _plainly(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _local_tensors(self):
        return type(self).forward(self, *args, **kwargs)


def _on_heads(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a layer that sees this rank's heads only, with weights that are the same for all heads."""
    with _local_tensors(self, self.group):
        return type(self).forward(self, *args, **kwargs)


def _rowwise(self: Any, x: Tensor) -> Tensor:
    with _local_tensors(self):
        out = _Sum.apply(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias


def _embed(self: Any, ids: Tensor) -> Tensor:
    with _local_tensors(self):
        num_words = len(self.weight)
        index, is_mine = own_targets(ids, num_words, self.group)
        padding = None if self.padding_idx is None else self.padding_idx - num_words * self.group.rank()
        padding = padding if padding is not None and 0 <= padding < num_words else None
        return _Sum.apply(F.embedding(index, self.weight, padding) * is_mine[..., None], self.group)


# --- what crosses the ranks -----------------------------------------------------------------------------------------


def _sum_gradient_of_input(group: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_SumInBackward.apply(args[0], group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _SumInBackward.apply(kwargs["hidden_states"], group)}

    return hook


class _SumInBackward(torch.autograd.Function):
    """The tensor as it is; its gradient is the sum of what the ranks' parts give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # others may hold it, too
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()  # selective recomputation may have kept x for the backward
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
