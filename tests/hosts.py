"""Hosts on one machine: network namespaces with names of their own, on one switch; files and pids are shared.

    with hosts() as (a, b):
        a.run(["hostname"]).stdout              # host-a
        a.popen([sys.executable, "-m", "dpo_kit", ...], log=tmp_path / "a.log")
        b.cut()                                 # the cable of b is out: packets vanish, nobody is told
        b.heal()
        b.crash()                               # all processes on b are gone at once

    a 10.77.0.1 --- switch --- b 10.77.0.2      no way out to any other network

Nothing has a name outside: a namespace lives as long as its holder, a `sleep` that ends with the process that called
`hosts`. So runs beside each other do not meet, and after a kill nothing is left. Names of hosts resolve nowhere.

Deliberately not here: what runs on the hosts (tests.ray_cluster).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil

from dpo_kit.system import processes

# Not every user has the folder of `ip` on the path.
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_TOOLS = ("ip", "unshare", "nsenter", "setpriv")


@dataclass
class Host:
    """One of the hosts: `name`, `address`, and what can be done to it."""

    name: str
    address: str
    holder: int
    switch: int
    started: list[subprocess.Popen] = field(default_factory=list)

    def popen(
        self, command: Sequence[str | Path], log: Path | IO | None = None, **options: Any
    ) -> subprocess.Popen:
        """Starts a command on this host, in a session of its own; ended with the host at the latest.

        Args:
            command: what to run. The process returned is it, not a wrapper.
            log: file that its output is added to.
            options: of `subprocess.Popen`.
        """
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        with contextlib.ExitStack() as stack:
            if log is not None:
                output = stack.enter_context(open(log, "ab")) if isinstance(log, Path) else log
                options |= {"stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(_inside(self.holder, command), **options)
        self.started.append(process)
        return process

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess:
        """Runs a command to its end and returns its output as text; see `subprocess.run`."""
        options = {"check": True, "text": True, "timeout": 120, **options}
        if not {"stdout", "stderr", "capture_output"} & set(options):
            options["capture_output"] = True
        return subprocess.run(_inside(self.holder, command), **options)

    def cut(self) -> None:
        """Takes the cable out: connections stay open and hear nothing, as when a switch fails."""
        _ip(self.switch, "link", "set", self.name, "down")

    def heal(self) -> None:
        """Puts the cable in again."""
        _ip(self.switch, "link", "set", self.name, "up")

    def processes(self) -> list[psutil.Process]:
        """What runs on this host, daemons included."""
        here = os.stat(f"/proc/{self.holder}/ns/net").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if process.pid != self.holder and os.stat(f"/proc/{process.pid}/ns/net").st_ino == here:
                    found.append(process)
        return found

    def crash(self) -> None:
        """Kills all that runs on this host, until nothing is left."""
        while left := self.processes():
            processes.end_tree(process.pid for process in left)
            for process in self.started:
                process.poll()


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts of these names (`host-a` and `host-b` without any), gone afterwards with all that runs on them."""
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_holder("switch"))
        _ip(switch, "link", "add", "bridge", "type", "bridge")
        _ip(switch, "link", "set", "bridge", "up")
        made = []
        for number, name in enumerate(names or ("host-a", "host-b"), start=1):
            holder = stack.enter_context(_holder(name))
            host = Host(name, f"10.77.0.{number}", holder, switch)
            stack.callback(_end, host)
            _connect(host)
            made.append(host)
        yield made


@cache
def permitted() -> str:
    """Empty where hosts can be made, else why not: for `pytest.mark.skipif(bool(permitted()), reason=...)`."""
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"no network namespaces: {', '.join(missing)} not found (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "add", "bridge", "type", "bridge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": _PATH},
    )
    return f"no network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def _holder(name: str) -> Iterator[int]:
    """The process that two fresh namespaces live by; its pid."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts"]
    process = subprocess.Popen(
        [
            *command,
            "sh",
            "-c",
            'hostname "$0" && ip link set lo up && echo made && exec sleep infinity',
            name,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PATH": _PATH},
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"made\n":
            raise RuntimeError(f"the namespaces of {name} could not be made; tests.hosts.permitted says why")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _connect(host: Host) -> None:
    _ip(host.switch, *f"link add {host.name} type veth peer name eth0 netns {host.holder}".split())
    _ip(host.switch, "link", "set", host.name, "master", "bridge", "up")
    _ip(host.holder, *f"address add {host.address}/24 dev eth0".split())
    _ip(host.holder, "link", "set", "eth0", "up")


def _end(host: Host) -> None:
    host.crash()
    for process in host.started:
        with process:  # reaps it and closes its pipes
            pass


def _ip(holder: int, *arguments: str) -> None:
    command = _inside(holder, ["ip", *arguments])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _inside(holder: int, command: Sequence[str | Path]) -> list[str]:
    return ["nsenter", f"--target={holder}", "--net", "--uts", "--", *map(str, command)]
