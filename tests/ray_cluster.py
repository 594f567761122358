"""A Ray cluster over the hosts of `tests.hosts`: a head on the first, a worker on every other, one session folder.

    with hosts() as (a, b), ray_cluster(a, b) as cluster:
        a.run([sys.executable, driver], env=cluster.environment)    # ray.init(address=cluster.address)
        b.cut()                                                     # noticed after about 6 s; b ends itself
        b.heal()
        cluster.join(b)

Every client needs the token in `cluster.environment`. Two processors a node, no dashboard.

Deliberately not here: what a driver does; ending Ray, whose daemons end with their host.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests import hosts
from tests.hosts import Host

_PORT = 6379
_OBJECT_STORE_BYTES = 80_000_000  # Ray takes no less than 75 MiB
_STARTS_S = 180
# A node that is cut off is missed after 3 s, not 25, and gives itself up after another 5, not 60; only a connection
# that is looked after notices.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_grpc_client_keepalive_time_ms": "1000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}


@dataclass
class RayCluster:
    """A running cluster: its address, and the environment that lets a client in."""

    head: Host
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{_PORT}"

    def join(self, host: Host) -> None:
        """Makes a host a node of the cluster, again if it was one: all that runs on it ends first."""
        host.crash()
        self._start(host, f"--address={self.address}")

    def _start(self, host: Host, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        command += [f"--node-ip-address={host.address}", "--num-cpus=2", "--disable-usage-stats"]
        command += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        done = host.run(command, check=False, env=self.environment, timeout=_STARTS_S)
        if done.returncode:
            raise RuntimeError(f"ray start on {host.name}: {done.stdout}{done.stderr}")


def permitted() -> str:
    """Empty where a cluster can be made, else why not."""
    return hosts.permitted() or ("" if find_spec("ray") else "Ray is not installed: pip install dpo-kit[ray]")


@contextlib.contextmanager
def ray_cluster(head: Host, *workers: Host) -> Iterator[RayCluster]:
    """Starts Ray on the hosts, which must be empty, and ends it there."""
    # Not below pytest's folder: the path of a socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", **_QUICK}
        cluster = RayCluster(head, environment)
        try:
            cluster._start(
                head, "--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={folder}"
            )
            for host in workers:
                cluster.join(host)
            yield cluster
        finally:
            for host in (head, *workers):
                host.crash()
