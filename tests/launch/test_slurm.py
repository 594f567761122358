"""Slurm: the script that is submitted, and a job of papermill that is requeued in mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from dpo_kit import config as config_module
from dpo_kit.cli import main
from dpo_kit.config import project_root
from dpo_kit.records import metrics
from dpo_kit.records.status import read_status
from tests import slurm_cluster as beds

SMOKE = str(project_root() / "params" / "smoke.yaml")
STEPS = 120
LENGTH = [
    "total_train_epochs=40",
    f"total_train_steps={STEPS}",
    "recover.freq_steps=4",
    "evaluator.freq_epochs=40",
]
SETTINGS = [*LENGTH, "cluster.n_gpus_per_node=0", "actor.backend=fsdp:d2", "stats_logger.tensorboard=false"]
on_slurm = pytest.mark.skipif(bool(beds.permitted()), reason=beds.permitted())


@pytest.fixture
def outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def script(tmp_path, capsys, *words):
    where = [f"cluster.fileroot={tmp_path}", "scheduler.type=slurm", "scheduler.dry_run=true"]
    assert main(["train", "--config", SMOKE, *SETTINGS, *where, *words]) == 0
    assert list(tmp_path.iterdir()) == []
    return capsys.readouterr().out


def test_a_dry_run_prints_a_script_of_one_command_and_writes_nothing(outside, tmp_path, capsys):
    text = script(tmp_path, capsys, "cluster.n_nodes=2", "scheduler.sbatch=--partition=gpu --exclusive")
    lines = text.splitlines()
    for flag in ("nodes=2", "ntasks-per-node=1", "cpus-per-task=1", "partition=gpu", "exclusive", "requeue"):
        assert f"#SBATCH --{flag}" in lines
    assert "#SBATCH --signal=TERM@120" in lines  # grace_s and a minute
    (command,) = [line for line in lines if "-m dpo_kit" in line]
    assert command.startswith(f"{sys.executable} -m dpo_kit train --config {SMOKE} ")
    assert command.endswith(" trial_name=job-$SLURM_JOB_ID recover.mode=auto scheduler.type=slurm")
    assert "scheduler.dry_run" not in command


def test_the_body_may_be_papermill_and_the_shell_reads_it_back(outside, tmp_path, capsys):
    text = script(tmp_path, capsys, "scheduler.notebook=notebooks/train.ipynb", "experiment_name=it's")
    (command,) = [line for line in text.splitlines() if "-m papermill" in line]
    shown = ["bash", "-c", f"set -- {command}; printf '%s\\n' \"$@\""]
    words = subprocess.run(
        shown, env={"SLURM_JOB_ID": "7"}, capture_output=True, text=True
    ).stdout.splitlines()
    assert words[1:5] == ["-m", "papermill", "notebooks/train.ipynb", f"{tmp_path}/it's/job-7.ipynb"]
    given = json.loads(words[6])
    assert given["config"] == SMOKE
    config = config_module.load(given["config"], given["overrides"])
    assert (config.trial_name, config.experiment_name, config.recover.mode) == ("job-7", "it's", "auto")


def test_what_slurm_cannot_do_is_told(outside, tmp_path, capsys, monkeypatch):
    where = ["train", "--config", SMOKE, f"cluster.fileroot={tmp_path}", "scheduler.type=slurm"]
    assert main([*where, "scheduler.dry_run=true", "scheduler.sbatch=gpu"]) == 2
    assert "'gpu' is no option; write --partition=gpu" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert main([*where, "cluster.n_nodes=2", "actor.backend=fsdp:d2"]) == 2
    assert "cluster.n_nodes = 2 is more than the 1 nodes of job 7" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert main([*where, "--detach"]) == 2 if not beds.permitted() else True


def figures(run_dir):
    lines = [line for line in metrics.read_metrics(run_dir) if "dpo/loss" in line]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    return [[line[name] for name in ("dpo/loss", "grad_norm", "dpo/reward_margin")] for line in lines]


@on_slurm
@pytest.mark.notebook
def test_a_job_of_papermill_that_is_requeued_ends_with_the_undisturbed_losses(outside, tmp_path):
    command = [
        sys.executable,
        "-m",
        "dpo_kit",
        "train",
        "--config",
        SMOKE,
        *SETTINGS,
        "evaluator.num_samples=0",
    ]
    here = [*command, f"cluster.fileroot={tmp_path / 'local'}", "trial_name=one"]
    done = subprocess.run(here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "runs"
    notebook = f"scheduler.notebook={project_root() / 'notebooks' / 'train.ipynb'}"
    with beds.slurm_cluster() as environment:
        submit = [*command, f"cluster.fileroot={root}", "scheduler.type=slurm", notebook]
        submit += ["scheduler.sbatch=--ntasks=1 --cpus-per-task=2"]
        done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        job = done.stdout.split()[1].rstrip(":")
        run_dir = root / "smoke" / f"job-{job}"
        log = root / ".cache" / "slurm" / f"{job}_0_log.out"

        def until(condition, seconds):
            deadline = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
                time.sleep(0.05)

        print(time.time())
        until(lambda: (read_status(run_dir).get("step") or 0) >= 6, 180)
        subprocess.run(["scontrol", "requeue", job], env=environment, check=True)
        print(time.time())
        until(lambda: read_status(run_dir)["state"] == "preempted", 60)
        before = read_status(run_dir)["step"]
        assert 6 <= before < STEPS
        beds.start_now(environment, job)
        print(time.time())
        until(lambda: read_status(run_dir)["state"] == "done", 240)
    assert read_status(run_dir)["attempt"] == 2
    assert (
        f"goes on from its last checkpoint, step-{before}"
        in (run_dir.parent / f"job-{job}.ipynb").read_text()
    )
    local, here = figures(tmp_path / "local" / "smoke" / "one"), figures(run_dir)
    for one, other in zip(local, here, strict=True):
        assert other == pytest.approx(one, abs=1e-5, rel=1e-5)
