"""The model card that lies beside exported weights: how they came to be, in plain Markdown.

Numbers and settings only, no text from the data. Not here: writing files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.findings import Finding

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = ("dpo/loss", "dpo/reward_margin", "dpo/reward_accuracy", "dpo/chosen_reward", "dpo/rejected_reward")


def sparkline(values: list[float], width: int = 48) -> str:
    """A curve as one line of text: means of `width` equal parts, drawn between their least and greatest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    parts = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(parts), max(parts) - min(parts)
    return "".join(BLOCKS[int((v - low) / span * (len(BLOCKS) - 1) + 0.5) if span else 0] for v in parts)


def model_card(config: Config, metrics: list[dict[str, Any]], found: Sequence[Finding] = ()) -> str:
    """Markdown of a run's settings, final numbers and curves.

    Args:
        metrics: the lines of `metrics.jsonl` so far.
        found: what a reader of the numbers should know.
    """
    steps = [m for m in metrics if "dpo/loss" in m]
    evaluations = [m for m in metrics if "dpo-eval/loss" in m]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [dpo, preference-optimization, dpo-kit]",
        "---",
        f"# {config.experiment_name}",
        "",
        f"`{config.actor.path}` trained on preference pairs of `{config.train_dataset.path}` with "
        f"[DPO](https://arxiv.org/abs/2305.18290) (`{config.actor.loss_type}`, beta {config.actor.beta:g}), "
        f"{len(steps)} step{'s' * (len(steps) != 1)}. Generation stops on the end token it was trained with.",
        "",
        *_findings(found),
        "## Curves",
        "",
        "| metric | first | last | over the steps |",
        "|---|---|---|---|",
    ]
    for name in CURVES:
        values = [m[name] for m in steps if m.get(name) is not None]
        if values:
            first = "undefined" if steps[0].get(name) is None else f"{values[0]:.4g}"
            lines.append(f"| `{name}` | {first} | {values[-1]:.4g} | `{sparkline(values)}` |")
    if evaluations:
        lines += [
            "",
            "## Held-out pairs",
            "",
            "| step | loss | reward accuracy | reward margin |",
            "|---|---|---|---|",
        ]
        for m in evaluations:
            accuracy = m["dpo-eval/reward_accuracy"]
            shown = "undefined (all ties)" if accuracy is None else f"{accuracy:.1%}"
            lines.append(
                f"| {m['step']} | {m['dpo-eval/loss']:.4f} | {shown} | {m['dpo-eval/reward_margin']:.4g} |"
            )
    lines += ["", "## Configuration", "", "```yaml", config_module.to_yaml(config).rstrip(), "```", ""]
    return "\n".join(lines)


def _findings(found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    return ["## What the checks found", "", *(f"- {finding.level}: {finding.text}" for finding in found), ""]
