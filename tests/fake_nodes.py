"""Starts agents, all here: `python -m tests.fake_nodes RUN_DIR TOKEN`; `nodes.json` in the run folder bends them.

{"count": 2, "token": {"1": "other"}, "versions": {"1": {"torch": "0"}}, "hosts": ["a", "b"], "pids": true}
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from dpo_kit.supervise import agent, nodes
from dpo_kit.system.processes import child_variables, end_children


def play(run_dir: Path) -> dict:
    return json.loads((run_dir / "nodes.json").read_text())


def as_node(run_dir: Path, token: str, node: int) -> int:
    """One agent, in a process of its own."""
    bent = play(run_dir)
    facts, name = agent.facts_of_this_machine, bent.get("hosts", [socket.gethostname()] * 9)[node]
    socket.gethostname = lambda: name
    changed = bent.get("facts", {}).get(str(node), {})
    agent.facts_of_this_machine = lambda folder: {**facts(folder), **changed, "host": name}
    (run_dir / f"agent-{node}").write_text(str(os.getpid()))
    return agent.serve(run_dir, bent.get("token", {}).get(str(node), token), node, "127.0.0.1")


def main(run_dir: Path, token: str) -> int:
    command = [sys.executable, "-m", "dpo_kit.system.child", __spec__.name, str(run_dir), token]
    children = [
        subprocess.Popen([*command, str(node)], env={**os.environ, **child_variables()})
        for node in range(play(run_dir)["count"])
    ]
    print(play(run_dir).get("says", ""), flush=True)
    while any(child.poll() is None for child in children):
        if failed := [child.returncode for child in children if child.poll()]:
            end_children(children)
            return abs(failed[0])
        time.sleep(0.05)
    return max((abs(child.returncode) for child in children), default=1)


if __name__ == "__main__":
    folder, word, *index = sys.argv[1:]
    nodes.SILENCE_S = agent.SILENCE_S = play(Path(folder)).get("silence_s", 60.0)
    sys.exit(as_node(Path(folder), word, int(index[0])) if index else main(Path(folder), word))
