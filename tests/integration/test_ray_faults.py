"""Faults of a real Ray cluster of several nodes: after each, the run ends as an undisturbed one does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training import journal
from tests.faults import (
    DRIVER,
    Brake,
    assert_same_end,
    difference,
    experiment,
    final_params,
    reached,
    run_to_end,
    wait_until,
)
from tests.servers.ray_on_one_machine import Nodes, ray_nodes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]  # each starts Ray several times

TRAINING = {"steps": 160, "validate_every": 40, "num_workers": 2, "dtype": "float32", "meta_batch_size": 16}
STEP_SECONDS = 2  # in which a step that was begun is over, and no worker has started yet


class Driver:
    """A driver process of an experiment on a cluster."""

    def __init__(self, exp: Experiment, folder: Path, nodes: Nodes) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "driver.py").write_text(DRIVER)
        (folder / "experiment.yaml").write_text(yaml.safe_dump(exp.to_dict()))
        self._command = [sys.executable, str(folder / "driver.py"), str(folder / "experiment.yaml")]
        self._environment = {**nodes.environment, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        self.run = RunFolder(Path(exp.tracking.runs) / exp.name / "001")

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def steps(self) -> int:
        """The last step in the journal."""
        return max((record["step"] for record in journal.read(self.run.journal)), default=0)

    def trained_since(self, moment: float) -> bool:
        """Whether a group of workers has trained that was started after `moment` (of the host's clock)."""
        newest = max((record["time"] for record in journal.read(self.run.journal)), default=0)
        return newest / 1000 > moment + STEP_SECONDS

    def workers_seen(self) -> list[int]:
        """The numbers of workers that trained, in their order, repetitions left out."""
        numbers = [int(record["num_workers"]) for record in journal.read(self.run.journal)]
        return [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]


def driver(data: Path, folder: Path, nodes: Nodes, brake: Brake, **training: object) -> Driver:
    exp = experiment(folder / "runs", data, model=brake.model, **{**TRAINING, **training}, backend="ray")
    return Driver(exp, folder, nodes)


def end(process: subprocess.Popen[str]) -> None:
    _, messages = process.communicate(timeout=200)
    assert process.returncode == 0, messages


def test_one_run_through_every_fault_of_a_cluster(tiny_data: Path, tmp_path: Path) -> None:
    """Bit-identical to the same number of workers on the multi-process context, undisturbed."""
    brake = Brake(tmp_path / "net")
    undisturbed = run_to_end(experiment(tmp_path / "undisturbed", tiny_data, model=brake.model, **TRAINING))
    brake.pull()
    with ray_nodes(2) as nodes:
        ours = driver(tiny_data, tmp_path, nodes, brake)

        # a pod that is taken away drains its node first: a checkpoint at once, and only then the node ends
        process = ours.start()
        wait_until(lambda: ours.steps() > 3, watch=process)
        before = time.monotonic()
        nodes.drain()
        assert time.monotonic() - before < 50, "the node ended by itself when its worker had left, not at the deadline"
        announced = ours.run.checkpoints.latest()
        assert announced is not None
        assert announced < 40, "before the first validation"
        nodes.kill()
        nodes.add()
        wait_until(lambda: ours.steps() > announced, watch=process)

        # the head's server dies and comes back with its state: the workers train on
        alone = ours.steps()
        nodes.restart_head()
        wait_until(lambda: ours.steps() > alone + 3, watch=process)

        # SIGTERM of the driver (`metapipe jobs stop`): a checkpoint of the very step, then the end
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 143, messages
        terminated = ours.run.checkpoints.latest()
        assert terminated is not None
        assert announced < terminated == ours.steps()

        # a worker dies without notice: the group is started again
        process = ours.start()
        wait_until(lambda: ours.steps() > terminated, watch=process)
        nodes.kill_worker()
        moment = time.time()
        wait_until(lambda: ours.trained_since(moment), watch=process)

        # a node dies without notice, and another is there
        nodes.kill()
        nodes.add()
        moment = time.time()
        wait_until(lambda: ours.trained_since(moment), watch=process)

        # the driver dies without notice; its workers end with it
        process.kill()
        process.communicate()
        killed = ours.steps()

        # the head dies, and with it the cluster (Ray keeps a head's state only in an external Redis)
        process = ours.start()
        wait_until(lambda: ours.steps() > killed, watch=process)
        nodes.kill_all()
        process.kill()  # it would wait for the head for minutes
        process.communicate()
    assert not reached(ours.run, 160)
    brake.release()
    with ray_nodes(2) as another:
        end(driver(tiny_data, tmp_path, another, brake).start())
    assert_same_end(ours.run, undisturbed)


def test_workers_leave_and_join(tiny_data: Path, tmp_path: Path) -> None:
    """One to two workers, as there are nodes: float64, 50 steps, ≤ 1e-10 of the undisturbed run."""
    training = {"steps": 50, "validate_every": 2, "dtype": "float64"}
    brake = Brake(tmp_path / "net")
    reference = run_to_end(experiment(tmp_path / "reference", tiny_data, model=brake.model, **{**TRAINING, **training}))
    brake.pull()
    with ray_nodes(2) as nodes:
        ours = driver(tiny_data, tmp_path / "elastic", nodes, brake, **training, num_workers=[1, 2], resize_seconds=2)
        process = ours.start()
        wait_until(lambda: reached(ours.run, 4), watch=process)
        nodes.kill()
        wait_until(lambda: ours.workers_seen()[-1] == 1, watch=process)
        nodes.add()
        wait_until(lambda: ours.workers_seen()[-1] == 2, watch=process)
        brake.release()
        end(process)
    assert ours.workers_seen() == [2, 1, 2]
    assert difference(final_params(ours.run), final_params(reference)) <= 1e-10
