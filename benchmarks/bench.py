"""The kit against TRL at its best and TRL's defaults: same pairs, tokens, model, dtype, optimizer.

    python benchmarks/bench.py                       CPU or CUDA, real HH-RLHF pairs (`make bench`)
    python benchmarks/bench.py --model random:0.5b --shape 1024/512/512 --dtype bfloat16 --pairs 64 --batch-size 32

Sides run in turns, each in a process of its own, forward in one repeat and backward in the next. A side warms up
on the longest rows, then every pair is timed exactly once. TRL's defaults, much slower, may be capped by
`--default-steps`; their time is then scaled to the mean step by the tokens of the data. The reference pass is
timed in the first repeat; later ones find it in each side's own cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import common
import inputs
import trl_peer

SIDES = {
    "kit": "this kit",
    "kit-compiled": "this kit, compiled",
    "kit-unshared": "this kit, prompt run twice",
    "trl-best": "TRL at its best",
    "trl-defaults": "TRL's defaults",
}
# Largest differences that are rounding: of the first loss from ln 2, and of any step's loss between two sides
FIRST_LOSS = {"float32": 1e-3, "bfloat16": 3e-2}
SAME_LOSS = {"float32": 5e-3, "bfloat16": 5e-2}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One side, once: seconds and peak of the timed steps, losses of all, tokens, reference pass."""
    if job["side"] == "matmul":
        return {"flops": common.matmul_peak(job["dtype"])}
    store, folder = inputs.open_store(job["store"]), Path(job["folder"])
    window = common.Window(job["warmup"], job["steps"])
    if job["side"].startswith("trl"):
        found = trl_peer.train(job, store, folder, window.stepped)
        lines = [{k: float(v) for k, v in line.items()} for line in window.lines]
    else:
        cached = bool(list(folder.glob(".cache/reference/*")))
        with common.kit_engine(job, store, folder) as (state, reference_s):
            common.kit_train(state, window.stepped)
        found = {"reference_s": None if cached else reference_s, "settings": {}}
        lines = [
            {"loss": r["dpo/loss"], "tokens": round(r["tokens_per_second"] * r["step_s"]), "s": r["step_s"]}
            for r in window.lines
        ]
    timed = lines[job["warmup"] :]
    return {
        **found,
        "seconds": window.seconds,
        "steps": len(timed),
        "tokens": sum(line["tokens"] for line in timed),
        "positions": sum(line.get("positions", 0) for line in timed),
        "peak": window.peak,
        "losses": [line["loss"] for line in lines],
    }


def report(o: Any, call: Any) -> str:
    """Measures every side and writes the tables."""
    folder = inputs.model_folder(o.model)
    store = inputs.pair_store(o, folder)
    num_steps = len(store) // o.batch_size
    if num_steps * o.batch_size != len(store):
        raise SystemExit(f"--pairs {o.pairs} must be a multiple of --batch-size {o.batch_size}")
    peak = call({"side": "matmul", "dtype": o.dtype})["flops"]
    results: dict[str, list[dict]] = {side: [] for side in o.sides}
    failed: dict[str, str] = {}
    micro = {side: o.trl_micro_batch or o.batch_size for side in o.sides}
    for repeat in range(o.repeats):
        for side in o.sides[:: 1 if repeat % 2 == 0 else -1]:
            while side not in failed:
                job = _job(o, side, repeat, folder, store, num_steps, micro[side])
                try:
                    results[side].append(call(job))
                    break
                except common.ChildFailed as error:
                    if side.startswith("trl") and error.out_of_memory and micro[side] > 1:
                        micro[side] //= 2  # the largest batch that fits
                        continue
                    if side.startswith("kit") and not error.out_of_memory:
                        raise
                    failed[side] = "out of memory" if error.out_of_memory else str(error)
                    print(error, file=sys.stderr)
    return _text(o, folder, store, peak, {s: r for s, r in results.items() if r}, failed, micro)


