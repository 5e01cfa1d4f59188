"""A real Ray cluster of several nodes: `ray start --block`, one per machine of a network, with token authentication.

Each node keeps Ray's files under the same path, but in a folder of its own (a mount that only it sees): nodes that
share one replace each other's unpacked working directories under the feet of their jobs.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import process
from tests.servers.network import Machine

PORT, DASHBOARD_PORT = 6379, 8265
OBJECT_STORE_BYTES = 100_000_000
MOUNT = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']  # `ip netns exec` gives a mount namespace as well


@dataclass(frozen=True)
class Cluster:
    """A head with its dashboard and job server, and the other nodes."""

    machines: Sequence[Machine]  # the head's first
    token: str = field(repr=False)

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{self.machines[0].address}:{DASHBOARD_PORT}"

    def env(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextmanager
def running(machines: Sequence[Machine], *, env: Mapping[str, str], cpus_per_node: int = 1) -> Iterator[Cluster]:
    """A node on each machine until the block ends; jobs may be submitted when it begins.

    env: added to the environment of every node, which is also that of its jobs.
    """
    cluster = Cluster(machines, secrets.token_hex(32))
    # of its own, short (it holds sockets) and with nothing left behind
    folder = Path(tempfile.mkdtemp(prefix="mpray-"))
    unwanted = ("RAY_", "MLFLOW_", "PYTHONPATH", "GLOO_")
    settings = {
        **{k: v for k, v in os.environ.items() if not k.startswith(unwanted)},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the PATH's
        "RAY_USAGE_STATS_ENABLED": "0",
        **cluster.env(),
        **env,
    }
    program = str(Path(sys.executable).with_name("ray"))
    mounted = folder / "ray"
    mounted.mkdir()
    common = [program, "start", "--block", "--disable-usage-stats", "--num-cpus", str(cpus_per_node)]
    common += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    head = machines[0]
    gcs = f"{head.address}:{PORT}"
    start_head = ["--head", "--port", str(PORT), "--temp-dir", str(mounted)]
    start_head += ["--dashboard-host", head.address, "--dashboard-port", str(DASHBOARD_PORT)]
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, machine in enumerate(machines):
            own = folder / f"node{number}"
            own.mkdir()
            command = [*machine.prefix, *MOUNT, str(own), str(mounted), *common, "--node-ip-address", machine.address]
            command += start_head if machine is head else ["--address", gcs]
            undo.enter_context(
                process.running(
                    command,
                    answers=lambda number=number: _nodes(cluster) > number,
                    log=folder / f"node{number}.log",
                    env=settings,
                    stop=signal.SIGKILL,  # a polite end can take half a minute, and all of it is thrown away
                )
            )
        yield cluster


def _nodes(cluster: Cluster) -> int:
    """How many nodes the head knows to be alive."""
    request = urllib.request.Request(
        f"{cluster.address}/api/v0/nodes?detail=False", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
    except (urllib.error.URLError, OSError):
        return 0
    return sum(row["state"] == "ALIVE" for row in rows)
