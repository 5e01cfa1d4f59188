"""Classes weighted by recent loss: any number of workers draws the same episodes and ends with the same parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import experiment as experiments
from pipeline.experiment import Experiment
from tests.faults import difference, experiment, final_params, open_run, run_to_end

pytestmark = pytest.mark.distributed


def weighted(runs: Path, data: Path, **training: object) -> Experiment:
    content = experiment(runs, data, **training).to_dict()
    content["task"]["difficulty"] = {"strength": 3, "momentum": 0.5, "uniform_share": 0.1, "warmup_steps": 4}
    return experiments.from_dict(content, source="test")


def test_any_number_of_workers_draws_the_same_episodes(tiny_data: Path, tmp_path: Path) -> None:
    """W = 1, 2, and 2 and then 3, with shares as unequal as 3, 3, 2 and other chunks: ≤ 1e-10 relative."""
    reference = run_to_end(weighted(tmp_path / "1", tiny_data, backend="local"))
    two = run_to_end(weighted(tmp_path / "2", tiny_data, num_workers=2, task_chunk=3))
    shutil.copytree(tmp_path / "2", tmp_path / "3")
    three = weighted(tmp_path / "3", tiny_data, num_workers=3, task_chunk=3)
    shutil.rmtree(open_run(three).checkpoints.path(20))  # as if two workers had got to step 10
    for run in (two, run_to_end(three)):
        assert difference(final_params(run), final_params(reference)) <= 1e-10
        assert difference(run.checkpoints.load(20)["classes"], reference.checkpoints.load(20)["classes"]) <= 1e-10
