"""What a run's records say: accuracies with intervals, paired differences, and a reading of the curves.

Works on the files of a run folder (`evaluations/step-N.jsonl`, `samples.jsonl`) and on the records of
`metrics.jsonl`, with numpy alone.

Deliberately not here: baselines that need the answers' text (`baselines`), tables and charts (`tables`,
plots), anything that runs a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from dpo_kit.loss_types import loss_at_reference
from dpo_kit.records.metrics import TIE_NATS

UNDEFINED = "undefined (all ties)"

SPIKE, SPIKE_WINDOW = 5.0, 10


@dataclass(frozen=True)
class Share:
    """`correct` of `n` pairs, with its 95 % interval (Wilson 1927); undefined when every pair is a tie.

    `correct` may end in a half where a rule counts a tie as half a pair.
    """

    correct: float
    n: int
    ties: int = 0

    @property
    def defined(self) -> bool:
        return self.n > 0 and self.ties < self.n

    @property
    def value(self) -> float | None:
        return self.correct / self.n if self.defined else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.correct, self.n) if self.defined else None

    @property
    def percent(self) -> str:
        return f"{100 * self.correct / self.n:.1f} %" if self.defined else UNDEFINED

    @property
    def interval_percent(self) -> str:
        if self.interval is None:
            return ""
        low, high = self.interval
        return f"{100 * low:.1f} to {100 * high:.1f} %"


@dataclass(frozen=True)
class Paired:
    """Mean of `after` minus `before` on the same `n` items, with a 95 % paired t interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return (
            f"mean {self.before:.3f} before, {self.after:.3f} after; difference {self.difference:+.3f}, "
            f"95 % interval {self.low:+.3f} to {self.high:+.3f} (paired t, n = {self.n})"
        )


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (E. B. Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    centre (p + z^2/2n) / (1 + z^2/n), half width z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2).

    Raises:
        ValueError: when `n` is 0 or `correct` is not between 0 and `n`.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} of n = {n} is not a share; 0 <= correct <= n and n >= 1")
    z = NormalDist().inv_cdf(0.975)
    p, scale = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_quantile(probability: float, degrees: int) -> float:
    """The Student t quantile, without scipy.

    With x = sqrt(degrees) * tan(a) the density becomes proportional to cos(a)^(degrees - 1), which is
    integrated on a grid and inverted.
    """
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(probability, area / area[-1], angle)))


