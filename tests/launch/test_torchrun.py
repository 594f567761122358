"""Many processes of one command: torchrun as it is meant, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_kit import notebook
from dpo_kit.cli import main
from dpo_kit.config import project_root
from dpo_kit.errors import UserError
from dpo_kit.records.status import read_status

SMOKE = ["train", "--config", str(project_root() / "params" / "smoke.yaml"), "evaluator.num_samples=0"]


@pytest.fixture
def many(monkeypatch):
    """This process as one of two of torchrun's."""
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_command_that_torchrun_starts_many_times_is_refused(many, tmp_path, capsys):
    assert main([*SMOKE, f"cluster.fileroot={tmp_path}"]) == 2
    assert "torchrun has started 2 processes" in (said := capsys.readouterr().err)
    assert "add scheduler.type=torchrun" in said
    assert list(tmp_path.iterdir()) == []


def test_so_is_a_notebook_also_of_srun(many, monkeypatch):
    with pytest.raises(UserError, match="torchrun has started this notebook 2 times"):
        notebook.begin({})
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match="srun has started this notebook 8 times"):
        notebook.begin({})


def test_torchrun_wants_torchrun(tmp_path, capsys):
    assert main([*SMOKE, f"cluster.fileroot={tmp_path}", "scheduler.type=torchrun", "--detach"]) == 2
    assert "for `dpo-kit train` in the foreground" in capsys.readouterr().err


@pytest.fixture
def torchrun(tmp_path):
    def run(*words):
        command = [
            Path(sys.executable).with_name("torchrun"),
            "--nproc-per-node=2",
            "--master-port=29533",
            "-m",
            "dpo_kit",
        ]
        settings = [
            "scheduler.type=torchrun",
            f"cluster.fileroot={tmp_path}",
            "cluster.n_gpus_per_node=0",
            "trial_name=one",
        ]
        return subprocess.run(
            [*command, *SMOKE, *settings, *words], capture_output=True, text=True, timeout=300
        )

    return run


def test_two_processes_of_one_machine_train(torchrun, tmp_path):
    done = torchrun()
    assert done.returncode == 0, done.stderr
    status = read_status(tmp_path / "smoke" / "one")
    assert (status["state"], status["step"]) == ("done", 4)
    assert len(list((tmp_path / "smoke" / "one" / "logs").glob("rank-?.log"))) == 2


def test_a_mistake_is_told_once_and_ends_all(torchrun, tmp_path):
    done = torchrun("actor.backend=fsdp:d3", "ref.backend=fsdp:d3")
    assert done.returncode != 0
    told = "actor.backend = 'fsdp:d3' has 3 ranks, and torchrun has started 2 processes; use fsdp:d2"
    assert done.stderr.count(told) == 1
    assert not (tmp_path / "smoke").exists()
