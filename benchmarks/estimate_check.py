"""What `dpo-kit estimate` says against what `dpo-kit train` takes: peak memory of the ranks and seconds a step.

    python benchmarks/estimate_check.py                      the three checked settings
    python benchmarks/estimate_check.py NAME key=value ...   one of your own

Memory is VmHWM summed over the rank processes (Linux), polled while they run; time is the median `step_s` of
`metrics.jsonl` without the first step. The estimate is made right before and right after the run and the mean of
its seconds is taken: on a busy machine both must see the same noise, or the ratio means nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
STEPS = 6
COMMON = [
    "valid_dataset=null",
    "evaluator.num_samples=0",
    f"total_train_steps={STEPS}",
    "cluster.n_gpus_per_node=0",
    "stats_logger.tensorboard=false",
]
CHECKED = {
    "fp32, 2048 tokens": ["train_dataset.batch_size=32", "actor.mb_spec.max_tokens_per_mb=2048"],
    "bf16, recompute, 4096 tokens, reference online": [
        "train_dataset.batch_size=64",
        "actor.mb_spec.max_tokens_per_mb=4096",
        "actor.dtype=bfloat16",
        "actor.gradient_checkpointing=true",
        "ref.logps=online",
    ],
    "fp32, 2 ranks, 1024 tokens": [
        "train_dataset.batch_size=32",
        "actor.mb_spec.max_tokens_per_mb=1024",
        "actor.backend=fsdp:d2p1t1",
    ],
}


def command(verb: str, overrides: list[str], fileroot: str, *flags: str) -> list[str]:
    """`dpo-kit VERB` on the demo config."""
    fixed = [*COMMON, f"cluster.fileroot={fileroot}", *overrides]
    child = [sys.executable, "-m", "dpo_kit.system.child", "dpo_kit"]  # ends with this process
    return [*child, verb, "--config", "params/demo.yaml", *flags, *fixed]


def estimated(overrides: list[str], fileroot: str) -> tuple[float, float, dict]:
    """GiB over all ranks, seconds a step, and the whole estimate."""
    out = subprocess.run(
        command("estimate", overrides, fileroot, "--json"), cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode:
        raise SystemExit(out.stderr)
    found = json.loads(out.stdout)
    return found["memory"]["total"] * found["ranks"] / 2**30, found["time"]["step"], found


def measured(overrides: list[str], fileroot: str) -> tuple[float, float]:
    """Peak GiB over all ranks and the median seconds of a step of a real run."""
    run = subprocess.Popen(
        command("train", overrides, fileroot),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as told:
        while run.poll() is None:
            for pid in rank_pids(run.pid):
                peaks[pid] = max(peaks.get(pid, 0), high_water(pid))
            time.sleep(0.3)
        assert run.stdout is not None
        told.write(run.stdout.read())
        told.seek(0)
        lines = told.read().splitlines()
    if run.returncode:
        raise SystemExit("\n".join(lines[-5:]))
    records = [json.loads(line) for line in (Path(lines[-1]) / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_s"] for record in records if "step_s" in record]
    return sum(peaks.values()) / 2**30, statistics.median(seconds[1:])


def rank_pids(supervisor: int) -> list[int]:
    """Processes below the supervisor that run `dpo_kit.engine.worker`."""
    try:
        children = psutil.Process(supervisor).children(recursive=True)
        return [child.pid for child in children if "dpo_kit.engine.worker" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def high_water(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def main(settings: dict[str, list[str]]) -> None:
    """One line a setting: estimate, measurement, ratio."""
    print(f"{'setting':48} {'GiB est.':>9} {'run':>6} {'ratio':>6} {'s est.':>8} {'run':>7} {'ratio':>6}")
    for name, overrides in settings.items():
        with tempfile.TemporaryDirectory() as fileroot:
            gib, step_s, found = estimated(overrides, fileroot)
            real_gib, real_s = measured(overrides, fileroot)
            again_s = estimated(overrides, fileroot)[1]
        mean_s = (step_s + again_s) / 2
        print(
            f"{name:48} {gib:9.2f} {real_gib:6.2f} {gib / real_gib:6.2f}"
            f" {mean_s:8.2f} {real_s:7.2f} {mean_s / real_s:6.2f}",
            flush=True,
        )
        print(f"    estimates of a step {step_s:.2f} s before, {again_s:.2f} s after", file=sys.stderr)
        parts = {k: round(v / 2**20) for k, v in found["memory"].items()}
        print(f"    MiB a rank {parts}; {found['tokens']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main({sys.argv[1]: sys.argv[2:]} if len(sys.argv) > 1 else CHECKED)
