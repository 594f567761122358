"""Where the time of a training step goes: torch's profiler over a few steps of the kit, by kind of work.

    python benchmarks/step_profile.py --model random:0.5b --shape 1024/512/512 --dtype bfloat16

On CUDA the kernels are summed and the rest of the wall time is what the device waits; on a CPU the operators' own
times are summed. Graphs of torch.compile are counted step by step, so that recompiles show.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import inputs
from options import num_graphs

# Kind of work -> parts of a kernel's or an operator's name; the first that fits counts
KINDS = {
    "optimizer and gradient norm": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "attention": ("flash", "fmha", "attention", "attn", "sdpa"),
    "matrix products": (
        "gemm",
        "nvjet",
        "cutlass",
        "sm90_xmma",
        "::mm",
        "::addmm",
        "::bmm",
        "::matmul",
        "mkldnn",
    ),
    "communication": ("nccl", "c10d", "gloo"),
    "softmax of the log-prob head": ("softmax", "logsumexp", "::exp"),
    "copies, casts, gathers": (
        "copy",
        "memcpy",
        "memset",
        "::cat",
        "index",
        "gather",
        "scatter",
        "split",
        "fill",
    ),
    "norms, activations, other pointwise": (
        "elementwise",
        "vectorized",
        "reduce",
        "triton",
        "silu",
        "mul",
        "add",
        "div",
    ),
}
PROFILED = 2


def kind_of(name: str) -> str:
    """The kind of work that a kernel or operator does, by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in low for part in parts)), "other")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Profiles the last steps; sums by kind and the longest names."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    store = inputs.open_store(job["store"])
    activities = [ProfilerActivity.CUDA if common.has_cuda() else ProfilerActivity.CPU]
    profiler = profile(activities=activities)
    graphs, seconds, clock = [], [], {"start": 0.0}

    def stepped(record: dict[str, Any]) -> None:
        graphs.append(num_graphs())
        seconds.append(record["step_s"])
        if len(seconds) == job["steps"] - PROFILED:
            common.synchronize()
            profiler.start()
            clock["start"] = time.perf_counter()
        elif len(seconds) == job["steps"]:
            common.synchronize()
            clock["wall"] = time.perf_counter() - clock["start"]
            profiler.stop()

    with (
        tempfile.TemporaryDirectory() as folder,
        common.kit_engine(job, store, Path(folder)) as (state, _),
    ):
        common.kit_train(state, stepped)
    field = "self_device_time_total" if common.has_cuda() else "self_cpu_time_total"
    names = {event.key: getattr(event, field) / 1e6 / PROFILED for event in profiler.key_averages()}
    kinds: dict[str, float] = {}
    for name, spent in names.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    longest = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {
        "wall": clock["wall"] / PROFILED,
        "kinds": kinds,
        "longest": [[name[:90], spent] for name, spent in longest],
        "graphs": graphs,
        "seconds": seconds[: job["steps"] - PROFILED],
        "torch": torch.__version__,
    }


def report(o: Any, call: Any) -> str:
    """Profiles one setting and writes the tables."""
    folder = inputs.model_folder(o.model)
    store = inputs.pair_store(o, folder)
    job = {"name": o.model, "model": folder, "store": str(store.path), "dtype": o.dtype, "set": o.set}
    job |= {"batch_size": o.batch_size, "steps": o.steps, "max_tokens": o.max_tokens}
    found = call(job)
    wall, kinds = found["wall"], found["kinds"]
    rows = [[k, f"{1e3 * s:.1f}", f"{s / wall:.1%}"] for k, s in sorted(kinds.items(), key=lambda i: -i[1])]
    waits = wall - sum(kinds.values())
    rows.append(
        [
            "device waits" if common.has_cuda() else "outside operators",
            f"{1e3 * waits:.1f}",
            f"{waits / wall:.1%}",
        ]
    )
    longest = [
        [f"`{name}`", kind_of(name), f"{1e3 * s:.1f}", f"{s / wall:.1%}"] for name, s in found["longest"]
    ]
    again = found["graphs"][-1] - found["graphs"][0]
    return "\n\n".join(
        [
            common.head(
                "Where the time of a step goes",
                f"{Path(o.model).name}, {o.dtype}, {o.shape or 'HH-RLHF rows'}, {o.batch_size} pairs a step; mean of "
                f"{PROFILED} profiled steps of {1e3 * wall:.1f} ms, {common.spread(found['seconds'][1:], '.3f')} s a "
                "step before without the profiler.",
            ),
            common.table(["kind of work", "ms a step", "of the step"], rows),
            common.table(["longest", "kind", "ms a step", "of the step"], longest),
            f"Compiled graphs after each step: {found['graphs']}; made after the first step (recompiles): {again}.",
        ]
    )


if __name__ == "__main__":
    options = common.parser(__doc__, pairs=32)
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--steps", type=int, default=6)
    sys.exit(common.main(options, measure, report))
