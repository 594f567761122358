"""Preference losses and implicit rewards: four log-prob tensors in, one loss per pair out.

Shape legend: P = pairs. Every tensor is (P,), summed log-probs of a whole response in nats; float64 is
what the engine passes, any floating dtype works and is kept. Nothing here reduces over pairs, knows a
config, a model or a process group.

    x  = log-ratio difference = (pc - rc) - (pr - rr)        Rafailov et al. 2023 (DPO), eq. 7
    xm = the same with each log-ratio divided by its response's number of scored tokens

    sigmoid       -(1-e) log sigma(beta x) - e log sigma(-beta x)            eq. 7; e: label smoothing, cDPO
    robust        (-(1-e) log sigma(beta x) + e log sigma(-beta x)) / (1-2e) Chowdhury et al. 2024, eq. 12
    hinge         relu(1 - beta x)                                           Zhao et al. 2023 (SLiC)
    ipo           (xm - 1 / (2 beta))^2                                      Azar et al. 2023, eq. 17, per-token mean
    sigmoid_norm  -log sigma(beta xm)                                        length-normalised DPO
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.loss_types import LOSS_TYPES, NEEDS_LENGTHS, SMOOTHED


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    chosen_lens: Tensor | None = None,
    rejected_lens: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, unreduced; formulas and sources in the module's docstring.

    Args:
        policy_chosen_logps: log pi(y_w | x), summed over scored tokens, nats. Shape: (P,)
        policy_rejected_logps: log pi(y_l | x). Shape: (P,)
        ref_chosen_logps: log ref(y_w | x). Shape: (P,)
        ref_rejected_logps: log ref(y_l | x). Shape: (P,)
        beta: strength of the pull towards the reference, > 0.
        loss_type: one of `LOSS_TYPES`.
        chosen_lens: scored tokens of the chosen response, needed by `ipo` and `sigmoid_norm`. Shape: (P,)
        rejected_lens: the same for the rejected response. Shape: (P,)
        label_smoothing: assumed share of swapped labels, 0 <= e < 0.5; only `sigmoid` and `robust` have one.

    Returns:
        Loss per pair. Shape: (P,). With policy = reference: ln 2 (sigmoid, robust, sigmoid_norm), 1 (hinge),
        (1 / (2 beta))^2 (ipo).

    Raises:
        ValueError: unknown `loss_type`, `beta` not positive, smoothing where it has no meaning, lengths missing.
    """
    _check(beta, loss_type, chosen_lens, rejected_lens, label_smoothing)
    chosen_logratio = policy_chosen_logps - ref_chosen_logps
    rejected_logratio = policy_rejected_logps - ref_rejected_logps
    if loss_type in NEEDS_LENGTHS:
        assert chosen_lens is not None
        assert rejected_lens is not None
        chosen_logratio = chosen_logratio / chosen_lens.clamp(min=1)
        rejected_logratio = rejected_logratio / rejected_lens.clamp(min=1)
    x = chosen_logratio - rejected_logratio
    if loss_type == "ipo":
        return (x - 1 / (2 * beta)) ** 2
    x = beta * x
    if loss_type == "hinge":
        return torch.relu(1 - x)
    if loss_type == "sigmoid_norm":
        return -F.logsigmoid(x)
    right, wrong = -F.logsigmoid(x), -F.logsigmoid(-x)
    if loss_type == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def implicit_rewards(policy_logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """beta * (log pi - log ref), summed over the response, without gradient (DPO, section 5). Shape: (P,)"""
    return beta * (policy_logps - ref_logps).detach()


def _check(
    beta: float,
    loss_type: str,
    chosen_lens: Tensor | None,
    rejected_lens: Tensor | None,
    label_smoothing: float,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type = {loss_type!r} is not one of {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta = {beta!r} must be greater than 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing!r} must be at least 0 and below 0.5")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing = {label_smoothing!r} has no meaning for loss_type {loss_type!r}; "
            f"use 0 or one of {', '.join(SMOOTHED)}"
        )
    if loss_type in NEEDS_LENGTHS and (chosen_lens is None or rejected_lens is None):
        raise ValueError(f"loss_type {loss_type!r} needs chosen_lens and rejected_lens")
