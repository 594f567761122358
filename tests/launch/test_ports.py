"""What listens while a run on this machine works: nothing outside loopback."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time

import psutil
import pytest

from tests.supervise.test_kills import start


def listeners(pids: list[int]) -> set[str]:
    """Addresses on which processes accept connections."""
    return {
        connection.laddr.ip.removeprefix("::ffff:")  # an IPv4 address of a socket for both
        for connection in psutil.net_connections(kind="inet")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("scheduler", ["local", "ray"])
def test_nothing_of_a_run_listens_outside_loopback(tmp_path, scheduler):
    """Not even where the run starts a Ray cluster of its own."""
    if scheduler == "ray":
        pytest.importorskip("ray")
    process = start(tmp_path, "one", f"scheduler.type={scheduler}")
    found: set[str] = set()
    while process.poll() is None:
        try:
            tree = [
                process.pid,
                *(child.pid for child in psutil.Process(process.pid).children(recursive=True)),
            ]
        except psutil.NoSuchProcess:
            break
        found |= listeners(tree)
        time.sleep(0.3)  # the ranks listen all along; a look at every socket takes time from them
    assert process.wait() == 0, (tmp_path / "one.log").read_text()
    assert found, "the ranks' own sockets were not seen: the check looks in the wrong place"
    assert {address for address in found if not ipaddress.ip_address(address).is_loopback} == set()


def test_the_check_sees_a_listener_on_every_interface():
    code = (
        "import socket, time; s = socket.create_server(('0.0.0.0', 0)); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert listeners([process.pid]) == {"0.0.0.0"}
        process.kill()
