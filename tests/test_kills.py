"""A run whose whole process tree is killed again and again ends with the weights of one that never was.

`DPO_KIT_KILLS=50` (part of `make evidence`) kills more often than the few times that fit into every test run.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dpo_kit import commit, history

KILLS = int(os.environ.get("DPO_KIT_KILLS", "5"))
STEPS = 24
PARAMS = {
    "experiment_name": "kills",
    "total_train_steps": STEPS,
    "total_train_epochs": 100,
    "actor": {"path": "tiny-random", "dtype": "float32", "backend": "fsdp:d2"},
    "ref": {"path": "${actor.path}"},
    "train_dataset": {"path": "sample", "num_rows": 48, "batch_size": 8},
    "recover": {"mode": "auto", "freq_steps": 1},
    "evaluator": {"num_samples": 0},
    "stats_logger": {"tensorboard": False},
}


def start(root: Path, trial: str) -> subprocess.Popen:
    params = root / "params.yaml"
    params.write_text(
        json.dumps({**PARAMS, "cluster": {"fileroot": str(root / "runs"), "n_gpus_per_node": 0}})
    )
    command = [sys.executable, "-m", "dpo_kit", "train", "--config", str(params), f"trial_name={trial}"]
    with open(root / f"{trial}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=root)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all its descendants at once."""
    tree = psutil.Process(process.pid).children(recursive=True)
    for each in [psutil.Process(process.pid), *tree]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=10)


def kill_at_random(root: Path, run_dir: Path, rng: random.Random) -> tuple[int, int]:
    """Starts or continues the run and kills it; the newest checkpoint acknowledged before, and what is whole after."""
    process = start(root, "wild")
    before = commit.steps(run_dir / "checkpoints")
    if rng.random() < 0.85:  # in mid-training or while a checkpoint is written; else while it starts
        while process.poll() is None and commit.steps(run_dir / "checkpoints") == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
    else:
        time.sleep(rng.uniform(0.5, 6))
    acknowledged = max(commit.steps(run_dir / "checkpoints"), default=0)
    if process.poll() is None:
        kill_tree(process)
    newest, told = commit.newest(run_dir / "checkpoints")
    assert told == []
    return acknowledged, newest or 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def numbers(run_dir: Path) -> list[dict]:
    times = ("step_s", "tokens_per_second", "pairs_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in history.read_metrics(run_dir)]


def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(tmp_path):
    calm, wild = (tmp_path / "runs" / "kills" / name for name in ("calm", "wild"))
    assert start(tmp_path, "calm").wait() == 0, (tmp_path / "calm.log").read_text()
    rng = random.Random(11)
    for number in range(KILLS):
        acknowledged, newest = kill_at_random(tmp_path, wild, rng)
        print(f"kill {number + 1}: checkpoint {acknowledged} acknowledged, {newest} whole", flush=True)
        assert newest >= acknowledged
        if (wild / "model").exists():  # it came to its end: begin another
            assert content(wild / "model") == content(calm / "model")
            subprocess.run([sys.executable, "-m", "dpo_kit", "runs", "rm", str(wild), "--yes"], check=True)
    assert start(tmp_path, "wild").wait() == 0, (tmp_path / "wild.log").read_text()[-3000:]
    assert content(wild / "model") == content(calm / "model")
    assert numbers(wild) == numbers(calm)
    assert list((wild / "checkpoints").iterdir()) == []
