"""From the command to the end of the first step: what a start costs before anything is trained.

    python benchmarks/first_minute.py                    median of five starts of the smoke config, pairs warm
    python benchmarks/first_minute.py --code ../other    the same of another checkout of the kit

One start that is not counted makes pairs and reference values. Beside seconds it gives bare imports: how often
`import torch, transformers` would fit in, measured between the starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BARE_IMPORT = "import torch, transformers"
POLL_S = 0.005


def bare_import() -> float:
    """Seconds of a process that imports torch and the model's class, and nothing of the kit."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", BARE_IMPORT], check=True)
    return time.perf_counter() - start


def first_step(code: Path, fileroot: Path, trial: str) -> tuple[float, float, dict[str, float]]:
    """One `dpo-kit train`: seconds to the line of step 1, seconds to its end, seconds of its phases."""
    command = [sys.executable, "-m", "dpo_kit", "train", "--config", str(code / "params/smoke.yaml")]
    names = [f"cluster.fileroot={fileroot}", "experiment_name=first", f"trial_name={trial}"]
    metrics = fileroot / "first" / trial / "metrics.jsonl"
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(code)}
    # Elsewhere: `-m` looks in the current folder first, which may be another checkout.
    train = subprocess.Popen([*command, *names], cwd=fileroot, env=environment, stdout=subprocess.DEVNULL)
    try:
        while train.poll() is None and not _has_first_step(metrics):
            time.sleep(POLL_S)
        seconds = time.perf_counter() - start
        if train.wait() != 0 or not _has_first_step(metrics):
            raise SystemExit(f"the run in {metrics.parent} failed")
    finally:
        train.kill()
    phases = json.loads((metrics.parent / "status.json").read_text())["phases"]
    return seconds, time.perf_counter() - start, {phase["name"]: phase["seconds"] for phase in phases}


def _has_first_step(metrics: Path) -> bool:
    if not metrics.exists():
        return False
    lines = metrics.read_text("utf-8").split("\n")[:-1]
    return any(json.loads(line).get("step") == 1 and "dpo/loss" in line for line in lines)


def main() -> None:
    """Measures and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--code", type=Path, default=ROOT, help="checkout of the kit")
    p.add_argument("--starts", type=int, default=5, help="starts that are counted")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first_step(o.code.absolute(), Path(folder), "warm")
        imports, starts = [], []
        for i in range(o.starts):
            imports.append(bare_import())
            starts.append(first_step(o.code.absolute(), Path(folder), f"start-{i}"))
    bare = statistics.median(imports)
    print("| | seconds | bare imports |\n|---|---|---|")
    firsts, ends, phases = zip(*starts, strict=True)
    for name, values in (("one bare import", imports), ("first step", firsts), ("end of the run", ends)):
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} ({min(values):.2f} to {max(values):.2f}) | {middle / bare:.2f} |")
    for name in phases[0]:
        print(f"| phase {name} | {statistics.median(found.get(name, 0.0) for found in phases):.2f} | |")


if __name__ == "__main__":
    main()
