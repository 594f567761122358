"""Bytes that cross the ranks in one training step, counted operator by operator, against the formulas.

    python benchmarks/communication.py

    FSDP2           gathered    M c (2 B + R) / t         weights: blocks in forward and backward, the rest once
                    scattered   M g (B + R) / t           gradients
    a group of t    summed      c T D (1 + 4 L + K L)     embedding; a block two forward, two backward, K run again
                    summed      c S D + g 3 S             head: gradient of its input; largest, target's, sum

M: micro-batches of a step, B and R: parameters of the blocks and the rest, c and g: bytes of a value in the compute
dtype and in fp32, t: ranks of a group, T: tokens that a rank runs, S: of them scored, D: hidden size, L: layers, K: 1
where blocks are run again in the backward. A figure is the size of the whole tensor that a collective makes, takes
apart or sums; over a ring of n ranks each sends (n - 1) / n of it, and for a sum twice that. The gradient norm (one
number) is left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import common
import communication  # this file as ranks import it
import inputs

from dpo_kit.launch.on_ranks import spawn

BACKENDS = {"fsdp:d2": 2, "fsdp:d4": 4, "fsdp:d1t2": 2, "fsdp:d2t2": 4}
AGAIN = "actor.gradient_checkpointing=true"
KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "scattered", "allreduce_": "summed"}


def count(job: dict[str, Any]) -> dict[str, Any]:
    """On a rank: bytes of one step by kind, and what the formulas need to know."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from dpo_kit.config import parse_backend
    from dpo_kit.engine import reference, state, step
    from dpo_kit.engine.optimizer import make_optimizer
    from dpo_kit.model import parallel

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                if max(x.numel() for x in tensors) > 1:
                    found[KINDS[func._opname]] += max(x.nbytes for x in tensors)
            return func(*args, **(kwargs or {}))

    found: Counter[str] = Counter()
    config = common.kit_config(job, Path(job["fileroot"]))
    tp_size = parse_backend(config.actor.backend).t
    world = parallel.init_world(cuda=False, tp_size=tp_size)
    engine = state.build(config, world, inputs.open_store(Path(job["store"])))
    reference.prepare(engine)
    optimizer = make_optimizer(engine.policy, config.actor.optimizer)
    size = job["batch_size"]
    batches = list(step.micro_batches(engine, engine.train, range(size), engine.max_tokens))
    step.train_step(
        engine, optimizer, batches, size, 1e-6
    )  # FSDP2 gathers once too often after a forward alone
    with Counting():
        step.train_step(engine, optimizer, batches, size, 1e-6)
    params = parallel.masters(engine.policy)
    in_blocks = sum(p.numel() for name, p in params.items() if ".layers." in name)
    return {
        "counted": dict(found),
        "params": (in_blocks, sum(p.numel() for p in params.values()) - in_blocks),
        "tokens": sum(batch.input_ids.numel() for batch in batches),
        "scored": sum(len(batch.targets) for batch in batches),
        "micro_batches": len(batches),
        "tp_size": tp_size,
        "compute_bytes": torch.finfo(getattr(torch, config.actor.dtype)).bits // 8,
        "again": config.actor.gradient_checkpointing is True,
    }


def formula(found: dict[str, Any], shape: Any, num_ranks: int) -> dict[str, float]:
    """Bytes of one step on one rank by kind, as in the module's docstring."""
    (blocks, rest), t, c, g = found["params"], found["tp_size"], found["compute_bytes"], 4
    made = {}
    if num_ranks > t:
        made["gathered"] = found["micro_batches"] * c * (2 * blocks + rest) / t
        made["scattered"] = found["micro_batches"] * g * (blocks + rest) / t
    if t > 1:
        a_token = c * shape.hidden * (1 + (4 + found["again"]) * shape.layers)
        made["summed"] = found["tokens"] * a_token + found["scored"] * (c * shape.hidden + 3 * g)
    return made


def report(o: Any, call: Any) -> str:
    """Runs it and writes the table."""
    folder = inputs.model_folder(o.model)
    store, shape = inputs.pair_store(o, folder), inputs.shape_of(folder)
    job = {"store": str(store.path), "model": folder, "dtype": o.dtype, "batch_size": len(store), "steps": 1}
    rows = []
    for backend, num_ranks in BACKENDS.items():
        for extra in ([], [AGAIN]):
            settings = [f"actor.backend={backend}", f"ref.backend={backend}", *extra, *o.set]
            found = call({**job, "max_tokens": o.max_tokens, "set": settings, "num_ranks": num_ranks})
            for kind, size in formula(found, shape, num_ranks).items():
                counted = found["counted"].pop(kind, 0)
                cells = [f"{n / 2**20:,.2f}" for n in (counted, size)]
                how = "run again" if extra else "kept"
                rows.append([backend, how, found["micro_batches"], found["tokens"], kind, *cells])
                rows[-1].append(f"{counted / size:.4f}")
            if found["counted"]:
                raise AssertionError(f"{backend}: no formula for {found['counted']}")
    worst = max(abs(float(row[-1]) - 1) for row in rows)
    header = ["backend", "blocks", "micro-batches", "tokens", "kind", "counted MiB", "formula MiB", "ratio"]
    return "\n\n".join(
        [
            common.head(
                "What crosses the ranks in a step",
                f"{Path(folder).name} ({shape.params / 1e6:.0f} M parameters), {o.dtype}, {len(store)} pairs a step,"
                " rank 0. Sizes of whole tensors, see the script; a ring of n ranks sends (n - 1) / n of what is"
                " gathered or scattered, and twice that of a sum.",
            ),
            common.table(header, rows),
            f"Counted and formula differ by at most {100 * worst:.2f} %.",
        ]
    )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's figures of a job, on ranks of their own."""
    with tempfile.TemporaryDirectory() as fileroot:
        return spawn(communication.count, {**job, "fileroot": fileroot}, num_ranks=job["num_ranks"])[0]


if __name__ == "__main__":
    sys.exit(common.main(common.parser(__doc__, model="random:qwen2-0.15b", pairs=8), measure, report))
