"""The build report of a pair store: what was kept, what was dropped and why, lengths, what sharing saves.

`summarize` counts (the dict is kept in the store's `meta.json`), `format_report` prints.

Deliberately not here: building; the check of `max_dropped_share` (see `dataset.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_kit.preferences import PairStore
from dpo_kit.system.text import listed

POINTS = (50, 90, 99, 100)
BAD_ROWS_SHOWN = 3


def summarize(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Lengths, boundaries and token counts of a store's arrays, all in tokens.

    Response lengths count the tokens that are scored: from `prompt` on, without a first token that nothing
    predicts.
    """
    chosen, rejected = np.diff(arrays["chosen_offsets"]), np.diff(arrays["rejected_offsets"])
    shared, prompt = arrays["shared"].astype(np.int64), arrays["prompt"].astype(np.int64)
    first_scored = np.maximum(prompt, 1)
    plain = int(chosen.sum() + rejected.sum())
    run = plain - int(shared.sum())
    return {
        "lengths": {
            "chosen": _percentiles(chosen),
            "rejected": _percentiles(rejected),
            "chosen response": _percentiles(chosen - first_scored),
            "rejected response": _percentiles(rejected - first_scored),
            "shared (LCP)": _percentiles(shared),
            "prompt (scored from)": _percentiles(prompt),
        },
        "tokens": {"without_sharing": plain, "with_sharing": run, "ratio": round(plain / run, 4)},
    }


def shared_prompts(train: PairStore, valid: PairStore) -> int:
    """Number of pairs of `valid` whose prompt text is also a prompt of `train`."""
    return int(np.isin(valid.prompt_key, train.prompt_key).sum())


def format_report(store: PairStore, train: PairStore | None = None) -> str:
    """The report as a plain text table.

    Args:
        store: whose report.
        train: for a validation store, the training store: prompts that are in both are then counted.
    """
    report = store.report
    lines = [
        f"pairs      {report['source']}",
        f"layout     {report['layout']}; tokenizer {report['tokenizer']}; max_length {report['max_length']}",
        f"rows       {report['rows']:,}: kept {report['kept']:,}{_dropped(report)}",
    ]
    lines += [f"           {count:,} {what}" for what, count in report["notes"].items() if count]
    bad = report.get("unusable_rows", [])
    lines += [f"unusable   {problem}" for problem in bad[:BAD_ROWS_SHOWN]]
    if len(bad) > BAD_ROWS_SHOWN:
        lines.append(f"           all are named in {store.path / 'meta.json'}")
    if report["unused_columns"]:
        lines.append(f"not used   columns {listed(report['unused_columns'])}")
    if train is not None:
        count = shared_prompts(train, store)
        lines.append(f"leak       {count:,} of {len(store):,} pairs have a prompt that is also in training")
    lines += ["", f"{'tokens':<22}" + "".join(f"{_point(p):>8}" for p in POINTS)]
    for what, values in report["lengths"].items():
        lines.append(f"{what:<22}" + "".join(f"{values[_point(p)]:>8,}" for p in POINTS))
    tokens, ends = report["tokens"], ", ".join(f"{name} ({n:,})" for name, n in report["end_tokens"].items())
    lines += [
        "",
        f"shared prefix: {tokens['without_sharing']:,} tokens without sharing, {tokens['with_sharing']:,} with, "
        f"{tokens['ratio']:.2f} times fewer",
        f"every text ends in one end token: {ends}; BOS {report['bos']}",
        f"built at {report['rows_per_s']:,.0f} rows/s",
    ]
    return "\n".join(lines)


def _dropped(report: Mapping[str, Any]) -> str:
    parts = [f"{count:,} {reason}" for reason, count in report["dropped"].items() if count]
    text = f", dropped {sum(report['dropped'].values()):,}" + (f" ({', '.join(parts)})" if parts else "")
    if report["other_split"]:
        text += f", in the other split {report['other_split']:,}"
    return text


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = np.percentile(values, POINTS, method="nearest")
    return {_point(point): int(value) for point, value in zip(POINTS, found, strict=True)}


def _point(percent: int) -> str:
    return "max" if percent == 100 else f"p{percent}"
