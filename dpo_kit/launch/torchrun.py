"""A run whose processes torchrun has started: each keeps one rank, and the first one supervises the run as well.

    torchrun --nproc-per-node=8 -m dpo_kit train --config X scheduler.type=torchrun

Every process is a node agent (`supervise.agent`) of one rank; they learn of the run folder by torchrun's own store. So
logs, hangs, out-of-memory halvings and restarts (`recover.retries`) are those of every other run, and torchrun need not
restart anything.

Deliberately not here: the rendezvous of the ranks (supervise/nodes).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpo_kit.config import Config
from dpo_kit.errors import ExitStatus
from dpo_kit.launch import local, trial, world
from dpo_kit.supervise import agent
from dpo_kit.system import network
from dpo_kit.system.processes import popen

# Until the first process has looked at the run: files, models, the folder's facts.
_FOLDER_S = 600.0
# A Ctrl-C comes twice: from the terminal, and from torchrun.
_SECOND_SIGNAL_S = 10.0


def run_in_foreground(config: Config, source: str | Path | None = None) -> int:
    """What each of torchrun's processes does; see `local.run_in_foreground`.

    Returns:
        Exit status: of the run in the first process, of its rank's agent in the others.

    Raises:
        UserError: in the first process, what cannot run.
    """
    rank, store = int(os.environ["RANK"]), _store()
    if rank:
        return _serve(store, rank)
    told = False

    def tell(message: dict[str, Any]) -> None:
        nonlocal told
        told = True
        store.set("run", json.dumps(message))

    status = ExitStatus.MISTAKE
    try:
        resolved = world.resolve_world(config)
        run, is_done = trial.open_trial(resolved, "foreground", source)
        bring = _bringing(run.dir, tell)
        status = ExitStatus(local.foreground(run, is_done, bring=bring, second_signal_s=_SECOND_SIGNAL_S))
        return status
    finally:
        if not told:  # there is nothing to do, or something is wrong
            tell({"over": status})


def _bringing(run_dir: Path, tell: Callable[[dict[str, Any]], None]) -> Callable[[str], subprocess.Popen]:
    def bring(token: str) -> subprocess.Popen:
        """Tells the others, and starts the agent of this process's own rank."""
        tell({"run_dir": str(run_dir), "token": token})
        words = ["dpo_kit.supervise.agent", str(run_dir), token, "0", _address(), *_local()]
        with open(run_dir / "logs" / "nodes.log", "wb") as log:
            return popen(words, dict(os.environ), log)

    return bring


def _serve(store: Any, rank: int) -> int:
    said = json.loads(store.get("run"))
    if "over" in said:
        return said["over"]
    here, size = map(int, _local())
    return agent.serve(Path(said["run_dir"]), said["token"], rank, _address(), (here, size))


def _store() -> Any:
    """torchrun's store; a fresh part of it after each of torchrun's restarts."""
    from torch.distributed import PrefixStore, TCPStore

    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_kept and os.environ["RANK"] == "0",
        timeout=timedelta(seconds=_FOLDER_S),
        wait_for_workers=False,
    )
    return PrefixStore(f"dpo-kit-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _local() -> tuple[str, str]:
    return os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]


def _address() -> str:
    """This machine's address towards the first one, which sees itself as loopback."""
    address = network.address_towards(os.environ["MASTER_ADDR"])
    is_alone = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    return network.own_address() if address.startswith("127.") and not is_alone else address
