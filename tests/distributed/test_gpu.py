"""On a CUDA device: the same episodes and parameters as on a CPU, NCCL with one worker, no waiting for the device."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

from pipeline import experiment as experiments
from pipeline.errors import StopRequested
from pipeline.runs import RunFolder
from pipeline.training import compiled, journal, loop
from pipeline.training.compiled import Compiled
from pipeline.training.context import LocalContext
from pipeline.training.plan import Plan
from pipeline.training.step import slots_of_rank
from tests.faults import difference, experiment, final_params, open_run, run_to_end

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


def test_outer_steps_are_queued_without_waiting_for_the_device(tiny_data: Path, tmp_path: Path) -> None:
    """Sampling, meta-gradient, update and the copy of the numbers: CUDA itself raises where one of them waits."""
    exp = experiment(tmp_path, tiny_data, backend="local", use_gpu=True)
    context = LocalContext("cuda")
    parts = experiments.build(exp, device=context.device)
    state, clock = loop._initial_state(exp, parts, open_run(exp), context.device), loop._Clock()
    state.plan = Plan(parts.model.kernel, parts.model.precision, None, None)
    slots = slots_of_rank(context, exp.training.meta_batch_size).to(context.device)
    queued: deque = deque()
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")  # the first ones choose kernels
        try:
            batch = parts.family.sample("meta_train", step, slots, seed=0)
            queued.append(loop._queue_outer_step(context, exp, parts, state, batch, clock, late=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if len(queued) > 1:
            metrics, _ = loop._finish_outer_step(context, exp, state, queued.popleft(), clock)
            assert metrics["compute_seconds_max"] >= 0
            assert metrics["all_reduce_seconds"] >= 0
    assert state.skipped == 0


class StopsAt(LocalContext):
    """Asked to end before the outer step of the given number."""

    def __init__(self, outer_step: int) -> None:
        super().__init__("cuda")
        self.left = outer_step

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=["adam", "momentum"])
def test_a_resumed_run_ends_as_a_whole_one_does(options: dict, tiny_data: Path, tmp_path: Path) -> None:
    whole, stopped = (
        experiment(tmp_path / name, tiny_data, backend="local", use_gpu=True, outer=options)
        for name in ("whole", "stopped")
    )
    loop.train(StopsAt(1000), whole, open_run(whole))
    with pytest.raises(StopRequested):
        loop.train(StopsAt(7), stopped, open_run(stopped))
    loop.train(StopsAt(1000), stopped, open_run(stopped))
    ends = [RunFolder(tmp_path / name / "images" / "001") for name in ("stopped", "whole")]
    assert difference(*map(final_params, ends)) <= 1e-8  # cuDNN does not promise the same bits twice
    assert [record["step"] for record in journal.read(ends[0].journal)] == list(range(1, 21))


def test_a_compiled_meta_gradient_is_the_eager_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "cache"))
    device = torch.device("cuda")
    exp = experiment(tmp_path, tiny_data, use_gpu=True)
    parts = experiments.build(exp, device=device)
    fast = Compiled(parts.algorithm)
    state = parts.algorithm.init(0)
    state = state._replace(params={name: value.to(device) for name, value in state.params.items()})
    batch = parts.family.sample("meta_train", 0, torch.arange(4, device=device), seed=0)
    ours, theirs = fast.meta_grad(state, batch, step=0), parts.algorithm.meta_grad(state, batch, step=0)
    assert fast.programs == 1
    for name, value in theirs.grads.items():
        assert float((ours.grads[name] - value).norm() / value.norm()) <= 1e-10, name


@pytest.mark.parametrize(("options", "most"), [({"tf32": True}, 0.05), ({"precision": "mixed"}, 0.2)])
def test_lower_precisions_point_the_same_way(options: dict, most: float, tiny_data: Path, tmp_path: Path) -> None:
    device = torch.device("cuda")
    gradients = []
    for settings in ({}, options):
        exp = experiment(tmp_path, tiny_data, use_gpu=True, dtype="float32", **settings)
        parts = experiments.build(exp, device=device)
        state = parts.algorithm.init(0)
        state = state._replace(params={name: value.to(device) for name, value in state.params.items()})
        batch = parts.family.sample("meta_train", 0, torch.arange(16, device=device), seed=0)
        grads = parts.algorithm.meta_grad(state, batch, step=0).grads
        gradients.append(torch.cat([g.flatten() for g in grads.values()]))
    assert 0 < float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < most
