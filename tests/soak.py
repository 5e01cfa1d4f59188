"""Many random kills, outside CI: `make soak`, or `python -m tests.soak --kills 100 --ray-kills 10`.

Runs of the multi-process context are killed at random moments (one worker, all workers, or the driver with them) and
started again until they end; then runs under Ray (a node, or the driver). Every run must end bit-identical to one that
nothing disturbed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import yaml

from pipeline.runs import RunFolder
from pipeline.tasks import shards
from pipeline.training import journal
from pipeline.types import SPLITS
from tests.faults import DRIVER, assert_same_end, experiment, run_to_end, worker_processes
from tests.servers.ray_on_one_machine import ray_nodes

TRAINING = {
    "steps": 300,
    "validate_every": 10,
    "num_workers": 2,
    "dtype": "float32",
    "meta_batch_size": 16,
    "max_failures": 1000,
}
ATTEMPT_SECONDS = 12.0  # a kill comes within so many seconds after the training goes on


def data_set(folder: Path) -> Path:
    names = [f"class{i:02d}" for i in range(16)]

    def source():  # type: ignore[no-untyped-def]
        for i, name in enumerate(names):
            chance = np.random.default_rng(i)
            pattern = chance.choice([0, 200], size=(1, 12, 12, 1)) + chance.integers(0, 56, size=(8, 12, 12, 1))
            yield shards.ClassExamples(name, "", pattern.astype(np.uint8))

    parts = {name: SPLITS[i % 3] for i, name in enumerate(names)}
    preprocessing = {"kind": "drawing", "size": 12, "channels": 1}
    shards.write(folder, source(), splits={"random": parts}, source={"name": "soak"}, preprocessing=preprocessing)
    return folder


class Run:
    """One run, gone on with until it ends."""

    def __init__(self, folder: Path, data: Path, backend: str, environment: dict[str, str]) -> None:
        exp = experiment(folder / "runs", data, **TRAINING, backend=backend)
        folder.mkdir()
        (folder / "driver.py").write_text(DRIVER)
        (folder / "experiment.yaml").write_text(yaml.safe_dump(exp.to_dict()))
        self._command = [sys.executable, str(folder / "driver.py"), str(folder / "experiment.yaml")]
        self._environment = environment
        self.folder = RunFolder(folder / "runs" / "images" / "001")
        self.repeated = 0

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=2)

    def step(self) -> int:
        return max((record["step"] for record in journal.read(self.folder.journal)), default=0)

    def note_lost(self) -> None:
        self.repeated += self.step() - (self.folder.checkpoints.latest() or 0)


def wait_for_progress(run: Run, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Until it trains again and a random moment has passed; False where it has ended instead."""
    before, deadline = run.step(), time.monotonic() + 200
    while run.step() <= before and process.poll() is None:
        assert time.monotonic() < deadline, f"{run.folder.path}: no progress"
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0, ATTEMPT_SECONDS * chance.random() ** 2))
    return process.poll() is None


def soak_processes(folder: Path, data: Path, kills: int, chance: random.Random) -> tuple[Counter[str], int, int]:
    undisturbed = run_to_end(experiment(folder / "undisturbed", data, **TRAINING))
    done: Counter[str] = Counter()
    runs = repeated = 0
    while done.total() < kills:
        run = Run(folder / f"run{runs}", data, "processes", dict(os.environ))
        process = run.start()
        while process.poll() is None:
            if done.total() < kills and wait_for_progress(run, process, chance):
                run.note_lost()
                kind = chance.choice(["one worker", "all workers", "driver"])
                workers = worker_processes(process.pid)
                victims = {"one worker": workers[:1], "all workers": workers, "driver": [process.pid]}[kind]
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                done[kind] += 1
                if kind == "driver":
                    process.wait()
                    time.sleep(0.5)  # its workers end with it
                    process = run.start()
            else:
                process.wait()
        assert process.returncode == 0
        assert_same_end(run.folder, undisturbed)
        runs, repeated = runs + 1, repeated + run.repeated
        print(f"run {runs}: bit-identical after {done.total()} kills so far", file=sys.stderr, flush=True)
    return done, runs, repeated


def soak_ray(folder: Path, data: Path, kills: int, chance: random.Random) -> tuple[Counter[str], int, int]:
    undisturbed = run_to_end(experiment(folder / "undisturbed-ray", data, **TRAINING))
    done: Counter[str] = Counter()
    runs = repeated = 0
    with ray_nodes(2) as nodes:
        while done.total() < kills:
            run = Run(folder / f"ray{runs}", data, "ray", nodes.environment)
            process = run.start()
            while process.poll() is None:
                if done.total() < kills and wait_for_progress(run, process, chance):
                    run.note_lost()
                    kind = chance.choice(["node", "driver"])
                    if kind == "node":
                        nodes.kill()
                        nodes.add()
                    else:
                        process.kill()
                        process.wait()
                        process = run.start()
                    done[kind] += 1
                else:
                    process.wait()
            assert process.returncode == 0
            assert_same_end(run.folder, undisturbed)
            runs, repeated = runs + 1, repeated + run.repeated
            print(f"Ray run {runs}: bit-identical after {done.total()} kills so far", file=sys.stderr, flush=True)
    return done, runs, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="on the multi-process context")
    parser.add_argument("--ray-kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    print("| context | kills | runs | steps repeated | ends |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        data = data_set(folder / "data")
        for context, kills, soak in (
            ("gloo processes", arguments.kills, soak_processes),
            ("Ray, two nodes", arguments.ray_kills, soak_ray),
        ):
            if kills:
                done, runs, repeated = soak(folder, data, kills, chance)
                listed = ", ".join(f"{n} × {kind}" for kind, n in sorted(done.items()))
                print(f"| {context} | {listed} | {runs} | {repeated} | all bit-identical |", flush=True)


if __name__ == "__main__":
    main()
