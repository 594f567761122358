"""The ranks that run on this machine: started waiting, let go, signalled, ended.

    with waiting(run_dir, share) as ranks:      they import what they need
        ranks.let_go()                          they join the others and work

A supervisor holds its own ranks so, and a node agent those of its node (`agent`); the supervisor of several nodes holds
`nodes.NodeRanks`, which can do the same.

Deliberately not here: watching over them (children), what became of the run (supervisor).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_kit.system.processes import end_children, let_go, popen, rank_environment


@dataclass(frozen=True)
class Share:
    """Which of a run's ranks are this machine's, and how they find the others."""

    first: int  # rank
    count: int
    size: int  # ranks of the run
    device: str  # cpu or cuda
    module: str  # that a rank runs
    attempt: int
    # torch.distributed's address; None: all ranks are here, and a file will do.
    init_method: str | None = None
    interface: str | None = None  # of the network; None: loopback
    # Local rank and local size of the only one, where others are beside it.
    local: tuple[int, int] | None = None


class LocalRanks:
    """Children of this process, in rank order."""

    lost = ""  # what is on this machine is not lost

    def __init__(self, children: list[subprocess.Popen]):
        self.children = children

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self.children]

    def codes(self) -> list[int | None]:
        """Exit status of each, None of one that runs."""
        return [child.poll() for child in self.children]

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to one of them, or to all that run."""
        for child in self.children if rank is None else [self.children[rank]]:
            child.send_signal(number)

    def let_go(self) -> None:
        """Lets them work; one that has ended meanwhile is found by its exit status."""
        for child in self.children:
            let_go(child)

    def end(self) -> None:
        """Kills those that run and waits for all of them."""
        end_children(self.children)


@contextlib.contextmanager
def waiting(run_dir: Path, share: Share) -> Iterator[LocalRanks]:
    """The ranks of a share, importing what they need until `let_go`; those that are not let go leave no trace."""
    numbers = range(share.first, share.first + share.count)
    logs = [run_dir / "logs" / f"rank-{rank}.log" for rank in numbers]
    sizes = [log.stat().st_size if log.exists() else 0 for log in logs]
    children: list[subprocess.Popen] = []
    # A fresh file for every start: ranks would join the group that a used one describes.
    with tempfile.TemporaryDirectory(prefix="dpo-kit-init-") as folder:
        init_method = share.init_method or (Path(folder) / "store").as_uri()
        try:
            for at, (rank, path) in enumerate(zip(numbers, logs, strict=True)):
                place = share.local or (at, share.count)
                environment = {
                    **rank_environment(share.size, rank, local=place, interface=share.interface),
                    "DPO_KIT_INIT_METHOD": init_method,
                    "DPO_KIT_DEVICE": share.device,
                }
                if share.device == "cuda":
                    environment.pop("OMP_NUM_THREADS")
                for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:
                    del environment[name]  # of torchrun's own rendezvous
                with open(path, "ab") as log:
                    if share.attempt > 1:
                        log.write(f"--- attempt {share.attempt}\n".encode())
                        log.flush()
                    children.append(popen([share.module, str(run_dir)], environment, log, waits=True))
            yield LocalRanks(children)
        finally:
            end_children(children)
            for process, path, size in zip(children, logs, sizes, strict=False):
                if process.stdin and not process.stdin.closed:
                    process.stdin.close()
                    if process.returncode == -signal.SIGKILL:  # not by itself: it has nothing to say
                        with contextlib.suppress(OSError):
                            os.truncate(path, size)
                            if not size:
                                path.unlink()
