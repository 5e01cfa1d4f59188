"""Before this container ends: have the workers of its Ray node write a checkpoint. Ray calls it draining the node.

    python drain_node.py [--seconds 60]

At SIGTERM a node ends its workers at once. When its end is announced instead, a training run writes a checkpoint of the
step that it has reached and goes on elsewhere, and nothing new starts here. The node ends as soon as nothing runs on
it; this returns then, or when the time is up.
"""

from __future__ import annotations

import argparse
import sys
import time

import psutil
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]  # generated

POLL_SECONDS = 0.5


def nodes_here() -> dict[str, psutil.Process]:
    """Ray's node processes that this container sees, by the node's id."""
    found = {}
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet" and (node_id := option(process, "node_id")):
            found[node_id] = process
    return found


def option(process: psutil.Process, name: str) -> str:
    """The value of --NAME=… on its command line; "" without one, or where it has ended."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), "")


def drain(node_id: str, process: psutil.Process, seconds: float) -> None:
    """Announce the node's end and wait for it, no longer than `seconds`. RuntimeError: Ray refuses."""
    end = time.time() + seconds
    client = GcsClient(address=option(process, "gcs-address"))
    message = "its container is about to end"
    accepted, reason = client.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, message, int(1000 * end))
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node_id}: {reason}")
    while is_alive(process) and time.time() < end:
        time.sleep(POLL_SECONDS)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long the node has at most")
    parser.add_argument("--node-id", help="which one, where there are several on one machine")
    options = parser.parse_args()
    nodes = nodes_here()
    node_id = options.node_id or (next(iter(nodes)) if len(nodes) == 1 else None)
    if node_id not in nodes:
        sys.exit(f"drain_node: not one Ray node to drain, but these: {', '.join(nodes) or 'none'}; see --node-id")
    drain(node_id, nodes[node_id], options.seconds)


if __name__ == "__main__":
    main()
