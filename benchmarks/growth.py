"""How the time of a step grows with pairs per step and with length: a line, and the formula's attention term.

    python benchmarks/growth.py -o benchmarks/growth.md        also writes growth.png beside it

Synthetic pairs. Pairs per step: 4 to 64 pairs of 96/40/40 tokens. Length: 4 pairs of P/C/R = L/2, L/4, L/4 for L
of 128 to 2048 tokens run a pair; there the attention term grows with the square of the length.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import inputs
import numpy as np

PAIRS, LENGTHS = (4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048)
SHAPE, LENGTH_PAIRS = (96, 40, 40), 4


def measure(job: dict[str, Any]) -> list[float]:
    """Seconds of the steps at one setting, the first left out."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        vocab = inputs.shape_of(job["model"]).vocab
        pairs = inputs.synthetic_pairs(job["shape"], job["batch_size"], vocab)
        store = inputs.write_pairs(pairs, Path(folder) / "pairs", job["model"])
        with common.kit_engine(job, store, Path(folder)) as (state, _):
            common.kit_train(state, lambda record: seconds.append(record["step_s"]))
    return seconds[1:]


def report(o: Any, call: Any) -> str:
    """Measures every size; writes tables and the picture."""
    folder = inputs.model_folder(o.model, o.layers if o.model.startswith("random:") else 0)
    shape = inputs.shape_of(folder)
    settings = [("pairs", n, n, SHAPE) for n in o.counts]
    settings += [("length", n, LENGTH_PAIRS, (n // 2, n // 4, n // 4)) for n in o.lengths]
    found: dict[str, list[dict[str, Any]]] = {"pairs": [], "length": []}
    for axis, value, num_pairs, (prompt, chosen, rejected) in settings:
        job = {"name": f"{axis} {value}", "model": folder, "dtype": o.dtype, "batch_size": num_pairs}
        job |= {"shape": f"{prompt}/{chosen}/{rejected}", "steps": o.steps + 1, "set": o.set}
        seconds = call({**job, "max_tokens": max(o.max_tokens, sum((prompt, chosen, rejected)))})
        lengths = (prompt, prompt + chosen, prompt + rejected)
        attention = shape.attention_flops(prompt + chosen, 0) + shape.attention_flops(rejected, prompt)
        flops = 3 * num_pairs * shape.pair_flops(lengths, True)
        tokens = num_pairs * (prompt + chosen + rejected)
        found[axis].append({"x": value, "s": seconds, "tokens": tokens, "flops": flops})
        found[axis][-1]["attention"] = 3 * num_pairs * attention / flops
    parts = [
        common.head(
            "How the time of a step grows",
            f"{Path(o.model).name}, {shape.layers} layers, {o.dtype}; median (min-max) of {o.steps} steps after one.",
        )
    ]
    for axis, title in (("pairs", "pairs a step"), ("length", f"tokens a pair, {LENGTH_PAIRS} pairs")):
        lines = found[axis]
        xs, ys = [p["x"] for p in lines], [statistics.median(p["s"]) for p in lines]
        rows = [
            [
                p["x"],
                p["tokens"],
                common.spread(p["s"], ".3f"),
                f"{1e3 * y / p['tokens']:.3f}",
                f"{p['flops'] / y / 1e9:.1f}",
                f"{p['attention']:.1%}",
            ]
            for p, y in zip(lines, ys, strict=True)
        ]
        header = [title, "tokens run", "s a step", "ms a token", "useful GFLOP/s", "attention of the FLOPs"]
        fit = line_fit(xs, ys)
        cost = line_fit([p["flops"] / 1e9 for p in lines], ys)
        parts += [
            common.table(header, rows),
            f"Line: {fit[0]:.3f} s + {fit[1]:.5f} s x {title.split(',')[0]} (R2 {fit[2]:.4f}). Against the formula's "
            f"FLOPs, attention included: {cost[0]:.3f} s + {1e3 * cost[1]:.2f} ms a GFLOP (R2 {cost[2]:.4f}).",
        ]
    if o.output:
        parts.append(_picture(found, Path(o.output).with_suffix(".png")))
    return "\n\n".join(parts)


def line_fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares with relative errors (every size counts alike): intercept, slope, R2."""
    slope, intercept = np.polyfit(x, y, 1, w=1 / np.array(y)) if len(x) > 1 else (0.0, y[0])
    rest = np.array(y) - (intercept + slope * np.array(x))
    total = np.array(y) - np.mean(y)
    return float(intercept), float(slope), float(1 - (rest @ rest) / max(total @ total, 1e-30))


def _picture(found: dict[str, list[dict[str, Any]]], path: Path) -> str:
    """Two panels: measured points, the fitted line, and the time that the formula's FLOPs would take."""
    from plotly.subplots import make_subplots

    from dpo_kit import plots
    from dpo_kit.plots import picture

    titles = ("pairs a step", f"tokens run a pair ({LENGTH_PAIRS} pairs a step)")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.09)
    for column, axis in enumerate(("pairs", "length"), start=1):
        lines = found[axis]
        xs, ys = [p["x"] for p in lines], [statistics.median(p["s"]) for p in lines]
        intercept, slope, _ = line_fit(xs, ys)
        at, per_gflop, _ = line_fit([p["flops"] / 1e9 for p in lines], ys)
        formula = [at + per_gflop * p["flops"] / 1e9 for p in lines]
        straight = [intercept + slope * x for x in xs]
        for name, y, mode, colour, dash in (
            ("measured", ys, "markers", picture.VERMILLION, "solid"),
            ("line", straight, "lines", picture.BLUE, "solid"),
            ("formula with attention", formula, "lines", picture.GREEN, "dash"),
        ):
            figure.add_scatter(
                x=xs,
                y=y,
                mode=mode,
                name=name,
                line={"color": colour, "dash": dash, "width": 2},
                marker={"color": colour, "size": 9},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_layout(template="none", height=plots.HEIGHT, margin={"l": 60, "r": 20, "t": 72, "b": 40})
    figure.update_layout(legend={"orientation": "h", "x": 0, "yref": "container", "y": 1, "yanchor": "top"})
    figure.update_xaxes(gridcolor=picture.GRID, rangemode="tozero")
    figure.update_yaxes(gridcolor=picture.GRID, rangemode="tozero", title_text="seconds a step", col=1)
    figure.update_yaxes(gridcolor=picture.GRID, rangemode="tozero", col=2)
    path.write_bytes(picture.png(figure, plots.WIDTH, plots.HEIGHT))
    return f"![Seconds a step against pairs a step and against length]({path.name})"


if __name__ == "__main__":
    options = common.parser(__doc__, model="random:smollm2-135m")
    options.add_argument("--layers", type=int, default=12, help="layers of a random model (0: all)")
    options.add_argument("--steps", type=int, default=3, help="timed steps of each size")
    options.add_argument("--counts", type=int, nargs="+", default=PAIRS, help="pairs a step")
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens run a pair")
    sys.exit(common.main(options, measure, report))
