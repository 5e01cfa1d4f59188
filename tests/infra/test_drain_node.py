"""infra/docker/drain_node.py: which node it finds, and what it does when Ray refuses or the node goes on.

On real nodes, in the middle of a run: tests/integration/test_ray_faults.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "infra" / "docker" / "drain_node.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drain_node", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Process:
    """What the script asks a process of psutil's for."""

    def __init__(self, name: str, *words: str, ends_at: float = float("inf"), gone: bool = False) -> None:
        self.info = {"name": name}
        self._words, self._ends_at, self._gone = list(words), ends_at, gone

    def cmdline(self) -> list[str]:
        if self._gone:
            raise psutil.NoSuchProcess(1)
        return self._words

    def is_running(self) -> bool:
        return True  # a process that nobody has waited for yet

    def status(self) -> str:
        return psutil.STATUS_ZOMBIE if time.time() > self._ends_at else psutil.STATUS_SLEEPING


def raylet(node_id: str, **kwargs: Any) -> Process:
    return Process("raylet", "raylet", "--port=0", f"--node_id={node_id}", "--gcs-address=head:6379", **kwargs)


def see(monkeypatch: pytest.MonkeyPatch, *processes: Process) -> None:
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: iter(processes))


def answer(monkeypatch: pytest.MonkeyPatch, script: ModuleType, accepted: bool, reason: str = "") -> list[tuple]:
    """Ray's answer to a drain; returns what it will have been asked."""
    asked: list[tuple] = []

    def client(address: str) -> SimpleNamespace:
        return SimpleNamespace(drain_node=lambda *words: asked.append((address, *words)) or (accepted, reason))

    monkeypatch.setattr(script, "GcsClient", client)
    return asked


def test_it_drains_the_node_of_its_container(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, Process("python", "--node_id=ff"), raylet("ee", gone=True), raylet("ab", ends_at=0))
    asked = answer(monkeypatch, script, accepted=True)
    monkeypatch.setattr(sys, "argv", ["drain_node.py", "--seconds", "60"])
    before = time.time()
    script.main()
    ((address, node_id, reason, _, deadline),) = asked
    assert (address, node_id, reason) == ("head:6379", "ab", script.DRAIN_NODE_REASON_PREEMPTION)
    assert deadline / 1000 == pytest.approx(before + 60, abs=5)
    assert time.time() - before < 30  # it has ended


def test_it_does_not_wait_beyond_its_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "POLL_SECONDS", 0.01)
    answer(monkeypatch, script, accepted=True)
    script.drain("ab", raylet("ab"), 0.1)


def test_a_refusal_is_an_error(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, script, accepted=False, reason="it is the head")
    with pytest.raises(RuntimeError, match="does not drain node ab: it is the head"):
        script.drain("ab", raylet("ab"), 60)


@pytest.mark.parametrize(
    ("ids", "words", "says"),
    [([], [], "none"), (["ab", "cd"], [], "ab, cd"), (["ab", "cd"], ["--node-id", "ef"], "ab, cd")],
)
def test_it_names_the_nodes_where_there_is_not_one(
    ids: list[str], words: list[str], says: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, *map(raylet, ids))
    monkeypatch.setattr(sys, "argv", ["drain_node.py", *words])
    with pytest.raises(SystemExit, match=says):
        script.main()


def test_it_starts_as_it_is_called() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--seconds" in done.stdout
