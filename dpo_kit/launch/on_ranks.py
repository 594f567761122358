"""An importable function on N ranks for the length of a cell.

    results = spawn(my_module.sum_of_ranks, 3, num_ranks=2)      # [result of rank 0, result of rank 1]

Each rank is a process of its own with `torch.distributed` initialised over a file, so no port is opened.
The ranks end with this process, however it ends, and with the call, however that ends.

Deliberately not here: training runs (supervise), functions that live in a notebook's `__main__`.
"""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_kit.errors import UserError
from dpo_kit.system import processes

_POLL_S = 0.05
BACKENDS = ("gloo", "nccl")


def spawn(
    fn: Callable[..., Any], *args: Any, num_ranks: int = 2, backend: str = "gloo", timeout_s: float = 600.0
) -> list[Any]:
    """Runs `fn(*args)` on every rank of a fresh process group and returns the results in rank order.

    A rank's start takes 6-19 s on two cores (importing torch). What a rank prints is lost; return it.

    Args:
        fn: a function that `import` finds by its module and name, not one of a notebook, a lambda or one
            defined inside another. Its rank is `torch.distributed.get_rank()`.
        *args: given to every rank; anything pickle takes.
        num_ranks: number of processes, 1 or more.
        backend: `gloo` (CPU) or `nccl` (rank N uses CUDA device N).
        timeout_s: seconds for the whole call; also the time limit of a collective.

    Raises:
        UserError: the function cannot be imported elsewhere, or an argument is impossible.
        RuntimeError: a rank raised (`rank 1: ValueError: ...`, traceback as a note), died or was too slow.
    """
    task = {**importable_name(fn), "args": args, "backend": backend, "timeout_s": timeout_s}
    if num_ranks < 1:
        raise UserError(f"num_ranks = {num_ranks} is not a number of ranks; use 1 or more")
    if backend not in BACKENDS:
        raise UserError(f"backend = {backend!r} is not one of {', '.join(BACKENDS)}")
    with tempfile.TemporaryDirectory(prefix="dpo-kit-spawn-") as name:
        folder = Path(name)
        (folder / "task.pkl").write_bytes(pickle.dumps(task))
        ranks: list[subprocess.Popen] = []
        try:
            for rank in range(num_ranks):
                ranks.append(_start_rank(folder, rank, num_ranks))
            _wait(folder, ranks, timeout_s)
            return [_result(folder, rank)["result"] for rank in range(num_ranks)]
        finally:
            processes.end_children(ranks)


def importable_name(fn: Callable[..., Any]) -> dict[str, str]:
    """`{"module", "name"}` by which another process finds the function.

    Raises:
        UserError: it does not.
    """
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    where = "write it into a .py file and import it from there"
    if not module or not name:
        raise UserError(f"{fn!r} is not a function that another process can import; {where}")
    if module == "__main__":
        raise UserError(
            f"{name} is defined in the notebook or script itself; {where}: ranks cannot see it here"
        )
    if "<" in name:
        raise UserError(f"{module}.{name} is a lambda or defined inside another function; {where}")
    if getattr(importlib.import_module(module), name.split(".")[0], None) is None:
        raise UserError(f"{module} holds no {name}; {where}")
    return {"module": module, "name": name}


def _start_rank(folder: Path, rank: int, num_ranks: int) -> subprocess.Popen:
    with open(folder / f"rank-{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dpo_kit.launch.one_rank", str(folder)],
            env=processes.rank_environment(num_ranks, rank),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(folder: Path, ranks: list[subprocess.Popen], timeout_s: float) -> None:
    """Returns when every rank has ended well; raises at the first that did not."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            raise _failure(folder, codes)
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            slow = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise RuntimeError(f"rank {slow}: not done after {timeout_s:g} s (timeout_s); ended")
        time.sleep(_POLL_S)


def _failure(folder: Path, codes: list[int | None]) -> RuntimeError:
    """The earliest error: a rank that loses its peer fails, too, but later."""
    found = [(rank, _result(folder, rank)) for rank, code in enumerate(codes) if code]
    if causes := [(rank, error) for rank, error in found if "error" in error]:
        rank, error = min(causes, key=lambda cause: cause[1]["at"])
        failure = RuntimeError(f"rank {rank}: {error['error']}")
        failure.add_note(f"On rank {rank}:\n{error['traceback']}")
        return failure
    rank = found[0][0]
    code = codes[rank] or 0
    cause = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
    failure = RuntimeError(f"rank {rank}: {cause} without a message")
    failure.add_note((folder / f"rank-{rank}.log").read_text("utf-8", "replace")[-4000:])
    return failure


def _result(folder: Path, rank: int) -> dict[str, Any]:
    try:
        return pickle.loads((folder / f"result-{rank}.pkl").read_bytes())
    except FileNotFoundError:
        return {}
