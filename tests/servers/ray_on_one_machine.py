"""A real Ray cluster whose nodes are killed and added at a word: raylets of their own at one address."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DRAIN_NODE = Path(__file__).resolve().parents[2] / "infra" / "docker" / "drain_node.py"

# The head runs no workers. `kill` is SIGKILL of a raylet; `restart` is SIGKILL of the head's server and a new one,
# which finds its state on disk.
HOLDER = """
import subprocess, sys
from ray.cluster_utils import Cluster

DRAIN = sys.argv[1]

small = {"object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = []
print(cluster.address, flush=True)
for line in sys.stdin:
    match line.split():
        case ["add"]:
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80_000_000))
        case ["kill"]:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        case ["drain"]:
            command = [sys.executable, DRAIN, "--seconds", "60", "--node-id", nodes[-1].node_id]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        case ["restart"]:
            cluster.head_node.kill_gcs_server()
            cluster.head_node.start_gcs_server()
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """The cluster; every method returns when it has happened."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process = process
        self.environment = environment  # of a driver

    def add(self) -> None:
        self._tell("add")

    def kill(self) -> None:
        """SIGKILL the node that was added last; its workers go with it."""
        self._tell("kill")

    def kill_worker(self) -> None:
        """SIGKILL one of the processes that train; its node stays."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        workers = [process for process in processes if "TrainWorker" in process.name() + "".join(process.cmdline())]
        assert workers
        workers[-1].kill()

    def drain(self) -> None:
        """Take away the node that was added last as a cluster's manager does: its end is announced, and its work has
        a minute to leave it; the node has ended when this returns."""
        self._tell("drain")

    def restart_head(self) -> None:
        """SIGKILL the head's server, which keeps the cluster's state, and start it again."""
        self._tell("restart")

    def kill_all(self) -> None:
        """SIGKILL the head and every node."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tell(self, words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer == "done", f"{words}: {answer or 'the cluster ended'}"


@contextmanager
def ray_nodes(count: int) -> Iterator[Nodes]:
    """A head and `count` nodes of one CPU until the block ends."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | token
    state = tempfile.TemporaryDirectory(prefix="ray-head-")
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": state.name}
    # a node that answers no more is known to be dead after two seconds instead of fifteen
    health = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(DRAIN_NODE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment | storage | health,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        nodes = Nodes(process, environment | {"RAY_ADDRESS": process.stdout.readline().strip()})
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        state.cleanup()
