"""Processes by identity: who is alive, how a child ends with its parent, how a tree is ended.

A pid alone is no identity (the system hands it out again), so a process is named by pid and start time
everywhere in the kit. The one Linux call (`prctl`) has a portable fallback: a thread that watches the
parent's pid.

Deliberately not here: starting ranks (supervise, launch/on_ranks), records on disk, anything that knows a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

import psutil

PARENT_PID_VARIABLE = "DPO_KIT_PARENT_PID"
_PR_SET_PDEATHSIG = 1
# Linux derives a start time from the boot time, which moves with clock corrections.
_START_TIME_TOLERANCE_S = 2.0


def identify(pid: int | None = None) -> dict[str, Any]:
    """Names a process for good: `{"pid", "create_time", "host"}`.

    Args:
        pid: process id; None means this process.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    process = psutil.Process(pid)
    return {"pid": process.pid, "create_time": process.create_time(), "host": socket.gethostname()}


def is_alive(identity: dict[str, Any] | None) -> bool:
    """True while the very process that `identify` named runs on this machine; a zombie is gone."""
    if not identity or not identity.get("pid"):
        return False
    if identity.get("host") not in (None, socket.gethostname()):
        return False
    try:
        process = psutil.Process(int(identity["pid"]))
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        started = process.create_time()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, ValueError, TypeError, OverflowError):
        return False  # the last three: no number of a process
    except psutil.AccessDenied:
        return True
    expected = identity.get("create_time")
    return expected is None or abs(started - float(expected)) < _START_TIME_TOLERANCE_S


def child_environment() -> dict[str, str]:
    """The variable by which a child knows its parent (see `die_with_parent`)."""
    return {PARENT_PID_VARIABLE: str(os.getpid())}


def die_with_parent(poll_s: float = 0.2) -> str:
    """Makes the kernel end this process when its parent ends; call it first thing in a child.

    On Linux by `PR_SET_PDEATHSIG`, which needs no cooperation of this process. Elsewhere, or when the
    call fails, a daemon thread polls the parent's pid. Both close the gap between being started and this
    call: a parent that is gone already ends the process at once.

    Args:
        poll_s: how often the fallback looks.

    Returns:
        `"prctl"` or `"watcher"`: which of the two is at work.
    """
    # Named by the parent where it set the variable: by now it may have ended and left us to another.
    parent = int(os.environ.pop(PARENT_PID_VARIABLE, 0) or os.getppid())
    signalled = _set_parent_death_signal()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    if signalled:
        return "prctl"
    threading.Thread(target=_watch_parent, args=(parent, poll_s), name="parent-watch", daemon=True).start()
    return "watcher"


def end_tree(pids: Iterable[int], grace_s: float = 0.0) -> None:
    """Ends processes and all their descendants: SIGTERM, `grace_s` seconds, then SIGKILL.

    With `grace_s` 0 they are killed at once. Returns when none of them runs any more (or after 5 s more,
    for one that the system does not release). Only pass processes that were started by the caller.
    """
    processes = _with_descendants(pids)
    if grace_s > 0:
        _signal_all(processes, signal.SIGTERM)
        processes = _wait_gone(processes, grace_s)
    # Looked up again: a process that was being ended may have started another.
    processes = _with_descendants([process.pid for process in processes]) if processes else []
    _signal_all(processes, signal.SIGKILL)
    _wait_gone(processes, 5.0)


def end_children(children: Iterable[subprocess.Popen]) -> None:
    """Kills those that still run, with their descendants, and reaps all of them."""
    end_tree([child.pid for child in children if child.poll() is None])
    for child in children:
        child.wait()


def python_path() -> str:
    """`PYTHONPATH` that lets a child import whatever this process can import."""
    return os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))


def physical_cores() -> int:
    """Physical cores this process may use, at least 1."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or physical
    return max(1, min(physical, allowed))


def _set_parent_death_signal() -> bool:
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def _watch_parent(parent: int, poll_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(poll_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _with_descendants(pids: Iterable[int]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {member.pid: member for member in [process, *process.children(recursive=True)]}
    return list(found.values())


def _signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    left = processes
    while left:
        left = [process for process in left if _runs(process)]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


def _runs(process: psutil.Process) -> bool:
    # Our own children stay zombies until their Popen is polled: they no longer run, which is what counts.
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def popen(
    arguments: list[str], environment: dict[str, str], log: Any, *, waits: bool = False
) -> subprocess.Popen:
    """A child in a session of its own (Ctrl-C in a terminal reaches the supervisor only) that ends with us.

    Args:
        arguments: the module it runs, and what follows.
        environment: all of its variables but those that every child gets.
        log: an open file for what it says.
        waits: it stands in `wait_to_go` until `let_go`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_kit.system.child", *arguments],
        env={**environment, **child_variables()},
        stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def imported() -> None:
    """Sets the garbage collector going, which `system/child` stopped; what is there by now it need not look at."""
    gc.freeze()
    gc.enable()


def wait_to_go() -> None:
    """Waits until the parent lets this process go; ends it without a word when the parent is gone."""
    if not os.read(0, 1):
        os._exit(0)


def leave(code: int) -> NoReturn:
    """Ends this process at once: nothing is torn down, which takes torch most of a second or waits for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def let_go(child: subprocess.Popen) -> None:
    """Lets a child go that waits; one that has ended meanwhile is found by its exit status."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(b"\n")


def child_variables() -> dict[str, str]:
    """Variables of every process that the kit starts."""
    return {**child_environment(), "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}


def answer_requests() -> None:
    """Lets this process write its threads' stacks to stderr when it gets SIGUSR1."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=False)


def rank_environment(
    num_ranks: int, rank: int, *, local: tuple[int, int] | None = None, interface: str | None = None
) -> dict[str, str]:
    """Environment of one rank: where it stands, the machine's cores shared out, by which network it talks.

    Args:
        num_ranks, rank: of the run.
        local: local rank, and how many ranks this machine has; None: all are here.
        interface: of the network; None: loopback only.
    """
    here, ranks_here = local or (rank, num_ranks)
    talks = interface or ("lo" if sys.platform == "linux" else "lo0")
    given = {} if interface is None else os.environ  # loopback is no matter of taste
    return {
        **os.environ,
        **child_variables(),
        "RANK": str(rank),
        "LOCAL_RANK": str(here),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(ranks_here),
        "OMP_NUM_THREADS": str(max(1, physical_cores() // ranks_here)),
        "GLOO_SOCKET_IFNAME": given.get("GLOO_SOCKET_IFNAME", talks),
        # NCCL takes a name for the beginning of one unless it is told otherwise.
        "NCCL_SOCKET_IFNAME": given.get("NCCL_SOCKET_IFNAME", f"={talks}" if interface else talks),
        "TOKENIZERS_PARALLELISM": "false",
    }
