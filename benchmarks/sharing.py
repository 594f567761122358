"""What running the prompt once gains by itself: shared against unshared steps of one model in one process.

    python benchmarks/sharing.py                     every step of the same pairs twice in a row, in turns

One engine, weights that stay as they are (learning rate 0), rows laid out so that each step comes twice, once
shared and once not. The measured ratio of times stands beside the ratio of FLOPs by the formula;
without the optimizer's update too, which costs the same on both sides and has no part in sharing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import inputs

TARGET = 0.92
WARMUP = 3


class Watch:
    """Counts the tokens that a step's model runs, and the seconds of its optimizer."""

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook as hook
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self.tokens, self.optimizer_s, self._start = 0, 0.0, 0.0
        self.handles = [
            hook(lambda module, args: self._count(module, args)),
            register_optimizer_step_pre_hook(lambda *_: self._clock(start=True)),
            register_optimizer_step_post_hook(lambda *_: self._clock(start=False)),
        ]

    def take(self) -> tuple[int, float]:
        """Tokens and optimizer seconds since the last call."""
        found = self.tokens, self.optimizer_s
        self.tokens, self.optimizer_s = 0, 0.0
        return found

    def _count(self, module: Any, args: Any) -> None:
        import torch

        if isinstance(module, torch.nn.Embedding):
            self.tokens += args[0].numel()

    def _clock(self, *, start: bool) -> None:
        common.synchronize()
        now = time.perf_counter()
        if start:
            self._start = now
        else:
            self.optimizer_s += now - self._start


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Every step shared and unshared, one after the other; which came first turns with the repeat.

    The setting is switched after each step. An engine may lay out its next step ahead of time, so which of the two
    a step was is read from the tokens it ran.
    """
    store = inputs.open_store(job["store"])
    size = job["batch_size"]
    warmup = WARMUP + job["repeat"] % 2
    plan = [0] * warmup + [step for step in range(job["num_steps"]) for _ in range(2)]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for step in plan for row in range(step * size, (step + 1) * size)]
        twice = inputs.write_pairs([store.pair(i) for i in rows], Path(folder) / "pairs", job["model"])
        whole = {**job, "steps": len(plan), "lr": 0.0}
        with common.kit_engine(whole, twice, Path(folder)) as (state, _):
            watch = Watch()

            def stepped(record: dict[str, Any]) -> None:
                tokens, optimizer_s = watch.take()
                step = plan[len(lines)]
                lengths = [store.lengths(i) for i in range(step * size, (step + 1) * size)]
                shared, whole = (sum(c + r - k * s for s, c, r in lengths) for k in (1, 0))
                share = abs(tokens - shared) < abs(tokens - whole)
                lines.append({"step": step, "share": share, "tokens": tokens, "s": record["step_s"]})
                lines[-1] |= {"optimizer_s": optimizer_s, "logps": record["dpo/rejected_logps"]}
                state.config.actor.share_prompt = not state.config.actor.share_prompt

            common.kit_train(state, stepped)
    timed = lines[warmup:]
    if any(a["share"] is b["share"] for a, b in zip(timed[0::2], timed[1::2], strict=True)):
        raise AssertionError("the engine does not follow actor.share_prompt from step to step")
    return timed


def report(o: Any, call: Any) -> str:
    """Runs it and writes the table."""
    folder = inputs.model_folder(o.model)
    store = inputs.pair_store(o, folder)
    shape, size = inputs.shape_of(folder), o.batch_size
    job = {"store": str(store.path), "model": folder, "dtype": o.dtype, "batch_size": size, "set": o.set}
    job |= {"num_steps": len(store) // size, "max_tokens": o.max_tokens}
    runs = [call({**job, "repeat": repeat}) for repeat in range(o.repeats)]
    used = range(job["num_steps"] * size)
    predicted = sum(shape.pair_flops(store.lengths(i), False) for i in used)
    predicted /= sum(shape.pair_flops(store.lengths(i), True) for i in used)
    rows = []
    for name, cost in (
        ("whole step", lambda line: line["s"]),
        ("without the optimizer", lambda line: line["s"] - line["optimizer_s"]),
    ):
        sums = [[sum(cost(x) for x in run if x["share"] is share) for share in (True, False)] for run in runs]
        shared, whole = ([s[i] / job["num_steps"] for s in sums] for i in (0, 1))
        ratios = [b / a for a, b in zip(shared, whole, strict=True)]
        reached = [r / predicted for r in ratios]
        cells = [common.spread(shared, ".3f"), common.spread(whole, ".3f"), common.spread(ratios)]
        rows.append([name, *cells, f"{predicted:.2f}", common.spread(reached)])
    tokens = [sum(x["tokens"] for x in runs[0] if x["share"] is share) for share in (True, False)]
    apart = max(
        abs(a["logps"] - b["logps"])
        for run in runs
        for a in run
        for b in run
        if a["step"] == b["step"] and a["share"] and not b["share"]
    )
    reached = statistics.median(
        sum(x["s"] for x in run if not x["share"]) / sum(x["s"] for x in run if x["share"]) / predicted
        for run in runs
    )
    return "\n\n".join(
        [
            common.head(
                "Running the prompt once, by itself",
                f"{Path(o.model).name}, {o.dtype}, {o.shape or 'HH-RLHF rows'}: {len(store)} pairs, {size} a step; "
                f"each step shared and unshared in turns, in one process; {o.repeats} repeats.",
            ),
            common.table(
                ["time of", "shared s a step", "unshared s a step", "ratio", "by the formula", "reached"],
                rows,
            ),
            f"Tokens run: {tokens[0]} shared, {tokens[1]} unshared ({tokens[1] / tokens[0]:.2f}). Mean rejected "
            f"log-probs of a step differ by at most {apart:.1e} nats. Target: {TARGET} of the formula's ratio "
            f"over whole steps; {'met' if reached >= TARGET else 'MISSED'} ({reached:.2f}).",
        ]
    )


if __name__ == "__main__":
    options = common.parser(__doc__)
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--repeats", type=int, default=2)
    sys.exit(common.main(options, measure, report))
