"""Private memory of ranks while they load a model: each may hold its part of it, and little more.

    python benchmarks/loading_memory.py                a shape of 2 GB in fp32 (494 M parameters), 4 gloo ranks
    python benchmarks/loading_memory.py --tp 1         only sharded by FSDP2; 2: half of the ranks share each layer

The weights are written once, in one file of fp32, into a temporary folder below runs/benchmarks. A rank's private
memory (USS: pages that no other process maps, those of mapped files included) is read every few milliseconds by a
thread of its own while it loads; the level before is that of a rank which has imported everything and joined the rest.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import common
import inputs
import loading_memory  # this file as ranks import it

from dpo_kit.launch.on_ranks import spawn

EVERY_S = 0.003
ALLOWED = 0.45


def private_bytes() -> int:
    """Of this process, now (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def load_and_watch(folder: str, tp_size: int) -> tuple[int, int, int, int]:
    """On a rank: bytes of all parameters and of its own; private bytes above the level before, at the peak and left."""
    import torch

    from dpo_kit.engine.optimizer import local
    from dpo_kit.model import pair_model, parallel

    world = parallel.init_world(cuda=False, tp_size=tp_size)
    pair_model.preload()
    world.barrier()
    before = private_bytes()
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(private_bytes())
            time.sleep(EVERY_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = pair_model.load(
        folder, world, dtype=torch.float32, trainable=True, gradient_checkpointing=True, longest_tokens=512
    )
    world.barrier()
    done.set()
    watcher.join()
    params = parallel.masters(model).values()
    whole, own = (sum(4 * p.numel() for p in side) for side in (params, map(local, params)))
    return whole, own, max(seen) - before, private_bytes() - before


def write(folder: Path, shape: str) -> None:
    """The weights of a shape, random, in one fp32 file; the small files of the random model beside."""
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(inputs.model_folder(f"random:{shape}"))
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= {name: value.to(torch.float32) for name, value in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())


def main() -> None:
    """Writes the model, loads it in every layout, reports."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--shape", default="0.5b", choices=inputs.SHAPES)
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    options.add_argument("-o", "--output")
    o = options.parse_args()
    inputs.WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=inputs.WORK) as name:
        write(Path(name), o.shape)
        for tp_size in o.tp:
            found = spawn(loading_memory.load_and_watch, name, tp_size, num_ranks=o.ranks)
            for rank, (whole, own, peak, left) in enumerate(found):
                shares = [f"{size / whole:.3f}" for size in (own, peak, left)]
                rows.append([f"fsdp:d{o.ranks // tp_size}t{tp_size}", rank, *shares])
            mean = sum(peak for _, _, peak, _ in found) / found[0][0]
            rows.append([f"fsdp:d{o.ranks // tp_size}t{tp_size}", "sum", "1.000", f"{mean:.3f}", ""])
    worst = max(float(row[3]) for row in rows if row[1] != "sum")
    text = "\n\n".join(
        [
            common.head("Private memory of ranks while they load"),
            f"`random:{o.shape}` in fp32, {found[0][0] / 1e9:.2f} GB, one file, {o.ranks} gloo ranks. Shares of the"
            " parameters' bytes, above the level before.",
            common.table(["backend", "rank", "its parameters", "peak while loading", "left after"], rows),
            f"Largest peak of a rank {worst:.3f}, allowed {ALLOWED}: {'met' if worst <= ALLOWED else 'NOT met'}.",
        ]
    )
    print(text)
    if o.output:
        Path(o.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