def paired_interval(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> Paired:
    """The mean difference of paired values with its 95 % t interval: d +- t(n-1) * sd(d) / sqrt(n).

    Raises:
        ValueError: when the two differ in length or hold fewer than two values.
    """
    b, a = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if b.shape != a.shape or b.ndim != 1 or b.size < 2:
        raise ValueError(f"paired values need two equal lists of 2 or more; got {b.size} and {a.size}")
    d = a - b
    half = t_quantile(0.975, d.size - 1) * float(d.std(ddof=1)) / math.sqrt(d.size)
    mean = float(d.mean())
    return Paired(float(b.mean()), float(a.mean()), mean, mean - half, mean + half, d.size)


def evaluation_steps(run_dir: Path) -> list[int]:
    """Steps that have an evaluation on disk, ascending; 0 is before training."""
    files = (Path(run_dir) / "evaluations").glob("*.jsonl")
    return sorted(int(found[1]) for file in files if (found := re.fullmatch(r"step-(\d+)\.jsonl", file.name)))


def read_evaluation(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """One evaluation as columns, in the order of the held-out pair store."""
    rows = read_lines(Path(run_dir) / "evaluations" / f"step-{step}.jsonl")
    return {key: np.asarray([row[key] for row in rows]) for key in rows[0]} if rows else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file as a list, without a torn last line; empty when there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def log_ratio_margins(evaluation: Mapping[str, np.ndarray]) -> np.ndarray:
    """(log pi - log ref) of chosen minus that of rejected, in nats; the reward margin is beta times it."""
    chosen = evaluation["policy_chosen_logps"] - evaluation["ref_chosen_logps"]
    return chosen - (evaluation["policy_rejected_logps"] - evaluation["ref_rejected_logps"])


def reward_accuracy(evaluation: Mapping[str, np.ndarray]) -> Share:
    """Share of pairs whose reward margin is above 0; a tie is not correct, all ties are undefined."""
    margins = log_ratio_margins(evaluation)
    tied = np.abs(margins) <= TIE_NATS
    return Share(float(np.sum((margins > 0) & ~tied)), len(margins), int(tied.sum()))


def is_tied(record: Mapping[str, Any], beta: float) -> bool:
    """Whether the rewards of a record of `metrics.jsonl` are all rounding: policy and reference are equal."""
    rewards = (record[f"dpo/{key}"] for key in ("chosen_reward", "rejected_reward", "reward_margin"))
    return max(map(abs, rewards)) <= TIE_NATS * beta


def logp_accuracy(evaluation: Mapping[str, np.ndarray], model: str = "policy") -> Share:
    """Share of pairs whose chosen response has the larger summed log-prob under `policy` or `ref`.

    Exists before training too, where rewards are all 0. A tie counts half.
    """
    return ranked(evaluation[f"{model}_chosen_logps"] - evaluation[f"{model}_rejected_logps"])


def ranked(differences: np.ndarray) -> Share:
    """The share of positive differences (chosen minus rejected); a tie counts half."""
    ties = int(np.sum(differences == 0))
    return Share(float(np.sum(differences > 0)) + ties / 2, len(differences), ties)


def score_samples(
    samples: Sequence[Mapping[str, Any]], score: Callable[[str, str], float]
) -> tuple[np.ndarray, np.ndarray]:
    """`score(prompt, answer)` of every sample, for the reference's and for the policy's answer."""
    before = [score(s["prompt"], s["reference"]) for s in samples]
    after = [score(s["prompt"], s["policy"]) for s in samples]
    return np.asarray(before, np.float64), np.asarray(after, np.float64)


def best_and_worst(scores: Sequence[float], k: int = 3) -> tuple[list[int], list[int]]:
    """Positions of the `k` highest scores (best first) and the `k` lowest (worst first), without overlap."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()
    k_best = min(k, (len(order) + 1) // 2)
    k_worst = min(k, len(order) - k_best)
    return order[:k_best], order[::-1][:k_worst]


def training_lines(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of optimizer steps among the records of `metrics.jsonl`."""
    return [r for r in records if "dpo/loss" in r]


def evaluation_lines(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of evaluations among the records of `metrics.jsonl`."""
    return [r for r in records if "dpo-eval/loss" in r]


def reading(records: Sequence[Mapping[str, Any]], *, loss_type: str, beta: float) -> list[str]:
    """Sentences that read the curves of one run: where it started, what moved, what to watch."""
    train = training_lines(records)
    if not train:
        return ["No optimizer step is recorded yet."]
    window = max(1, len(train) // 10)
    said = [_read_loss(train, window, loss_type, beta), *_read_rewards(train, window)]
    jumps = spikes(train)
    if jumps:
        shown = ", ".join(map(str, jumps[:8])) + (f" and {len(jumps) - 8} more" if len(jumps) > 8 else "")
        said.append(
            f"The gradient norm jumped at step{'s' * (len(jumps) > 1)} {shown} (over {SPIKE:g} times the median of the"
            f" {SPIKE_WINDOW} steps before); clipping held it, look at the data of those steps."
        )
    return [*said, *_read_evaluations(evaluation_lines(records))]


def spikes(train: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps whose gradient norm is over `SPIKE` times the median of the `SPIKE_WINDOW` steps before."""
    known = [(line["step"], norm) for line in train if (norm := line.get("grad_norm")) is not None]
    found = []
    for i in range(SPIKE_WINDOW, len(known)):
        if known[i][1] > SPIKE * np.median([norm for _, norm in known[i - SPIKE_WINDOW : i]]):
            found.append(int(known[i][0]))
    return found


def _last(lines: Sequence[Mapping[str, Any]], key: str, window: int) -> float:
    values = [v for line in lines if (v := line.get(key)) is not None][-window:]
    return float(np.mean(values)) if values else math.nan


def _read_loss(train: Sequence[Mapping[str, Any]], window: int, loss_type: str, beta: float) -> str:
    expected, first = loss_at_reference(loss_type, beta), train[0]["dpo/loss"]
    last = _last(train, "dpo/loss", window)
    known = {"ipo": "(1/(2 beta))^2", "hinge": "1"}.get(loss_type, "ln 2")
    where = f"{known} = {expected:.3f}, the value while policy and reference are equal"
    start = f"{first:.3f}"
    if abs(first - expected) <= 1e-3 * max(1.0, expected):
        start += f" ({where})"
    elif train[0]["step"] == 1:
        start += f" (expected {where}: look at the first-step check)"
    over = f"over the last {window} steps" if window > 1 else f"at step {train[-1]['step']}"
    return f"The loss starts at {start} and is {last:.3f} {over}."


def _read_rewards(train: Sequence[Mapping[str, Any]], window: int) -> list[str]:
    chosen, rejected = _last(train, "dpo/chosen_reward", window), _last(train, "dpo/rejected_reward", window)
    values = f"chosen {chosen:+.3f}, rejected {rejected:+.3f}, margin {chosen - rejected:+.3f}"
    if max(abs(chosen), abs(rejected)) < 1e-3:
        return [
            f"Rewards are stuck at 0 ({values}): the policy has hardly moved from the reference. "
            "More steps or a higher lr; a learning rate of 0 does exactly this."
        ]
    if chosen - rejected <= 0:
        return [f"The margin is not positive ({values}): the policy does not yet prefer the chosen answers."]
    if chosen < 0 and rejected < 0:
        return [
            f"Both rewards fell, the rejected one further ({values}). DPO only asks for the margin, so this "
            "is common; if the chosen log-prob keeps falling the answers drift: use fewer steps, a lower lr "
            "or a larger beta."
        ]
    if chosen > 0 > rejected:
        return [f"The chosen reward rose and the rejected one fell ({values}): the picture one hopes for."]
    return [f"Both rewards rose, the chosen one further ({values})."]


def _read_evaluations(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lines:
        return []
    last = lines[-1]
    accuracy = last.get("dpo-eval/reward_accuracy")
    ended = UNDEFINED if accuracy is None else f"{100 * accuracy:.1f} %"
    said = [f"On held-out pairs the reward accuracy ends at {ended} (step {last['step']})."]
    best = min(lines, key=lambda line: line["dpo-eval/loss"])
    if last["dpo-eval/loss"] > best["dpo-eval/loss"] * 1.05 + 1e-9:
        rose = f"({best['dpo-eval/loss']:.3f}) and rose to {last['dpo-eval/loss']:.3f}"
        if best["step"] == 0:
            said.append(
                f"The held-out loss was lowest before training {rose}: what was learned does not carry over; "
                "use a lower lr, fewer steps, or more pairs."
            )
        else:
            said.append(
                f"The held-out loss was lowest at step {best['step']} {rose}: later steps fit the training "
                "pairs only; saver.best keeps the better one."
            )
    return said
