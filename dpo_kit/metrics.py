"""Names, units and direction of every number a run records, and how sums over pairs become them.

The names are the seed's (`dpo/loss`, ...); charts, tables, sweeps and exports read them from here, so that
a metric is spelled in one place. Values live in `metrics.jsonl`; this module neither reads nor writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One recorded number: `better` is "higher", "lower" or None where neither is better as such."""

    name: str
    title: str
    unit: str
    better: str | None


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("dpo/loss", "loss", "nats (ipo: squared)", "lower"),
        Metric("dpo/chosen_reward", "chosen reward", "nats x beta", "higher"),
        Metric("dpo/rejected_reward", "rejected reward", "nats x beta", "lower"),
        Metric("dpo/reward_accuracy", "reward accuracy", "share of pairs", "higher"),
        Metric("dpo/reward_margin", "reward margin", "nats x beta", "higher"),
        Metric("dpo/chosen_logps", "chosen log-prob", "nats a response", None),
        Metric("dpo/rejected_logps", "rejected log-prob", "nats a response", None),
        Metric("dpo/logp_accuracy", "log-prob accuracy", "share of pairs", "higher"),
        Metric("lr", "learning rate", "", None),
        Metric("grad_norm", "gradient norm before clipping", "", None),
        Metric("tokens_per_second", "data tokens per second", "tokens/s", "higher"),
        Metric("pairs_per_second", "pairs per second", "pairs/s", "higher"),
        Metric("step_s", "time of a step", "s", "lower"),
    )
}

SEED_NAMES = (
    "dpo/loss",
    "dpo/chosen_reward",
    "dpo/rejected_reward",
    "dpo/reward_accuracy",
    "dpo/reward_margin",
)

# A margin of log-ratios up to this is rounding: float32 sums of one response differ by up to about 2e-5 nats
# between two packings of the same batch, and policy = reference must not be read as a preference.
TIE_NATS = 1e-4

# What one micro-batch adds up, in this order, in one float64 vector: a step crosses the ranks once.
SUMS = (
    "pairs",
    "loss",
    "chosen_reward",
    "rejected_reward",
    "wins",
    "ties",
    "chosen_logps",
    "rejected_logps",
    "logp_wins",
    "data_tokens",
    "run_tokens",
    "stop",
)


def means(sums: Sequence[float], prefix: str) -> dict[str, float | None]:
    """Turns sums over pairs (in the order of `SUMS`) into the recorded means.

    The accuracy is `None` (undefined) when every pair is a tie: before the first update policy and
    reference are equal, and "0 %" would be read as a wrong preference.
    """
    s = dict(zip(SUMS, sums, strict=True))
    n = s["pairs"]
    if n <= 0:
        raise ValueError("means of no pair")
    return {
        f"{prefix}/loss": s["loss"] / n,
        f"{prefix}/chosen_reward": s["chosen_reward"] / n,
        f"{prefix}/rejected_reward": s["rejected_reward"] / n,
        f"{prefix}/reward_accuracy": None if s["ties"] >= n else s["wins"] / n,
        f"{prefix}/reward_margin": (s["chosen_reward"] - s["rejected_reward"]) / n,
        f"{prefix}/chosen_logps": s["chosen_logps"] / n,
        f"{prefix}/rejected_logps": s["rejected_logps"] / n,
        f"{prefix}/logp_accuracy": s["logp_wins"] / n,
    }
