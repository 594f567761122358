"""Two gloo ranks that live as long as the pytest session: a rank's start costs 6-19 s, a call milliseconds.

    def test_sum(ranks):
        assert ranks.run(sum_of_ranks, 3) == [7, 7]

`ranks.run(fn, *args)` calls `fn(*args)` on every rank, `torch.distributed` initialised freshly over a file
(gloo), and returns the results in rank order. `fn` must be importable: a top-level function of a test module
or of the package. A raising rank gives `RuntimeError("rank 1: ValueError: ...")` with the remote traceback as
a note; the pool is usable afterwards (a rank that hangs in a collective because of it is started again).

Run as `python -m tests.ranks DESCRIPTOR FOLDER` this file is one rank of the pool.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from dpo_kit.launch import on_ranks, one_rank
from dpo_kit.records.status import one_line
from dpo_kit.system import processes

# After one rank has raised, how long the others may take to come back before they are taken for stuck.
_AFTER_ERROR_S = 3.0


class Ranks:
    """A pool of ranks, started at its first call."""

    def __init__(self, size: int = 2):
        self.size = size
        self.processes: list[subprocess.Popen] = []
        self.pipes: list[Connection] = []
        self.calls = 0
        self.folder = tempfile.TemporaryDirectory(prefix="dpo-kit-ranks-")

    def run(self, fn: Any, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """Calls `fn(*args)` on every rank; the results in rank order."""
        name = on_ranks.importable_name(fn)
        if not self.processes:
            self._start()
        self.calls += 1
        store = Path(self.folder.name) / f"store-{self.calls}"
        task = pickle.dumps({**name, "args": args, "store": store, "path": sys.path, "timeout_s": timeout_s})
        try:
            for pipe in self.pipes:
                pipe.send_bytes(task)
            answers = self._collect(timeout_s)
        except BaseException:
            self.close()
            raise
        return self._results(answers, timeout_s)

    def close(self) -> None:
        """Ends the ranks; the next call starts new ones."""
        processes.end_children(self.processes)
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        for rank in range(self.size):
            mine, theirs = Pipe()
            log = Path(self.folder.name) / f"rank-{rank}.log"
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.ranks", str(theirs.fileno())],
                    env=processes.rank_environment(self.size, rank),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def _collect(self, timeout_s: float) -> dict[int, dict]:
        """Answers by rank; incomplete when a rank raised or died and others did not come back."""
        answers: dict[int, dict] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.size and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    code = self.processes[rank].wait()
                    answers[rank] = {
                        "error": f"died with status {code}",
                        "traceback": "",
                        "at": 0.0,
                        "dead": True,
                    }
                if "error" in answers[rank]:
                    deadline = min(deadline, time.monotonic() + _AFTER_ERROR_S)
        return answers

    def _results(self, answers: dict[int, dict], timeout_s: float) -> list[Any]:
        errors = sorted((answer["at"], rank) for rank, answer in answers.items() if "error" in answer)
        if len(answers) < self.size or any("dead" in answer for answer in answers.values()):
            self.close()
        if errors:
            rank = errors[0][1]
            failure = RuntimeError(f"rank {rank}: {answers[rank]['error']}")
            failure.add_note(f"On rank {rank}:\n{answers[rank]['traceback']}")
            raise failure
        if len(answers) < self.size:
            slow = [rank for rank in range(self.size) if rank not in answers]
            raise RuntimeError(f"rank {slow[0]}: no answer after {timeout_s:g} s")
        return [answers[rank]["result"] for rank in range(self.size)]


def serve(pipe: Connection) -> None:
    """One rank: answers tasks until the pipe closes."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        sys.path[:] = task["path"]
        try:
            # The group of the call before is left only now, when no rank talks on it any more.
            if dist.is_initialized():
                dist.destroy_process_group()
                _clear_sharding_prop_cache()  # it remembers meshes, and with them their groups
            one_rank.join(task["store"], "gloo", task["timeout_s"])
            result = one_rank.find(task["module"], task["name"])(*task["args"])
            answer = pickle.dumps({"result": result})
        except BaseException as error:
            answer = pickle.dumps(
                {"error": one_line(error), "traceback": traceback.format_exc(), "at": time.time()}
            )
        pipe.send_bytes(answer)


if __name__ == "__main__":
    processes.die_with_parent()
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
