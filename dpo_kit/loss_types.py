"""The names of the losses, and what each is worth before any update; without torch, for settings and charts.

Deliberately not here: the losses themselves (losses).
"""

from __future__ import annotations

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")
SMOOTHED = ("sigmoid", "robust")  # label_smoothing has a meaning in these
NEEDS_LENGTHS = ("ipo", "sigmoid_norm")


def loss_at_reference(loss_type: str, beta: float) -> float:
    """What `preference_loss` gives for every pair while policy and reference are equal."""
    if loss_type == "ipo":
        return (1 / (2 * beta)) ** 2
    return 1.0 if loss_type == "hinge" else 0.6931471805599453
