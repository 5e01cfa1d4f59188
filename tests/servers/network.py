"""Machines on one machine: network namespaces on a bridge, each with an address of its own.

    this namespace ── bridge 10.B.C.254 ──┬── node 0: 10.B.C.1
                                          └── node 1: 10.B.C.2

A namespace's loopback is its own, so that nothing gets from one node to the other but over the bridge. Files are
shared. It needs root and `ip`; everything it makes is gone when the block ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A network namespace."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Words before a command, to run it there."""
        return ["ip", "netns", "exec", self.name]


@dataclass(frozen=True)
class Network:
    machines: list[Machine]
    outside: str  # this namespace's address on the bridge


def why_not() -> str | None:
    """Why no namespaces can be made here; None where they can. A reason to skip."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (Debian's package iproute2)"
    try:
        with running(machines=1) as network:
            _ip(*network.machines[0].prefix[1:], "true")
    except AssertionError as error:
        return f"network namespaces are not allowed here: {error}"
    return None


@contextmanager
def running(machines: int) -> Iterator[Network]:
    """So many namespaces, until the block ends. AssertionError: they cannot be made here."""
    tag = f"mp{random.SystemRandom().randrange(16**4):04x}"  # an interface's name has at most 15 characters
    subnet = f"10.{random.SystemRandom().randrange(100, 250)}.{random.SystemRandom().randrange(1, 250)}"
    with ExitStack() as undo:
        bridge = f"{tag}br"
        _ip("link", "add", bridge, "type", "bridge")
        undo.callback(_forgive, "link", "delete", bridge)
        _ip("address", "add", f"{subnet}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        made = []
        for number in range(machines):
            machine = Machine(f"{tag}n{number}", f"{subnet}.{number + 1}")
            _ip("netns", "add", machine.name)
            undo.callback(_forgive, "netns", "delete", machine.name)
            undo.callback(_end_all, machine)
            here, there = f"{tag}v{number}", f"{tag}w{number}"
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", machine.name)
            undo.callback(_forgive, "link", "delete", here)
            _ip("link", "set", here, "master", bridge, "up")
            inside = ("-netns", machine.name)
            _ip(*inside, "address", "add", f"{machine.address}/24", "dev", there)
            _ip(*inside, "link", "set", there, "up")
            _ip(*inside, "link", "set", "lo", "up")
            made.append(machine)
        yield Network(made, f"{subnet}.254")


def _end_all(machine: Machine) -> None:
    """End what still runs in a namespace: a server's children that outlived it."""
    with contextlib.suppress(AssertionError):
        while pids := _ip("netns", "pids", machine.name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"`ip {' '.join(words)}`: {done.stderr.strip()}"
    return done.stdout


def _forgive(*words: str) -> None:
    with contextlib.suppress(AssertionError):  # the rest is still to be undone; a veth goes with its peer
        _ip(*words)
