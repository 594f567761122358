"""A disk that fills up while a run writes: what was there stays, and the message names the place and the sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_kit.records import checkpoint_folders, metrics
from dpo_kit.system.files import read_json
from tests.supervise.test_kills import PARAMS


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of a given size; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes: float) -> Path:
        size = f"size={int(megabytes * 1024)}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no tmpfs: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def begin(root: Path, disk: Path, *overrides: str) -> subprocess.Popen:
    """Starts a run on one rank; its folder is `disk/runs/kills/one`."""
    params = root / "params.yaml"
    actor = {**PARAMS["actor"], "backend": "fsdp:d1"}
    cluster = {"fileroot": str(disk / "runs"), "n_gpus_per_node": 0}
    params.write_text(json.dumps({**PARAMS, "actor": actor, "cluster": cluster}))
    command = [
        sys.executable,
        "-m",
        "dpo_kit",
        "train",
        "--config",
        str(params),
        "trial_name=one",
        *overrides,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    stat = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (stat.f_bavail * stat.f_frsize - leave))
    return filler


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "export"])
def test_a_disk_that_fills_up(tmp_path, small_disk, what):
    disk, run_dir = small_disk(64), tmp_path / "disk" / "runs" / "kills" / "one"
    frequency = "recover.freq_steps=1" if what == "checkpoint" else "recover.freq_steps=4"
    length = 7 if what == "export" else 400
    options = (frequency, f"total_train_steps={length}", "recover.keep=2", "recover.retries=0")
    process = begin(tmp_path, disk, *options)
    while process.poll() is None and not checkpoint_folders.steps(run_dir / "checkpoints"):
        time.sleep(0.002)
    filler = fill(disk, {"checkpoint": 200_000, "metrics": 0, "export": 100_000}[what])
    said = process.communicate()[0]
    assert process.returncode in (1, 2), said
    newest, told = checkpoint_folders.newest(run_dir / "checkpoints")
    assert (newest or 0) >= 1, said
    assert told == []
    assert str(run_dir) in said, said
    if what == "checkpoint":
        assert " is needed, " in said
    assert read_json(run_dir / "status.json")["state"] == "failed", said  # there was room for a last word
    # What fills the disk is now what a killed rank left of a checkpoint: the next attempt clears it away.
    (run_dir / "checkpoints" / ".tmp-step-99-1").mkdir()
    filler.rename(run_dir / "checkpoints" / ".tmp-step-99-1" / "half")
    process = begin(tmp_path, disk, *options[:1], f"total_train_steps={max(8, (newest or 0) + 2)}")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    steps = [line["step"] for line in metrics.read_metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
