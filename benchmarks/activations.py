"""Activation memory of one training step, this kit against TRL at its best, same pairs, same recompute setting.

    python benchmarks/activations.py                 2 pairs of 1024/512/512, recompute off and on

Two figures a side, both of a step after a warm-up step, with optimizer states and gradients in place (so that
neither counts):

    peak     the high-water mark from the first module of the forward to the optimizer's step, above the level just
             before: resident memory on a CPU (allocator thresholds set so that freed memory goes back to the
             system), allocated memory on CUDA
    saved    bytes that autograd keeps for the backward: unique storages, parameters left out; what a custom
             function keeps outside `save_for_backward` is not seen

Not here: speed (`bench`), memory of optimizer and weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import inputs
import trl_peer

TARGET = 0.70
# glibc gives every block of 64 KiB or more back to the system when it is freed, and trims the rest.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
WARMUP, PEAK_STEPS = 1, 1
STEPS = WARMUP + PEAK_STEPS + 1  # the last one counts saved bytes


class Probe:
    """Watches one side's steps through torch's global hooks; `stepped` after each."""

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self.step = 0
        self.inside = False
        self.params: list[Any] = []
        self.before = 0
        self.peaks: list[int] = []
        self.saved: dict[int, int] = {}
        self.own: set[int] = set()
        self.stack = contextlib.ExitStack()
        self.handles = [
            register_module_forward_pre_hook(self._forward),
            register_module_forward_hook(self._after),
            register_optimizer_step_pre_hook(self._optimizer),
        ]

    def stepped(self, _: Any) -> None:
        """Ends a step."""
        self.step += 1
        self.stack.close()

    def _forward(self, *_: Any) -> None:
        """At the first module of a step: gradients in place, then the level is read."""
        import torch

        if self.inside or not torch.is_grad_enabled() or self.step < WARMUP:
            return
        self.inside = True
        for param in self.params:
            param.grad = torch.ones_like(param).mul_(0)  # written, so that its pages are there
        gc.collect()
        trim()
        if self.step == STEPS - 1:
            self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda kept: kept))
        self.before = common.current_bytes()
        common.reset_peak()

    def _after(self, module: Any, *_: Any) -> None:
        """Notes where a module's parameters lie, gathered ones too."""
        from torch.distributed.tensor import DTensor

        if self.step == STEPS - 1:
            here = (p for p in module.parameters(recurse=False) if not isinstance(p, DTensor))
            self.own |= {p.untyped_storage().data_ptr() for p in here}

    def _save(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def saved_bytes(self) -> int:
        """What autograd kept, parameters left out."""
        return sum(n for pointer, n in self.saved.items() if pointer not in self.own)

    def _optimizer(self, optimizer: Any, *_: Any) -> None:
        if self.inside:
            self.peaks.append(common.peak_bytes() - self.before)
        self.inside = False
        self.params = [p for group in optimizer.param_groups for p in group["params"]]


def trim() -> None:
    """Hands freed memory back to the system, where there is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One side at one recompute setting."""
    store = inputs.open_store(job["store"])
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe()
        if job["side"] == "trl-best":
            trl_peer.train(job, store, Path(folder), probe.stepped)
        else:
            with common.kit_engine(job, store, Path(folder)) as (state, _):
                common.kit_train(state, probe.stepped)
    assert (len(probe.peaks), probe.step) == (PEAK_STEPS + 1, STEPS), (probe.peaks, probe.step)
    return {"peaks": probe.peaks[:PEAK_STEPS], "saved": probe.saved_bytes}


def report(o: Any, call: Any) -> str:
    """Measures both sides at every recompute setting and writes the table."""
    folder = inputs.model_folder(o.model)
    store = inputs.pair_store(o, folder)
    lengths = [store.lengths(i) for i in range(len(store))]
    job = {"store": str(store.path), "model": folder, "dtype": o.dtype, "batch_size": len(store)}
    job |= {"steps": STEPS, "max_tokens": sum(c + r for _, c, r in lengths)}  # one micro-batch on both sides
    rows, missed = [], []
    for recompute in (False, True):
        sides = {}
        for side in ("kit", "trl-best"):
            overrides = [*o.set, f"actor.gradient_checkpointing={str(recompute).lower()}"]
            extra = {"recompute": recompute} if side == "trl-best" else {"set": overrides}
            sides[side] = call(
                {**job, **extra, "side": side, "name": f"recompute {recompute}"}, env=ALLOCATOR
            )
        for name, figures in (
            (
                "peak above the level before",
                {s: [common.gib(p) for p in r["peaks"]] for s, r in sides.items()},
            ),
            ("saved for the backward", {s: [common.gib(r["saved"])] for s, r in sides.items()}),
        ):
            ratio = statistics.median(figures["kit"]) / statistics.median(figures["trl-best"])
            rows.append(
                ["on" if recompute else "off", name, *(common.spread(v, ".3f") for v in figures.values())]
            )
            rows[-1].append(f"{ratio:.2f}")
            if ratio > TARGET:
                missed.append(f"{name}, recompute {rows[-1][0]}")
    shared, whole = (sum(c + r - k * s for s, c, r in lengths) for k in (1, 0))
    return "\n\n".join(
        [
            common.head(
                "Activation memory of a training step",
                f"{Path(o.model).name}, {o.dtype}, {o.shape or 'HH-RLHF rows'}: {len(store)} pairs in one micro-batch, "
                f"{shared} tokens with each prompt once, {whole} without ({shared / whole:.2f}).",
            ),
            common.table(["recompute", "figure", "this kit GiB", "TRL at its best GiB", "ratio"], rows),
            "Optimizer states and gradients are in place before the step. "
            f"Target: {TARGET} or less; "
            + (f"MISSED: {'; '.join(missed)}." if missed else "met by every row."),
        ]
    )


if __name__ == "__main__":
    options = common.parser(__doc__, pairs=2)
    options.set_defaults(shape="1024/512/512")
    sys.exit(common.main(options, measure, report))
