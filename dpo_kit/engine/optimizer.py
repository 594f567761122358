"""AdamW, its update, and an AdamW whose two states are bfloat16: 4 bytes a parameter instead of 8.

Rounding to nearest would freeze the second moment: with beta2 = 0.999 a step moves it by about a thousandth, and
neighbouring bfloat16 numbers are 4 to 8 thousandths apart. So both states are rounded up or down at random, in
proportion to how near each neighbour is, and are right on average. Weights and arithmetic keep the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_kit.config.schema import OptimizerConfig
from dpo_kit.model.parallel import grad_norm, masters, publish


def round_stochastically(values: Tensor) -> Tensor:
    """bfloat16 neighbours of fp32 values, the nearer one more often: right on average."""
    bits = values.float().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose exp_avg and exp_avg_sq are bfloat16, rounded stochastically.

    Reads `grad_scale` (gradients are divided by it) and `found_inf` (1: nothing changes) as torch's fused
    AdamW does, so that a step never waits for the device.

    Args:
        params: weights, also sharded ones.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state |= first_state(param, torch.bfloat16)
        weight, grad, m, v = map(local, (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        if not weight.numel():
            return
        skip = self.found_inf.bool() if self.found_inf is not None else torch.zeros_like(state["step"]).bool()
        grad = grad / self.grad_scale if self.grad_scale is not None else grad
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["step"] += ~skip
        new_m = m.to(grad.dtype).lerp_(grad, 1 - beta1)
        new_v = v.to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (new_v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        change = new_m / (1 - beta1 ** state["step"]) / root + group["weight_decay"] * weight
        weight.sub_(torch.where(skip, 0.0, lr * change))
        m.copy_(torch.where(skip, m, round_stochastically(new_m)))
        v.copy_(torch.where(skip, v, round_stochastically(new_v)))


def first_state(param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """AdamW's state of a weight before its first step, by the names that torch gives it; the moments in `dtype`."""
    moments = {name: torch.zeros_like(param.detach(), dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=param.device), **moments}


def local(tensor: Tensor | None) -> Tensor:
    """This rank's rows of a tensor that may be sharded; shares its memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- one update ----------------------------------------------------------------------------------------------


def make_optimizer(policy: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as configured, over the policy's master weights: torch's fused one, or `LeanAdamW`."""
    params = list(masters(policy).values())
    given: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    if options.state_dtype == "bfloat16":
        return LeanAdamW(params, **given)
    return torch.optim.AdamW(params, fused=True, **given)


def update(policy: nn.Module, optimizer: torch.optim.Optimizer, *, lr: float, clip: float) -> Tensor:
    """Changes the weights by the gradients at hand. Nothing in it waits for the device.

    Args:
        lr: of this update.
        clip: largest norm that the gradients keep.

    Returns:
        The global gradient norm before clipping, a scalar. When it is not finite, no weight and no optimizer state
        has changed, on any rank.
    """
    (group,) = optimizer.param_groups
    group["lr"] = lr
    norm = grad_norm(group["params"])
    if norm.dtype == torch.float64:
        torch.nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
    else:  # The optimizer divides by a scale in fp32: no pass over the gradients of its own.
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    publish(policy)
    return norm
