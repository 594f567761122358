"""The machines of a run, from its supervisor's side: bring them up, prove that they fit together, order and hear them.

One agent a node (`agent`) starts and watches that node's ranks. Who starts the agents is all that schedulers differ
in (`STARTERS`); from then on the two sides talk by files in the run folder, which all nodes share:

    nodes/orders.json     the supervisor's: which ranks to start, let go, signal, end; a beat, as it lives
    nodes/node-K.json     agent K's: what its machine has, exit statuses of its ranks, a beat

Each file has one writer and is replaced as a whole. Nothing else is assumed of the file system than that a renamed file
is seen by the others within seconds, which NFS gives with its default options. Beats are counted, not compared with a
clock, so the machines' clocks may differ; time that a hanging file system takes counts as no silence (`Silence`).

Deliberately not here: what an agent does, Ray and Slurm (launch), ranks of this machine (`ranks`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_kit.config import Config, parse_backend
from dpo_kit.errors import ConfigError, ExitStatus, UserError
from dpo_kit.records import findings
from dpo_kit.records.findings import Finding
from dpo_kit.records.status import read_status, write_progress
from dpo_kit.supervise import children, fits
from dpo_kit.supervise.children import Session
from dpo_kit.system import files
from dpo_kit.system.processes import end_children, popen

# By `scheduler.type`: the module that starts the agents, `python -m MODULE RUN_DIR TOKEN`, and ends when they do.
STARTERS = {"ray": "dpo_kit.launch.ray", "slurm": "dpo_kit.launch.slurm"}
BEAT_S = 1.0
# Without a word for so long, an agent takes its supervisor for gone, and the supervisor an agent.
SILENCE_S = 60.0
# An agent imports nothing heavy; a node that is asked for much may still be slow.
_AGENTS_S = 120.0
_END_S = 15.0
_LOOK_S = 0.1
_CLOCKS_S = 30.0
# Lines of a starter's log: why it ends (a library may say more after it), what is no reason to end, and what is for
# whoever watches the run.
REASON, NOTE, WARNING = "reason: ", "note: ", "warning: "
# What agents get of the supervisor's environment, where their own does not come from it.
_OF_A_NODE = ("_SOCKET_IFNAME", "_TOKEN")  # of each machine its own; what is secret stays
_HANDED_ON = ("HF_", "NCCL_", "TORCH_", "DPO_KIT_", "TOKENIZERS_")


class NodeError(Exception):
    """Nodes that are missing, lost or not alike; `mistake`: the user's."""

    def __init__(self, message: str, *, mistake: bool = False):
        super().__init__(message)
        self.mistake = mistake


class Silence:
    """How long the other side has said nothing new; a look that took long itself counts for a second."""

    def __init__(self) -> None:
        self.word: Any = None
        self.seconds = 0.0
        self.at = time.monotonic()

    def hear(self, word: Any) -> float:
        """Seconds since `word` last changed."""
        now = time.monotonic()
        self.seconds = 0.0 if word != self.word else self.seconds + min(now - self.at, 1.0)
        self.word, self.at = word, now
        return self.seconds


def folder(run_dir: Path) -> Path:
    """Where supervisor and agents talk."""
    return run_dir / "nodes"


def read(path: Path) -> dict[str, Any]:
    """A file of the other side; empty while it is not there, or a network file system cannot tell."""
    with contextlib.suppress(OSError, UserError):
        found = files.read_json(path, {})
        return found if isinstance(found, dict) else {}
    return {}


def write(path: Path, made: dict[str, Any]) -> None:
    """Replaces one's own file; a disk that is full for a moment is no reason to end a run."""
    with contextlib.suppress(OSError):
        files.atomic_write(path, files.to_json(made), durable=False)


def shares(num_ranks: int, num_nodes: int) -> list[int]:
    """Ranks of each node: as even as it goes, the first nodes one more."""
    each, more = divmod(num_ranks, num_nodes)
    return [each + (node < more) for node in range(num_nodes)]