def _job(
    o: Any, side: str, repeat: int, folder: str, store: Any, num_steps: int, micro: int
) -> dict[str, Any]:
    warmup = min(o.warmup_steps or num_steps, num_steps)
    timed = num_steps
    if side == "trl-defaults" and o.default_steps:
        warmup, timed = min(warmup, o.default_steps), min(timed, o.default_steps)
    job = {
        "side": side,
        "repeat": repeat,
        "model": folder,
        "store": str(store.path),
        "dtype": o.dtype,
        "batch_size": o.batch_size,
        "warmup": warmup,
        "steps": warmup + timed,
        "max_tokens": o.max_tokens,
        "recompute": o.recompute,
        "set": list(o.set),
    }
    if o.recompute:
        job["set"] += ["actor.gradient_checkpointing=true"]
    if side == "kit-compiled":
        job["set"] += ["actor.compile=true"]
    if side == "kit-unshared":
        job["set"] += ["actor.share_prompt=false"]
    if side.startswith("trl"):
        job["micro_batch"] = micro
    same = {k: v for k, v in job.items() if k not in ("repeat", "steps", "warmup")}
    mark = hashlib.sha256(json.dumps([same, common.code_version()]).encode()).hexdigest()[:12]
    return job | {"folder": str(inputs.WORK / "bench" / mark)}  # one a side: its own cache of the reference


def _text(o: Any, folder: str, store: Any, peak: float, results: dict, failed: dict, micro: dict) -> str:
    shape = inputs.shape_of(folder)
    lengths = [store.lengths(i) for i in range(len(store))]
    tokens = sum(c + r for _, c, r in lengths)
    num_steps = len(store) // o.batch_size
    useful = inputs.flops(shape, store, share=True) / num_steps
    per_step = {
        "kit": useful,
        "kit-compiled": useful,
        "kit-unshared": inputs.flops(shape, store, share=False) / num_steps,
        "trl-best": inputs.padded_flops(shape, store, o.batch_size, all_positions=not common.has_cuda())
        / num_steps,
    }
    # Seconds a step: timed seconds scaled from the tokens that were seen to the tokens of a mean step
    seconds = {
        side: [r["seconds"] / r["tokens"] * tokens / num_steps for r in runs]
        for side, runs in results.items()
    }
    unit, scale = ("TFLOP/s", 1e12) if common.has_cuda() else ("GFLOP/s", 1e9)
    sheet = next((v for name, v in common.DATASHEET.items() if name in common.hardware()), None)
    rows = []
    for side, runs in results.items():
        rate = [useful / s for s in seconds[side]]
        references = [r["reference_s"] for r in runs if r["reference_s"] is not None]
        row = [
            SIDES[side],
            common.spread(seconds[side], ".3f"),
            common.spread([tokens / num_steps / s for s in seconds[side]], ".0f"),
            common.spread([o.batch_size / s for s in seconds[side]], ".2f"),
            common.spread([r / scale for r in rate], ".1f"),
            f"{statistics.median(rate) / peak:.0%}",
            common.spread([common.gib(r["peak"]) for r in runs], ".2f"),
            "online" if side == "trl-defaults" else common.spread(references, ".1f"),
            f"{per_step[side] / peak:.3g}" if side in per_step else "-",
        ]
        rows.append(row + ([f"{statistics.median(rate) / sheet:.1%}"] if sheet else []))
    rows += [[SIDES[side], reason.splitlines()[0], *["-"] * 7] for side, reason in failed.items()]
    header = ["side", "s a step", "data tokens/s", "pairs/s", f"useful {unit}", "of matmul peak", "peak GiB"]
    header += ["reference pass s", "floor s a step", *(["MFU"] if sheet else [])]
    text = [
        common.head(
            "DPO training speed: " + ", ".join(SIDES[s] for s in results),
            f"{Path(o.model).name}, {o.dtype}, {o.shape or 'HH-RLHF rows'}: {len(store)} pairs, {o.batch_size} a step, "
            f"{tokens} tokens of the data ({tokens - sum(s for s, _, _ in lengths)} with each prompt once, "
            f"longest text {max(max(c, r) for _, c, r in lengths)}); median (min-max) of {o.repeats} repeats, "
            f"sides in turns, each in its own process; {_warmup(o, num_steps)}.",
        ),
        common.table(header, rows),
        f"Useful FLOPs: three forwards with the prompt once ({useful / 1e9:.1f} GFLOP a step), for every side. The "
        "floor is what the side itself must run by the formula (padding included, recompute and an online "
        f"reference not), at the matmul peak measured here ({peak / scale:.1f} {unit} in {o.dtype}). Peak: "
        f"{'allocated on the GPU' if common.has_cuda() else 'resident memory'} during the timed steps.",
        _ratios(results, seconds, per_step),
        _agreement(o, results, tokens),
        *(
            f"Settings of {SIDES[s]}: `{json.dumps(r[0]['settings'])}`"
            for s, r in results.items()
            if r[0]["settings"]
        ),
        *(
            f"{SIDES[s]} ran {o.batch_size // m} micro-batches a step: one was out of memory."
            for s, m in micro.items()
            if s in results and not o.trl_micro_batch and m != o.batch_size
        ),
    ]
    return "\n\n".join(part for part in text if part)


