"""A run whose whole process tree is killed again and again ends with the weights of one that never was.

`DPO_KIT_KILLS=50` (part of `make evidence`) kills more often than the few times that fit into every test run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dpo_kit.records import checkpoint_folders, metrics
from dpo_kit.system.files import read_json

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


def start(root: Path, trial: str, *words: str) -> subprocess.Popen:
    params = root / "params.yaml"
    params.write_text(
        json.dumps({**PARAMS, "cluster": {"fileroot": str(root / "runs"), "n_gpus_per_node": 0}})
    )
    command = [
        sys.executable,
        "-m",
        "dpo_kit",
        "train",
        "--config",
        str(params),
        f"trial_name={trial}",
        *words,
    ]
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
    before = checkpoint_folders.steps(run_dir / "checkpoints")
    if rng.random() < 0.85:  # in mid-training or while a checkpoint is written; else while it starts
        while process.poll() is None and checkpoint_folders.steps(run_dir / "checkpoints") == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
    else:
        time.sleep(rng.uniform(0.5, 6))
    acknowledged = max(checkpoint_folders.steps(run_dir / "checkpoints"), default=0)
    if process.poll() is None:
        kill_tree(process)
    newest, told = checkpoint_folders.newest(run_dir / "checkpoints")
    assert told == []
    return acknowledged, newest or 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def numbers(run_dir: Path) -> list[dict]:
    times = ("step_s", "tokens_per_second", "pairs_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in metrics.read_metrics(run_dir)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The folder of a run that nobody disturbs."""
    root = tmp_path_factory.mktemp("calm")
    assert start(root, "calm").wait() == 0, (root / "calm.log").read_text()
    return root / "runs" / "kills" / "calm"


def test_a_killed_rank_is_replaced_and_changes_nothing(calm, tmp_path):
    """One of two ranks is killed, twice; the supervisor starts both again from the last whole checkpoint."""
    process, run_dir = start(tmp_path, "one"), tmp_path / "runs" / "kills" / "one"
    killed: list[int] = []
    while process.poll() is None and len(killed) < 2:
        ranks = (read_json(run_dir / "status.json", {}) if run_dir.exists() else {}).get("ranks") or []
        if (
            ranks
            and ranks[1] not in killed
            and len(checkpoint_folders.steps(run_dir / "checkpoints")) > len(killed)
        ):
            killed.append(ranks[1])
            os.kill(ranks[1], signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == 0, (tmp_path / "one.log").read_text()
    assert len(killed) == 2
    assert read_json(run_dir / "status.json")["attempt"] == 3
    said = (tmp_path / "one.log").read_text()
    assert said.count("rank 1: ended from outside by SIGKILL") == 2, said
    assert content(run_dir / "model") == content(calm / "model")
    assert numbers(run_dir) == numbers(calm)


def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(calm, tmp_path):
    wild = tmp_path / "runs" / "kills" / "wild"
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
