"""Starts a run's agents by Ray: `python -m dpo_kit.launch.ray RUN_DIR TOKEN`, a child of the supervisor.

    one actor a node, in a placement group that spreads them strictly  ->  each runs `supervise.agent` as its child

The actors end with this process, which is their driver; when one of them is lost, this process ends and says which.
What Ray gives is the placing and the news of a node's death; ranks, logs and orders go by the run folder.

    scheduler.address       the cluster; null: RAY_ADDRESS, one that runs on this machine, else one of the run's own,
                            which listens on loopback only, wants a token and ends with the run
    RAY_AUTH_MODE=token     wanted of every cluster that listens on more; one without it is used with a warning

Deliberately not here: ranks (supervise), autoscaling: nodes that come within `scheduler.wait_s` are taken.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any, NoReturn

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ExitStatus, UserError
from dpo_kit.supervise import nodes


def main(run_dir: Path, token: str) -> int:
    """Brings the agents up and waits for their end; the exit status. Where one is lost, a line says why."""
    import ray  # launch/world has seen that it is there

    config = config_module.load(run_dir / "config.yaml")
    _connect(ray, config, run_dir)
    counts = nodes.layout(config)
    group = _placed(ray, config, counts)
    # They end with their handles.
    actors = [_agent_class(ray, group, index).remote() for index in range(len(counts))]
    variables, addresses = nodes.handed_on(), _addresses(ray, group)
    waiting = {
        actor.run.remote(str(run_dir), token, index, variables): index for index, actor in enumerate(actors)
    }
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        index = waiting.pop(done)
        try:
            code, words = ray.get(done)
        except ray.exceptions.RayError as error:
            print(
                f"{nodes.REASON}{addresses[index]} (node {index} of {len(counts)}) is lost: {_cause(error)}",
                flush=True,
            )
            return ExitStatus.FAILED
        if code:
            print(
                f"{nodes.REASON}{words or f'the agent of node {index} ended with status {code}'}", flush=True
            )
            return code
    return ExitStatus.DONE


def _connect(ray: Any, config: Config, run_dir: Path) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    try:
        ray.init(address=config.scheduler.address or "auto", **quiet)
    except ConnectionError as error:
        if config.scheduler.address or os.environ.get("RAY_ADDRESS"):
            where = config.scheduler.address or f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
            said, token = " ".join(str(error).split())[:200], ""
            if os.environ.get("RAY_AUTH_MODE") != "token":
                token = "; one that wants a token answers nobody without it (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)"
            raise UserError(f"no Ray cluster answers at {where} ({said}){token}") from None
        if config.cluster.n_nodes > 1:
            raise UserError(
                f"cluster.n_nodes = {config.cluster.n_nodes}: no Ray cluster runs here, and one of the run's own has 1"
                " node; start one (ray start --head), or give scheduler.address"
            ) from None
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            _again_for_oneself(run_dir)
        ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
        print(f"{nodes.NOTE}Ray: a cluster of this run's own, on this machine", flush=True)
        return
    address = ray.get_runtime_context().gcs_address
    print(f"{nodes.NOTE}Ray: the cluster at {address}", flush=True)
    if os.environ.get("RAY_AUTH_MODE") != "token" and not address.startswith("127."):
        print(f"{nodes.WARNING}{address} takes anybody's jobs: start it with RAY_AUTH_MODE=token", flush=True)


def _again_for_oneself(run_dir: Path) -> NoReturn:
    """Begins this process again as Ray must find it for a cluster on loopback only, with a token of its own.

    Ray reads these variables when it is imported. Without them it listens on every interface, and writes a token that
    all users of the machine can read into the home folder.
    """
    token = nodes.folder(run_dir) / "ray-token"  # goes with the folder, when the run ends
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    os.execve(
        sys.executable, [sys.executable, "-m", "dpo_kit.launch.ray", *sys.argv[1:]], {**os.environ, **ours}
    )


def _placed(ray: Any, config: Config, counts: list[int]) -> Any:
    """A placement group with a bundle for each node.

    Raises:
        UserError: the cluster has not so many nodes within `scheduler.wait_s`.
    """
    from ray.util.placement_group import placement_group

    on_cuda = bool(config.cluster.n_gpus_per_node)
    bundles: list[dict[str, float]] = [{"CPU": 1, **({"GPU": count} if on_cuda else {})} for count in counts]
    group = placement_group(bundles, strategy="STRICT_SPREAD")
    if ray.wait([group.ready()], timeout=config.scheduler.wait_s)[0]:
        return group
    has = [node for node in ray.nodes() if node["Alive"]]
    sizes = [tuple(node["Resources"].get(kind, 0) for kind in ("GPU", "CPU")) for node in has]
    listed = ", ".join(
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}) with {gpus:g} GPUs and {cpus:g} CPUs"
        for node, (gpus, cpus) in zip(has, sizes, strict=True)
    )
    each = f" with {max(counts)} GPUs each" if on_cuda else ""
    raise UserError(
        f"cluster.n_nodes = {len(counts)}: {len(counts)} nodes{each} are needed, and after"
        f" {config.scheduler.wait_s:g} s (scheduler.wait_s) Ray has {len(has)}: {listed}, some of it maybe in use"
    )


def _addresses(ray: Any, group: Any) -> list[str]:
    """Of the nodes, in the order of the bundles."""
    from ray.util.placement_group import placement_group_table

    by_id = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    placed = placement_group_table(group)["bundles_to_node_id"]
    return [by_id.get(placed[index], "an unknown node") for index in sorted(placed)]


def _cause(error: Exception) -> str:
    """Ray's own reason, in a sentence."""
    said = " ".join(str(error).split())
    if type(error).__name__ == "ActorUnavailableError":
        return "it does not answer Ray"
    found = re.findall(r"(The actor died[^.]*|No module named \S+)", said)
    return found[-1] if found else said[:400]


def _agent_class(ray: Any, group: Any, index: int) -> Any:
    """The actor of one node. A class of this function travels by value: a node without the kit can say so."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class NodeAgent:
        def run(self, run_dir: str, token: str, node: int, variables: dict[str, str]) -> tuple[int, str]:
            """Runs the agent to its end: its exit status and last line."""
            import os
            import subprocess
            import sys

            import ray

            address = ray.util.get_node_ip_address()
            command = [sys.executable, "-m", "dpo_kit.system.child", "dpo_kit.supervise.agent"]
            child = subprocess.Popen(
                [*command, run_dir, token, str(node), address],
                env={
                    **os.environ,
                    **variables,
                    "DPO_KIT_PARENT_PID": str(os.getpid()),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said = [line for line in child.communicate()[0].splitlines() if line.strip()]
            return child.returncode, f"{said[-1]} (on {address})" if said and child.returncode else ""

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    num_gpus = group.bundle_specs[index].get("GPU", 0)
    options = {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 0, "scheduling_strategy": strategy}
    return ray.remote(NodeAgent).options(**options)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
    except UserError as error:
        print(f"{nodes.REASON}{error}", flush=True)
        sys.exit(ExitStatus.MISTAKE)
