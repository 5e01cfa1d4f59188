"""What the tests of faults share: small runs in real processes, and whether one ended as an undisturbed one did."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import experiment as experiments
from pipeline import initial, launch, runs
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training import journal
from pipeline.training.journal import CLOCK_METRICS
from pipeline.types import Params

DRIVER = """
import signal, sys
from pipeline import experiment as experiments, launch, runs
from pipeline.errors import Interrupted
def interrupt(number, frame):
    raise Interrupted(number)
if __name__ == "__main__":  # the workers are spawned and import this file
    signal.signal(signal.SIGTERM, interrupt)
    exp = experiments.load(sys.argv[1])
    run, resumed = runs.open_run(exp, data_digest=experiments.check_fits(exp))
    print("resumed" if resumed else "new", flush=True)
    try:
        launch.run_workers(exp, run)
    except Interrupted as interruption:
        sys.exit(128 + interruption.signal_number)
"""


BRAKED_NET = """
import time
from pathlib import Path
from torch import nn
class Braked(nn.Sequential):  # of images 12×12×1, five classes
    def __init__(self, brake):
        convolution = nn.Conv2d(1, 4, 3, 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5))
        self.brake = Path(brake)
    def forward(self, x):
        if self.brake.exists():
            time.sleep(0.01)
        return super().forward(x)
"""


class Brake:
    """Training that goes slowly, a tenth of a second a step and more, until it is released.

    So what is done to a run meanwhile meets it in the middle, however fast the machine and however slow the cluster.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "braked_net.py").write_text(BRAKED_NET)
        self._file = folder / "brake"
        self.model = {
            "name": "module",
            "factory": "braked_net:Braked",
            "arguments": {"brake": str(self._file)},
            "batching": "loop",
            "folder": str(folder),
        }

    def pull(self) -> None:
        self._file.touch()

    def release(self) -> None:
        self._file.unlink()


def experiment(
    runs_folder: Path | str, data: Path | str, *, model: dict[str, Any] | None = None, **training: object
) -> Experiment:
    """Seconds of training on the multi-process context."""
    content = {
        "name": "images",
        "task": {"family": "images", "data": str(data), "split": "random", "n_query": 2, "eval_n_query": 2},
        "model": model or {"name": "conv4", "hidden": 4, "downsample": "stride"},
        "algorithm": {"name": "maml", "inner_lr": 0.1, "adaptation_steps": 2},
        "training": {
            "steps": 20,
            "meta_batch_size": 8,
            "backend": "processes",
            "dtype": "float64",
            "validate_every": 10,
            **training,
        },
        "evaluation": {"validation_episodes": 7},
        "tracking": {"runs": str(runs_folder)},
    }
    return experiments.from_dict(content, source="test")


def open_run(exp: Experiment) -> RunFolder:
    return runs.open_run(exp, data_digest=experiments.check_fits(exp), initial=lambda: initial.resolve(exp))[0]


def run_to_end(exp: Experiment) -> RunFolder:
    """The run of an experiment, gone on with if there is one."""
    run = open_run(exp)
    launch.run_workers(exp, run)
    return run


def final_params(run: RunFolder) -> Params:
    latest = run.checkpoints.latest()
    assert latest is not None
    return run.checkpoints.load_meta(latest).params


def without_clock(run: RunFolder) -> list[dict[str, Any]]:
    hidden = {"time", *CLOCK_METRICS}
    return [{k: v for k, v in record.items() if k not in hidden} for record in journal.read(run.journal)]


def assert_same_end(run: RunFolder, undisturbed: RunFolder) -> None:
    """Parameters, optimizer state and every step's metrics: bit-identical, no step lost, none twice."""
    last = undisturbed.checkpoints.latest()
    assert last is not None
    assert run.checkpoints.latest() == last
    ours, theirs = run.checkpoints.load(last), undisturbed.checkpoints.load(last)
    for name, value in theirs["params"].items():
        assert torch.equal(ours["params"][name], value), name
    for key, entry in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][key][k], v) for k, v in entry.items()), key
    assert without_clock(run) == without_clock(undisturbed)
    assert [record["step"] for record in without_clock(run)] == list(range(1, last + 1))


def difference(ours: Params, theirs: Params) -> float:
    """The largest relative difference of a parameter."""
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in theirs.items())


def wait_until(happened: Callable[[], bool], *, seconds: float = 200, watch: subprocess.Popen | None = None) -> None:
    """watch: a process that must not end meanwhile."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert watch is None or watch.poll() is None, "the process ended too early"
        time.sleep(0.01)


def reached(run: RunFolder, step: int) -> bool:
    """Whether a run has a checkpoint of `step` or later."""
    return (run.checkpoints.latest() or -1) >= step


def worker_processes(driver: int | None = None) -> list[int]:
    """The training processes of the multi-process context that `driver` (or this process) has started, by rank."""
    children = psutil.Process(driver).children()
    forked = [
        child for server in children if _runs(server, "multiprocessing.forkserver") for child in server.children()
    ]
    return [process.pid for process in [*forked, *children] if process in forked or _runs(process, "spawn_main")]


def _runs(process: psutil.Process, words: str) -> bool:
    try:
        return any(words in argument for argument in process.cmdline())
    except psutil.Error:  # gone meanwhile
        return False
