"""A node's agent: starts and watches the ranks of one machine, as the supervisor of a run (maybe elsewhere) orders.

    python -m dpo_kit.supervise.agent RUN_DIR TOKEN NODE [ADDRESS [LOCAL_RANK LOCAL_SIZE]]    NODE: a number, or the
                                                                                             variable that holds it

It ends, with its ranks, when the supervisor says so, when another supervisor has taken over, and when the supervisor
has said nothing for a minute: a node that was cut off must not go on by itself. A SIGTERM (a scheduler's warning) is
passed on as a request to save and end.

Deliberately not here: any decision about the run; how the files are written and why (`nodes`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import dpo_kit
from dpo_kit.errors import ExitStatus
from dpo_kit.records import manifest
from dpo_kit.supervise import nodes
from dpo_kit.supervise.nodes import BEAT_S, SILENCE_S, Silence
from dpo_kit.supervise.ranks import LocalRanks, Share, waiting
from dpo_kit.system import machine, network

_POLL_S = 0.1


def facts_of_this_machine(run_dir: Path) -> dict[str, Any]:
    """What a node proves before ranks start."""
    package = Path(dpo_kit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return {
        "host": socket.gethostname(),
        "versions": {"dpo-kit": dpo_kit.__version__, **manifest.versions(("torch", "transformers"))},
        "code": digest.hexdigest()[:12],
        "package": str(package),
        "devices": machine.visible_devices(),
        "free_disk": machine.free_disk(run_dir),
        "free_host_bytes": machine.free_host_bytes(),
        "free_device_bytes": machine.free_device_bytes(),
    }


class Agent:
    """One node; `say` is its only word to the supervisor."""

    def __init__(self, run_dir: Path, token: str, node: int, address: str, local: tuple[int, int] | None):
        self.run_dir, self.folder, self.local = run_dir, nodes.folder(run_dir), local
        self.token, self.node, self.address = token, node, address
        self.asked: str | None = None
        self.ranks: LocalRanks | None = None
        self.held = contextlib.ExitStack()  # the ranks, which end with it
        self.sent, self.is_let_go = 0, False
        facts = facts_of_this_machine(run_dir)
        self.words: dict[str, Any] = {
            "token": token,
            "host": facts["host"],
            "address": address,
            "facts": facts,
            "number": None,
        }
        self.port = network.free_port(address)
        self.written: dict[str, Any] = {}
        self.beat, self.beat_at = 0, 0.0

    def say(self) -> None:
        """Writes what has changed, or a beat."""
        if self.ranks is not None:
            self.words |= {"codes": self.ranks.codes(), "pids": self.ranks.pids}
        words = {**self.words, "asked": self.asked, "port": self.port}
        now = time.monotonic()
        if words == self.written and now - self.beat_at < BEAT_S:
            return
        self.written, self.beat, self.beat_at = words, self.beat + 1, now
        nodes.write(self.folder / f"node-{self.node}.json", {**words, "beat": self.beat, "now": time.time()})

    def obey(self, orders: dict[str, Any]) -> None:
        """Does what is new in the orders."""
        number, start = orders.get("number"), orders.get("start")
        if self.ranks is not None and (start is None or number != self.words["number"]):
            self.held.close()
            self.words |= {"codes": self.ranks.codes(), "is_over": True}
            self.ranks = None
        if start is not None and number != self.words["number"]:
            self.ranks, self.sent, self.is_let_go = self.held.enter_context(self._start(start)), 0, False
            self.words |= {"number": number, "is_over": False}
            self.port = network.free_port(self.address)
        if self.ranks is None or start is None:
            return
        if orders.get("go") and not self.is_let_go:
            self.is_let_go = True
            self.ranks.let_go()
        for signal_number, rank in orders.get("signals", [])[self.sent :]:
            self.sent += 1
            first, count = start["shares"][self.node]
            if rank is None:
                self.ranks.send(signal_number)
            elif first <= rank < first + count:
                self.ranks.send(signal_number, rank - first)

    def _start(self, start: dict[str, Any]) -> contextlib.AbstractContextManager[LocalRanks]:
        first, count = start["shares"][self.node]
        share = Share(
            first=first,
            count=count,
            size=start["size"],
            device=start["device"],
            module=start["module"],
            attempt=start["attempt"],
            init_method=start["init_method"],
            interface=None if start["one_host"] else network.interface_of(self.address),
            local=self.local,
        )
        return waiting(self.run_dir, share)


def serve(run_dir: Path, token: str, node: int, address: str, local: tuple[int, int] | None = None) -> int:
    """Runs a node to the end of its run; the exit status.

    Args:
        token: of the supervisor, which the run folder must hold: else it is another folder of the same name.
        node: which one this is, from 0.
        address: of this machine, by which the others reach it.
        local: local rank and local size, where an agent keeps one rank of several on its machine.
    """
    host = socket.gethostname()
    if nodes.read(nodes.folder(run_dir) / "orders.json").get("token") != token:
        print(
            f"cluster.fileroot: {run_dir} is not there or not the same folder on {host} ({address}); use a folder that"
            " all nodes share",
            flush=True,
        )
        return ExitStatus.MISTAKE
    agent, silence = Agent(run_dir, token, node, address, local), Silence()

    def warned(*_: Any) -> None:
        agent.asked = "preempted"

    signal.signal(signal.SIGTERM, warned)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with agent.held:
        while True:
            orders = nodes.read(agent.folder / "orders.json")
            # Without its folder the run has ended meanwhile.
            is_gone = not orders and run_dir.is_dir() and not agent.folder.is_dir()
            if is_gone or orders.get("end") or orders.get("token", token) != token:
                return ExitStatus.DONE
            if silence.hear(orders.get("beat")) > SILENCE_S:
                print(
                    f"{host} ({address}): the supervisor has said nothing for {SILENCE_S:.0f} s", flush=True
                )
                return ExitStatus.FAILED
            if orders:
                agent.obey(orders)
            agent.say()
            time.sleep(_POLL_S)


if __name__ == "__main__":
    folder, word, index, *given = sys.argv[1:]
    index = os.environ.get(index, index)
    place = (int(given[1]), int(given[2])) if given[1:] else None
    sys.exit(serve(Path(folder), word, int(index), given[0] if given else network.own_address(), place))