def _warmup(o: Any, num_steps: int) -> str:
    text = f"{min(o.warmup_steps or num_steps, num_steps)} warm-up steps on the longest rows, then each pair once"
    if "trl-defaults" in o.sides and o.default_steps and o.default_steps < num_steps:
        text += f"; TRL's defaults {o.default_steps} warm-up and {o.default_steps} timed steps, scaled by data tokens"
    return text


def _ratios(results: dict, seconds: dict, per_step: dict) -> str:
    """Every other side's times over the kit's, repeat by repeat, beside what the formula predicts."""
    ours = [side for side in ("kit", "kit-compiled") if side in results]
    others = [side for side in results if side not in ours]
    rows = []
    for other in others:
        ratios = [[b / a for a, b in zip(seconds[mine], seconds[other], strict=False)] for mine in ours]
        predicted = f"{per_step[other] / per_step['kit']:.2f}x" if other in per_step else "-"
        rows.append([SIDES[other], *(f"{common.spread(both)}x" for both in ratios), predicted])
    header = ["times that of", *(SIDES[side] for side in ours), "by the formula"]
    return common.table(header, rows) if ours and rows else ""


def _agreement(o: Any, results: dict, tokens: int) -> str:
    """Whether every side saw the same tokens, began at ln 2 and, in the same order, had the same losses."""
    lines = []
    for side, runs in results.items():
        run = runs[0]
        first = abs(run["losses"][0] - math.log(2))
        parts = [
            f"first loss {run['losses'][0]:.6f}, {first:.1e} from ln 2 ({_verdict(first, FIRST_LOSS[o.dtype])})"
        ]
        whole = not (side == "trl-defaults" and o.default_steps)
        parts.append(f"{run['tokens']:.0f} data tokens timed" + _same(run["tokens"], tokens) * whole)
        if run["positions"]:
            parts.append(f"{run['positions'] / run['tokens'] - 1:.0%} padding on top")
        if side in ("kit-compiled", "kit-unshared", "trl-best") and "kit" in results:
            pairs = list(zip(results["kit"][0]["losses"], run["losses"], strict=False))
            worst = max(abs(a - b) for a, b in pairs)
            parts.append(
                f"losses of {len(pairs)} steps within {worst:.1e} of the kit's "
                f"({_verdict(worst, SAME_LOSS[o.dtype])}; last {pairs[-1][1]:.6f}, kit {pairs[-1][0]:.6f})"
            )
        lines.append(f"- {SIDES[side]}: " + ", ".join(parts))
    return "Same work:\n" + "\n".join(lines)


def _verdict(difference: float, allowed: float) -> str:
    return f"{'ok' if difference <= allowed else 'OFF'}, allowed {allowed:g}"


def _same(seen: float, expected: int) -> str:
    return " (ok)" if round(seen) == expected else f" (OFF, the data has {expected})"


if __name__ == "__main__":
    options = common.parser(__doc__)
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    options.add_argument("--warmup-steps", type=int, default=3, help="0: a whole pass over the pairs")
    options.add_argument("--default-steps", type=int, default=3, help="cap for TRL's defaults; 0: none")
    options.add_argument(
        "--trl-micro-batch", type=int, default=0, help="pairs of a TRL micro-batch (0: largest)"
    )
    options.add_argument(
        "--recompute", action="store_true", help="activation recompute, kit and TRL at its best"
    )
    sys.exit(common.main(options, measure, report))
