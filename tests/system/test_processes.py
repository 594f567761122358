"""Identity, ends with the parent, ended trees."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from dpo_kit.system import processes

# A parent that starts a child as the kit starts its ranks, prints the child's pid and waits to be ended.
PARENT = """
import os, subprocess, sys, time
from dpo_kit.system.processes import child_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, **child_environment()},
                         start_new_session=True, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""
CHILD = """
import time
from dpo_kit.system import processes
{patch}
print(processes.die_with_parent(), flush=True)
time.sleep(60)
"""


def gone_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not processes.is_alive({"pid": pid}):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("patch", "way"),
    [
        ("pass", "prctl" if sys.platform == "linux" else "watcher"),
        ("processes._set_parent_death_signal = lambda: False", "watcher"),
        ("processes.sys.platform = 'darwin'", "watcher"),
        ("processes.ctypes.CDLL = lambda *a, **k: (_ for _ in ()).throw(OSError())", "watcher"),
    ],
)
def test_a_child_ends_with_its_killed_parent(patch, way):
    command = [sys.executable, "-c", PARENT, CHILD.format(patch=patch)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pid, told = parent.stdout.readline().split()
        assert told == way
        assert processes.is_alive({"pid": int(pid)})
    finally:
        parent.kill()
        parent.communicate()
    try:
        assert gone_within(int(pid), 2.0)
    finally:
        processes.end_tree([int(pid)])


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    code = "from dpo_kit.system import processes; processes.die_with_parent(); print('survived')"
    ended = subprocess.run([sys.executable, "-c", "pass"], check=True)
    environment = {**os.environ, processes.PARENT_PID_VARIABLE: "999999999"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0
    assert (done.returncode, done.stdout) == (-9, "")


def test_identity_is_more_than_a_pid():
    me = processes.identify()
    assert processes.is_alive(me)
    assert not processes.is_alive({**me, "create_time": me["create_time"] - 60})
    assert not processes.is_alive({**me, "host": "elsewhere"})
    assert not processes.is_alive(None)
    assert not processes.is_alive({"pid": 999999999})


def test_a_zombie_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = {"pid": child.pid}
    deadline = time.monotonic() + 20
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes.is_alive(identity)
    child.wait()


def test_end_tree_ends_grandchildren_and_those_that_ignore_sigterm():
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    grandchild_pid = int(child.stdout.readline())
    started = time.monotonic()
    processes.end_tree([child.pid], grace_s=0.5)
    assert 0.4 < time.monotonic() - started < 5
    assert not processes.is_alive({"pid": child.pid})
    assert not processes.is_alive({"pid": grandchild_pid})
    child.communicate()


def test_physical_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(processes.os, "sched_getaffinity", raising=False)
    assert processes.physical_cores() >= 1
