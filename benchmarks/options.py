"""Each option of the engine on and off, for two models: time and memory of a step, loss after the last one.

    python benchmarks/options.py                     two random models of about 0.1B, 4 pairs of 256/128/128 a step

Every row is a process of its own; rows
of one model differ from its first in the one setting named.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import inputs

MODELS = ("random:smollm2-135m", "random:qwen2-0.15b")
OPTIONS = (
    "",
    "actor.compile=true",
    "actor.gradient_checkpointing=true",
    "actor.gradient_checkpointing=selective",
    "actor.optimizer.state_dtype=bfloat16",
    "actor.share_prompt=false",
)
WARMUP = 2


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first step and of those after the warm-up, peak, last loss."""
    store = inputs.open_store(job["store"])
    window = common.Window(WARMUP, job["steps"])
    with (
        tempfile.TemporaryDirectory() as folder,
        common.kit_engine(job, store, Path(folder)) as (state, _),
    ):
        common.kit_train(state, window.stepped)
    seconds = [record["step_s"] for record in window.lines]
    return {
        "first": seconds[0],
        "seconds": seconds[WARMUP:],
        "peak": window.peak,
        "loss": window.lines[-1]["dpo/loss"],
        "num_graphs": num_graphs(),
    }


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process, recompiled ones too."""
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))


def report(o: Any, call: Any) -> str:
    """Measures every row and writes a table a model."""
    parts = [
        common.head(
            "Options on and off",
            f"{o.dtype}, {o.pairs} pairs a step of {o.shape}, the same {o.pairs} pairs in every step; median (min-max) "
            f"of {o.steps - WARMUP} steps after {WARMUP}; peak: "
            f"{'allocated' if common.has_cuda() else 'resident'} memory of those steps.",
        )
    ]
    for model in o.models:
        folder = inputs.model_folder(model, o.layers if model.startswith("random:") else 0)
        o.model = model
        store = inputs.pair_store(o, folder)
        results = []
        for override in OPTIONS:
            job = {"name": f"{model} {override}", "model": folder, "store": str(store.path), "dtype": o.dtype}
            job |= {
                "batch_size": len(store),
                "steps": o.steps,
                "set": [*o.set, *([override] if override else [])],
            }
            try:
                results.append((override, call({**job, "max_tokens": o.max_tokens})))
            except common.ChildFailed as error:
                print(error, file=sys.stderr)
                results.append((override, None))
        parts.append(_table(model, inputs.shape_of(folder), results))
    return "\n\n".join(parts)


def _table(model: str, shape: Any, results: list[tuple[str, dict | None]]) -> str:
    base = results[0][1]
    rows = []
    for override, r in results:
        if r is None or base is None:
            rows.append([override or "as it is", "failed", *["-"] * 7])
            continue
        times, peaks = (statistics.median(x["seconds"]) for x in (r, base)), (r["peak"], base["peak"])
        mine, first = times
        rows.append(
            [
                override or "as it is",
                common.spread(r["seconds"], ".3f"),
                f"{mine / first:.2f}",
                f"{r['first']:.1f}",
                f"{common.gib(peaks[0]):.2f}",
                f"{peaks[0] / peaks[1]:.2f}",
                f"{r['loss']:.6f}",
                f"{r['loss'] - base['loss']:+.1e}",
                r["num_graphs"],
            ]
        )
    header = [
        "option",
        "s a step",
        "of it",
        "first step s",
        "peak GiB",
        "of it",
        "last loss",
        "difference",
        "graphs",
    ]
    return f"## {model}, {shape.layers} layers, {shape.params / 1e6:.0f}M\n\n" + common.table(header, rows)


if __name__ == "__main__":
    options = common.parser(__doc__, pairs=4)
    options.set_defaults(shape="256/128/128")
    options.add_argument("--models", nargs="+", default=MODELS, help="in place of --model")
    options.add_argument("--layers", type=int, default=0, help="layers of random models (0: all)")
    options.add_argument("--steps", type=int, default=6)
    sys.exit(common.main(options, measure, report))
