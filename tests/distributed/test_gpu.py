"""On a CUDA device: the same episodes as on a CPU, the same parameters in float64, and NCCL with one worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import experiment as experiments
from tests.distributed.test_processes import experiment, final_params, run_to_end

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


def test_episodes_are_the_same_on_both_devices(tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, tiny_data)
    draws = []
    for device in ("cpu", "cuda"):
        family = experiments.build(exp, device=torch.device(device)).family
        draws.append([part.cpu() for part in family.sample("meta_train", 3, torch.arange(8), seed=0)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_one_nccl_worker_trains_the_parameters_of_the_cpu(tiny_data: Path, tmp_path: Path) -> None:
    on_cpu = final_params(run_to_end(experiment(tmp_path / "cpu", tiny_data)))
    on_gpu = final_params(run_to_end(experiment(tmp_path / "gpu", tiny_data, use_gpu=True)))
    for name, value in on_cpu.items():
        assert float((on_gpu[name] - value).norm() / value.norm()) <= 1e-8, name
