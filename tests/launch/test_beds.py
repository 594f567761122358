"""The hosts, Ray and Slurm that multi-node tests stand on: what they claim to be, they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import ray_cluster as ray_bed
from tests import slurm_cluster as slurm_bed
from tests.hosts import hosts, permitted

on_hosts = pytest.mark.skipif(bool(permitted()), reason=permitted())
on_slurm = pytest.mark.skipif(bool(slurm_bed.permitted()), reason=slurm_bed.permitted())
on_ray = pytest.mark.skipif(bool(ray_bed.permitted()), reason=ray_bed.permitted())

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("listening", flush=True)
    connection, caller = server.accept()
    while data := connection.recv(100):
        connection.sendall(data)
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=2) as connection:
    print("connected", flush=True)
    for line in sys.stdin:
        connection.sendall(line.encode())
        try:
            print(connection.recv(100).decode(), end="", flush=True)
        except TimeoutError:
            print("silence", flush=True)
"""


def line_of(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@on_hosts
def test_two_hosts_have_names_and_addresses_and_a_cable_between_them():
    with hosts() as (a, b):
        names = [host.run(["hostname"]).stdout.strip() for host in (a, b)]
        assert names == ["host-a", "host-b"] == [a.name, b.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        assert line_of(b.popen([sys.executable, "-c", ECHO, b.address], **pipes)) == "listening"
        asking = a.popen([sys.executable, "-c", ASK, b.address], **pipes)
        assert line_of(asking) == "connected"

        def said(text: str) -> str:
            assert asking.stdin is not None
            print(text, file=asking.stdin, flush=True)
            return line_of(asking)

        assert said("one") == "one"
        b.cut()
        assert said("two") == "silence"
        b.heal()
        # Late, on the connection that was open all along: the cut lost no byte.
        answers = [said("three") for _ in range(5)]
        assert "two" in "".join(answers)
        b.crash()
        assert b.processes() == []
        assert len(a.processes()) == 1


DAEMON = """
import subprocess
quiet = subprocess.DEVNULL
sleeper = subprocess.Popen(["sleep", "99"], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
print(sleeper.pid)
"""
HOLDERS = """
import time
from tests.hosts import hosts
with hosts() as made:
    print(*(host.holder for host in made), made[0].switch, flush=True)
    time.sleep(99)
"""


@on_hosts
def test_nothing_of_hosts_is_left_after_a_failure_and_after_a_kill():
    pids = []

    def fails() -> None:
        with hosts() as made:
            pids.extend(host.holder for host in made)
            pids.extend(int(host.run([sys.executable, "-c", DAEMON]).stdout) for host in made)
            assert [psutil.Process(pid).name() for pid in pids] == ["sleep"] * 4
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fails()
    gone = [not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie" for pid in pids]
    assert gone == [True] * 4

    caller = subprocess.Popen([sys.executable, "-c", HOLDERS], stdout=subprocess.PIPE, text=True)
    holders = [psutil.Process(int(pid)) for pid in line_of(caller).split()]
    os.kill(caller.pid, signal.SIGKILL)
    caller.communicate()
    assert psutil.wait_procs(holders, timeout=10)[1] == []


DRIVER = """
import ray, sys
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Place

@ray.remote(num_cpus=1)
class Agent:
    def where(self):
        import socket
        return socket.gethostname()

    def wait(self):
        import time
        time.sleep(600)

def agents():
    group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
    assert group.wait(60)
    made = [Agent.options(scheduling_strategy=Place(group, index)).remote() for index in range(2)]
    return dict(zip(ray.get([agent.where.remote() for agent in made]), made)), group

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
found, group = agents()
print("found", *sorted(found), flush=True)
try:
    ray.get(found["host-b"].wait.remote())
except ray.exceptions.RayActorError:
    print("found", "lost", flush=True)
ray.util.remove_placement_group(group)
del found
sys.stdin.readline()
print("found", *sorted(agents()[0]), flush=True)
"""
STRANGER = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR')"


def found_by(driver: subprocess.Popen) -> str:
    """What the driver found next; Ray says things of its own between."""
    while line := line_of(driver):
        if line.startswith("found "):
            return line.removeprefix("found ")
    raise EOFError("the driver ended")


@on_ray
def test_ray_loses_a_node_that_is_cut_off_and_takes_it_back():
    with hosts() as (a, b), ray_bed.ray_cluster(a, b) as cluster:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        driver = a.popen([sys.executable, "-c", DRIVER, cluster.address], env=cluster.environment, **pipes)
        assert found_by(driver) == "host-a host-b"
        b.cut()
        assert found_by(driver) == "lost"
        b.heal()
        cluster.join(b)
        assert driver.stdin is not None
        print(file=driver.stdin, flush=True)
        assert found_by(driver) == "host-a host-b"

        # Without the token nobody gets in.
        environment = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
        refused = b.run([sys.executable, "-c", STRANGER, cluster.address], check=False, env=environment)
        assert refused.returncode != 0
        assert "InvalidAuthToken" in refused.stderr


JOB = """#!/bin/sh
srun sh -c 'echo "began $SLURM_JOB_ID $SLURM_RESTART_COUNT"'
[ -n "$SLURM_RESTART_COUNT" ] || sleep 600
"""


@on_slurm
def test_slurm_runs_a_job_and_a_requeued_one_keeps_its_number(tmp_path):
    log = tmp_path / "job.log"
    (tmp_path / "job.sh").write_text(JOB)

    def awaited(text: str) -> bool:
        deadline = time.monotonic() + 60
        while not (log.exists() and text in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return text in log.read_text()

    with slurm_bed.slurm_cluster() as environment:

        def slurm(*command: str) -> str:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return done.stdout.strip()

        job = slurm("sbatch", "--parsable", "--open-mode=append", f"--output={log}", f"{tmp_path}/job.sh")
        assert awaited(f"began {job} \n")
        slurm("scontrol", "requeue", job)
        slurm_bed.start_now(environment, job)
        assert awaited(f"began {job} 1\n"), log.read_text()
