"""Plans: tasks at once within a memory budget, kernels that every rank has, what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import experiment as experiments
from pipeline.algorithms.maml import MAML
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training import journal, plan
from pipeline.training.context import LocalContext
from pipeline.training.loop import train
from pipeline.training.plan import Plan
from tests import faults

CPU = torch.device("cpu")


def experiment(folder: Path, data: Path, **training: object) -> Experiment:
    settings = {"steps": 4, "validate_every": 2, "backend": "local", "num_workers": 1, "kernel": "closed", **training}
    return faults.experiment(folder, data, **settings)


def trained(exp: Experiment) -> RunFolder:
    run = faults.open_run(exp)
    train(LocalContext(), exp, run)
    return run


def kept_plan(run: RunFolder) -> Plan:
    return Plan(**run.checkpoints.load(run.checkpoints.latest() or 0)["plan"])


def test_peak_bytes_are_those_that_live_together() -> None:
    x = torch.zeros(1000)
    assert plan.peak_bytes(lambda: (x + 1).sum(), CPU) == 4000 + 4
    assert plan.peak_bytes(lambda: [x + 1 for _ in range(5)], CPU) == 5 * 4000
    assert plan.peak_bytes(lambda: [(x + 1).sum() for _ in range(5)], CPU) == 4000 + 5 * 4
    assert plan.peak_bytes(lambda: x.view(10, 100)[3:].T, CPU) == 0, "views take nothing"
    assert plan.peak_bytes(lambda: [x.add_(1) for _ in range(5)], CPU) == 0


def test_the_chunk_is_the_largest_within_the_budget(tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, tiny_data, task_chunk=8, memory_budget="0.5 MiB")
    parts = experiments.build(exp, device=CPU)
    run = trained(exp)
    chunk = kept_plan(run).chunk
    assert chunk is not None
    assert 1 < chunk < 8

    def peak(tasks: int) -> int:
        batch = parts.family.sample("meta_train", 0, torch.arange(tasks), seed=0)
        state = parts.algorithm.init(0)
        return plan.peak_bytes(lambda: parts.algorithm.meta_grad(state, batch, step=0), CPU)

    assert peak(chunk) <= exp.training.memory_bytes == 2**19
    assert peak(chunk + 2) > 2**19, "less than the budget allows, but for rounding"
    assert run.read()["plan"] == Plan("closed", "float32", None, chunk)._asdict()


def test_no_more_tasks_than_are_wanted(tiny_data: Path, tmp_path: Path) -> None:
    assert kept_plan(trained(experiment(tmp_path, tiny_data, task_chunk=3, memory_budget="4 GB"))).chunk == 3


def test_a_budget_that_one_task_exceeds(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget: one task takes \d+ MiB, .*recompute_inner_steps"):
        trained(experiment(tmp_path, tiny_data, memory_budget="0.001 MB"))


@pytest.mark.parametrize("budget", ["4", "GB", "4 kB", "-4 GB", "4 GB of it"])
def test_budgets_that_are_none(budget: str, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory_budget"):
        experiment(tmp_path, tiny_data, memory_budget=budget)


def test_a_resumed_run_takes_its_checkpoints_plan(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = experiment(tmp_path, tiny_data, task_chunk=8, memory_budget="0.5 MiB")
    undisturbed = trained(exp)
    again = experiment(tmp_path / "again", tiny_data, task_chunk=8, memory_budget="0.5 MiB")
    run = faults.open_run(again)

    class Stopping(LocalContext):
        def stop_requested(self) -> bool:
            return len(journal.read(run.journal)) >= 2

    from pipeline.errors import StopRequested

    with pytest.raises(StopRequested):
        train(Stopping(), again, run)
    monkeypatch.setattr(plan, "choose", None)  # nothing is chosen anew
    train(LocalContext(), again, run)
    faults.assert_same_end(run, undisturbed)
    assert kept_plan(run) == kept_plan(undisturbed)


def test_a_checkpoint_without_a_plan_gets_one(tiny_data: Path, tmp_path: Path) -> None:
    """Of an older version."""
    exp = experiment(tmp_path, tiny_data)
    run = trained(exp)
    state = run.checkpoints.load(4)
    assert state.pop("plan") is not None
    from pipeline.training.loop import _initial_state

    restored = _initial_state(exp, experiments.build(exp, device=CPU), run, CPU)
    run.checkpoints.load = lambda *_: state  # type: ignore[method-assign]
    run.checkpoints.restore(restored, 4, CPU)
    assert restored.plan is None


def test_out_of_memory_halves_the_chunk(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is computed whole with fewer tasks at once, and the rest of the run too."""
    expected = trained(experiment(tmp_path / "expected", tiny_data, task_chunk=2))
    meta_grad = MAML.meta_grad

    def small_gpu(self, state, batch, *, step):  # type: ignore[no-untyped-def]
        if len(batch.support_x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return meta_grad(self, state, batch, step=step)

    monkeypatch.setattr(MAML, "meta_grad", small_gpu)
    run = trained(experiment(tmp_path / "halved", tiny_data, task_chunk=8))
    assert [record.get("task_chunk") for record in journal.read(run.journal)] == [2.0, None, None, None]
    assert kept_plan(run).chunk == 2
    for name, value in faults.final_params(expected).items():
        assert torch.equal(faults.final_params(run)[name], value), name

    def no_gpu(self, state, batch, *, step):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MAML, "meta_grad", no_gpu)
    with pytest.raises(torch.OutOfMemoryError):
        trained(experiment(tmp_path / "none", tiny_data, task_chunk=8))