def _reason(log: Path) -> str:
    """Why a starter ended, in its own words; else its last ones, where they may be a reason."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    if told := [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]:
        return told[-1]
    last = files.last_line(log)
    return "" if last.startswith((NOTE, WARNING)) else last


def layout(config: Config) -> list[int]:
    """Ranks of each node of a run."""
    return shares(parse_backend(config.actor.backend).world_size, config.cluster.n_nodes)


class Nodes:
    """The nodes of one run.

    Args:
        session: of the supervisor.
        layout: ranks of each node.
        bring: starts the agents, given a token that they must know; its process ends when one of them is lost.
    """

    def __init__(self, session: Session, layout: list[int], bring: Callable[[str], subprocess.Popen]):
        self.session, self.layout, self.bring_agents = session, layout, bring
        self.folder = folder(session.run_dir)
        self.orders: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []
        self.silences: list[Silence] = []
        self.starter: subprocess.Popen | None = None
        self.is_up, self.told, self.written_at, self.looked_at = False, "", 0.0, 0.0

    def bring(self) -> None:
        """Starts the agents and waits until every one has spoken; returns early when the run is asked to stop.

        Raises:
            NodeError: some do not come, or are not like this machine.
        """
        self.close()
        write_progress(self.session.run_dir, phase="find nodes")
        self.folder.mkdir(exist_ok=True)  # an agent that is being ended may have written in the meantime
        self.orders = {"token": secrets.token_hex(8), "beat": 0, "start": None}
        self.said, self.silences = [{} for _ in self.layout], [Silence() for _ in self.layout]
        self._write()
        self.starter = self.bring_agents(self.orders["token"])
        deadline = time.monotonic() + self.session.config.scheduler.wait_s + _AGENTS_S
        while not all(self.said):
            children.look(self.session)
            self.look()
            if self.session.stop:
                return
            if self.told:
                raise NodeError(self.told, mistake=self._ended_by_mistake())
            if time.monotonic() > deadline:
                silent = [node for node, said in enumerate(self.said) if not said]
                raise NodeError(f"node {silent[0]} of {len(self.layout)} has not answered (logs/nodes.log)")
            time.sleep(0.1)
        problems = self._problems()
        if problems:
            raise NodeError("\n".join(problems), mistake=True)
        self.is_up = True

    def _ended_by_mistake(self) -> bool:
        return self.starter is not None and self.starter.returncode == ExitStatus.MISTAKE

    def _problems(self) -> list[str]:
        """What keeps the nodes from running together, each with the node and both numbers."""
        from dpo_kit.supervise.agent import facts_of_this_machine

        config, mine = self.session.config, facts_of_this_machine(self.session.run_dir)
        problems = []
        for said in self.said:
            name, has = f"{said['host']} ({said['address']})", said["facts"]
            # Under torchrun several agents share a machine.
            beside = sum(
                n for other, n in zip(self.said, self.layout, strict=True) if other["host"] == said["host"]
            )
            for package, version in mine["versions"].items():
                if (theirs := has["versions"].get(package)) != version:
                    problems.append(
                        f"{name} has {package} {theirs or '(none)'}, and {mine['host']} has {version}; install the same"
                    )
            if has["versions"] == mine["versions"] and has["code"] != mine["code"]:
                problems.append(
                    f"{name} has other code of dpo_kit {has['code']} than {mine['host']} {mine['code']}, at the same"
                    f" version; install the same ({has['package']}, {mine['package']})"
                )
            if self.session.device == "cuda" and has["devices"] < beside:
                problems.append(
                    f"{name} has {has['devices']} CUDA devices, and {beside} ranks are to run there; lower"
                    f" actor.backend = {config.actor.backend!r}, or take nodes with more devices"
                )
            on_cuda = self.session.device == "cuda"
            memory = has["free_device_bytes"] if on_cuda else has["free_host_bytes"] // beside
            for check, free in ((fits.check_disk, has["free_disk"]), (fits.check_memory, memory)):
                try:
                    check(config, free)
                except ConfigError as error:
                    problems.append(f"{name}: {error}")
        return problems

    def warnings(self) -> list[str]:
        """What whoever watches the run should know of its nodes."""
        log = self.session.run_dir / "logs" / "nodes.log"
        lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
        told = [line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)]
        late = [said for said in self.said if abs(said["clock"]) > _CLOCKS_S]
        return told + [
            f"the clock of {said['host']} differs by {said['clock']:.0f} s: elsewhere a live run may look dead"
            for said in late
        ]

    def look(self) -> None:
        """Hears every node and lets them hear this supervisor; `told` says who is lost."""
        if not self.orders or self.told:
            return
        now = time.monotonic()
        if now - self.looked_at < _LOOK_S:
            return
        self.looked_at = now
        if now - self.written_at > BEAT_S:
            self.orders["beat"] += 1
            self._write()
        for node, silence in enumerate(self.silences):
            said = read(self.folder / f"node-{node}.json")
            if said.get("token") == self.orders["token"]:
                if not self.said[node]:
                    said["clock"] = said["now"] - time.time()
                self.said[node] = {"clock": self.said[node].get("clock"), **said}
                if said.get("asked") and self.session.stop is None:
                    children.ask(self.session, said["asked"])
            if self.said[node] and silence.hear(said.get("beat")) > SILENCE_S:
                gone = self.said[node]
                self.told = f"{gone['host']} ({gone['address']}) is lost: no word for {SILENCE_S:.0f} s"
        if self.starter is not None and self.starter.poll() is not None and not self.told:
            words = _reason(self.session.run_dir / "logs" / "nodes.log")
            self.told = words or f"what started the nodes ended with status {self.starter.returncode}"

    def _write(self) -> None:
        write(self.folder / "orders.json", self.orders)
        self.written_at = time.monotonic()

    def order(self, **changes: Any) -> None:
        """Changes the orders, at once."""
        self.orders |= changes
        self._write()

    @contextlib.contextmanager
    def waiting(self, module: str) -> Iterator[NodeRanks]:
        """Ranks on all nodes, as `ranks.waiting` has them on one; nodes that are lost are found again first."""
        if not self.is_up or self.told:
            self.bring()
        ranks = NodeRanks(self)
        try:
            if not self.session.stop:
                ranks.start(module)
            yield ranks
        finally:
            ranks.end()

    def close(self) -> None:
        """Ends the agents, and with them all that they started."""
        if self.orders:
            self.order(end=True)
        if self.starter is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.starter.wait(0 if self.told else _END_S)
            end_children([self.starter])
        self.starter, self.orders, self.told, self.is_up = None, {}, "", False
        shutil.rmtree(self.folder, ignore_errors=True)


class NodeRanks:
    """The ranks of all nodes, in rank order; like `ranks.LocalRanks`."""

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.number = 0  # of this start, among those that the agents saw

    @property
    def lost(self) -> str:
        """Which node is lost; empty while none is."""
        return self.nodes.told

    def start(self, module: str) -> None:
        """Has the agents start their ranks."""
        nodes, session = self.nodes, self.nodes.session
        hosts = {said["host"] for said in nodes.said}
        self.number = (nodes.orders.get("number") or 0) + 1
        if len(nodes.layout) == 1:
            init = None  # a file of that node's own
        elif len(hosts) == 1:
            init = (nodes.folder / f"store-{nodes.orders['token']}-{self.number}").as_uri()
        else:
            first, port = nodes.said[0]["address"], nodes.said[0]["port"]
            init = f"tcp://[{first}]:{port}" if ":" in first else f"tcp://{first}:{port}"
        firsts = [sum(nodes.layout[:node]) for node in range(len(nodes.layout))]
        start = {
            "shares": list(zip(firsts, nodes.layout, strict=True)),
            "module": module,
            "size": sum(nodes.layout),
            "device": session.device,
            "attempt": read_status(session.run_dir).get("attempt", 1),
            "init_method": init,
            "one_host": len(hosts) == 1,
        }
        nodes.order(number=self.number, start=start, go=False, signals=[])

    @property
    def _said(self) -> list[dict[str, Any]]:
        """What each agent says of these ranks; empty of one that has not begun."""
        return [said if said.get("number") == self.number else {} for said in self.nodes.said]

    @property
    def pids(self) -> list[str]:
        return [f"{said['host']}:{pid}" for said in self._said if said for pid in said["pids"]]

    def codes(self) -> list[int | None]:
        """Exit status of each, None of one that runs or is lost."""
        self.nodes.look()
        found: list[int | None] = []
        for said, count in zip(self._said, self.nodes.layout, strict=True):
            found += said.get("codes") or [None] * count
        return found

    def send(self, number: int, rank: int | None = None) -> None:
        """Has a signal sent to one of them, or to all that run."""
        self.nodes.order(signals=[*self.nodes.orders.get("signals", []), [int(number), rank]])

    def let_go(self) -> None:
        """Lets them work."""
        for text in self.nodes.warnings():
            findings.add(self.nodes.session.run_dir, Finding("look", "nodes", text))
        self.nodes.order(go=True)

    def end(self) -> None:
        """Has them killed, and waits for the nodes that are not lost to say so."""
        nodes = self.nodes
        if not self.number or not nodes.orders:
            return
        nodes.order(start=None)
        deadline = time.monotonic() + _END_S
        while not nodes.told and time.monotonic() < deadline:
            nodes.look()
            if all(said.get("number") != self.number or said.get("is_over") for said in nodes.said):
                return
            time.sleep(0.05)


def of(session: Session, bring: Callable[[str], subprocess.Popen] | None, starter: str | None) -> Nodes:
    """The nodes of a run whose scheduler is not `local`.

    Args:
        bring: starts the agents; None takes a starter's process.
        starter: its module, instead of the scheduler's.

    Raises:
        NodeError: the agents of this scheduler are started by nobody here.
    """
    config, run_dir = session.config, session.run_dir
    if bring is not None:
        return Nodes(session, [1] * session.num_ranks, bring)
    module = starter or STARTERS.get(config.scheduler.type)
    if module is None:
        raise NodeError(
            f"{run_dir} was started by {config.scheduler.type}: give the same command again with recover.mode=auto"
            f" trial_name={run_dir.name}, or add scheduler.type=local to it",
            mistake=True,
        )

    def start(token: str) -> subprocess.Popen:
        with open(run_dir / "logs" / "nodes.log", "wb") as log:
            return popen([module, str(run_dir), token], {**os.environ, **variables(config)}, log)

    return Nodes(session, layout(config), start)


def variables(config: Config) -> dict[str, str]:
    """What the processes of a run on several nodes get beside the environment: one place for what comes from the hub.

    A folder that the user has named stays.
    """
    is_named = any(name in os.environ for name in ("HF_HOME", "HF_HUB_CACHE"))
    if config.cluster.n_nodes == 1 or config.scheduler.type not in STARTERS or is_named:
        return {}
    return {"HF_HUB_CACHE": str(Path(config.cluster.fileroot) / ".cache" / "hub")}


def handed_on() -> dict[str, str]:
    """Variables of this process that the agents of other machines get as well."""
    names = [name for name in os.environ if name.startswith(_HANDED_ON) and not name.endswith(_OF_A_NODE)]
    return {name: os.environ[name] for name in names}
