"""Slurm: inside an allocation a run's agents start through srun; outside of one, a script is submitted.

    dpo-kit train --config X scheduler.type=slurm cluster.n_nodes=2    submits; scheduler.dry_run=true prints the script
    python -m dpo_kit.launch.slurm RUN_DIR TOKEN                       srun of one agent a node, the supervisor's child

The script's body is one `dpo-kit train` or, with `scheduler.notebook`, one papermill command. The job's number is the
trial's name and `recover.mode` is auto: a requeued job goes on from its last checkpoint. Slurm's warning (SIGTERM
to the steps, `cluster.grace_s` and some before the end) reaches the agents; they ask the supervisor to save and end.

Deliberately not here: ranks (supervise), what the script's text looks like (submitit).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, ExitStatus, UserError
from dpo_kit.launch.world import check_package
from dpo_kit.supervise import nodes

# Beyond `cluster.grace_s`, in which a run saves and ends.
_WARNING_S = 60
_OF_SUBMISSION = (
    "scheduler.dry_run=",
    "scheduler.notebook=",
    "scheduler.sbatch=",
    "scheduler.type=",
    "trial_name=",
)
_JOB = "JOB-NUMBER"  # stands for the shell's variable until all is quoted


def submits(config: Config) -> bool:
    """Whether starting a run means to submit a job: nothing runs in one yet, or the script is asked for."""
    scheduler = config.scheduler
    return scheduler.type == "slurm" and (scheduler.dry_run or "SLURM_JOB_ID" not in os.environ)


def submit(config: Config, source: str, overrides: Sequence[str]) -> int:
    """Submits the run as a job, or prints the script (`scheduler.dry_run`).

    Args:
        config: as `source` and `overrides` give it.
        source: a params file.
        overrides: dotted assignments.
    """
    check_package("slurm")
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            """Also where Slurm is not: a script can be printed there."""
            return 2

    folder = Path(config.cluster.fileroot) / ".cache" / "slurm"
    executor = Executor(folder)
    executor.update_parameters(**_parameters(config))
    command = _command(config, source, overrides)
    if config.scheduler.dry_run:
        print(executor._make_submission_file_text(command, "dry-run"))
        return 0
    try:
        for made in (
            folder,
            Path(config.cluster.fileroot) / config.experiment_name,
        ):  # neither tool makes them
            made.mkdir(parents=True, exist_ok=True)
        job = executor._submit_command(command)
    except Exception as error:  # of sbatch, in its own words
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())[-400:]}") from None
    print(
        f"job {job.job_id}: {Path(config.cluster.fileroot) / config.experiment_name / _trial(config, job.job_id)}"
    )
    return 0


def _trial(config: Config, job: str) -> str:
    return config.trial_name or f"job-{job}"


def _parameters(config: Config) -> dict[str, Any]:
    """What submitit puts at the head of the script."""
    cluster = config.cluster
    count = nodes.layout(config)[0]
    on_cuda = cluster.n_gpus_per_node not in (0, "auto")
    own = {"signal": f"TERM@{int(cluster.grace_s) + _WARNING_S}", "requeue": True}
    for word in shlex.split(config.scheduler.sbatch or ""):
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(
                [
                    f"scheduler.sbatch = {config.scheduler.sbatch!r}: {word!r} is no option; write --partition=gpu"
                ]
            )
        own[name] = value or True
    return {
        "job_name": config.experiment_name,
        "nodes": cluster.n_nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": int(cluster.n_gpus_per_node) if on_cuda else None,
        "cpus_per_task": None if on_cuda else count,
        "time": None,  # the partition's
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": own,
        # The run's supervisor has a handler of its own; papermill must outlive the signal to wait for it.
        "setup": ["trap '' TERM"],
    }


def _command(config: Config, source: str, overrides: Sequence[str]) -> str:
    given = [word for word in overrides if not word.startswith(_OF_SUBMISSION)]
    given += [f"trial_name={_trial(config, _JOB)}", "recover.mode=auto", "scheduler.type=slurm"]
    if notebook := config.scheduler.notebook:
        name = f"{_trial(config, _JOB)}.ipynb"
        out = Path(config.cluster.fileroot) / config.experiment_name / name
        parameters = json.dumps({"config": source, "overrides": given})
        words = [sys.executable, "-m", "papermill", notebook, str(out), "-y", parameters]
    else:
        words = [sys.executable, "-m", "dpo_kit", "train", "--config", source, *given]
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """A word for the shell, the job's number as the shell knows it."""
    text = shlex.quote(word)
    return text.replace(_JOB, "'\"$SLURM_JOB_ID\"'" if text.startswith("'") else "$SLURM_JOB_ID")


def main(run_dir: Path, token: str) -> None:
    """Becomes srun of the run's agents."""
    config = config_module.load(run_dir / "config.yaml")
    if submits(config):  # srun would wait for an allocation of its own
        raise UserError(f"{run_dir.name} runs in a job of Slurm, and this is none; resume it in one")
    count = str(config.cluster.n_nodes)
    agent = [sys.executable, "-m", "dpo_kit.system.child", "dpo_kit.supervise.agent"]
    own = [
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--overlap",
        "--cpu-bind=none",
    ]
    # The signal was ignored by the job's script: agents must hear it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execvp("srun", ["srun", *own, *agent, str(run_dir), token, "SLURM_NODEID"])


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(error, flush=True)
        sys.exit(ExitStatus.MISTAKE)
