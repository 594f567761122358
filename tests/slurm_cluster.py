"""Slurm on this machine, one node: munged, slurmctld and slurmd out of one private folder, on ports of their own.

    with slurm_cluster() as environment:
        subprocess.run(["sbatch", "job.sh"], env=environment)

Debian's `slurm-wlm` and `munge`; no system service, no cgroups, no accounting (so no `sacct`).

Deliberately not here: jobs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dpo_kit.system import processes

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_STARTS_S = 60
_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def permitted() -> str:
    """Empty where Slurm can run, else why not."""
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"no Slurm: {', '.join(missing)} not found (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "no Slurm: slurmd wants root"


@contextlib.contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Runs the three daemons; the environment in which Slurm's commands find them."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for made in ("state", "spool"):
            (folder / made).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        configuration = folder / "slurm.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                ports=_free_ports(),
                folder=folder,
                cpus=os.cpu_count(),
            )
        )
        environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(configuration)}
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{part}-file={folder}/munge.{part}" for part in ("pid", "log", "seed")]
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = stack.enter_context(open(folder / f"{command[0]}.log", "wb"))
            daemon = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(processes.end_children, [daemon])
        _await_idle(environment, folder)
        try:
            yield environment
        finally:
            _end_jobs(environment)


def start_now(environment: dict[str, str], job: str) -> None:
    """Starts a requeued job as soon as its old processes are gone; Slurm lets it wait."""
    deadline = time.monotonic() + _STARTS_S
    while True:
        state = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        if subprocess.run(state, env=environment, capture_output=True, text=True).stdout.strip() == "PENDING":
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=environment, check=True
            )
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} is not pending after {_STARTS_S} s")
        time.sleep(0.2)


def _end_jobs(environment: dict[str, str]) -> None:
    """Jobs outlive the daemons; a killed one leaves the queue when its processes are gone."""
    deadline = time.monotonic() + _STARTS_S
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    while time.monotonic() < deadline:
        asked = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True)
        if not asked.stdout.strip():
            return
        time.sleep(0.2)


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        return [found.getsockname()[1] for found in sockets]


def _await_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + _STARTS_S
    command = ["sinfo", "--noheader", "--format=%T"]
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
            if asked.stdout.strip() == "idle":
                return
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            raise TimeoutError(f"Slurm's node is not idle after {_STARTS_S} s\n{logs}")
        time.sleep(0.2)
