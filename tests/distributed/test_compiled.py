"""Compiled meta-gradients with a real compiler: the eager ones to 1e-10, alike in every worker and after a resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import StopRequested
from pipeline.models import conv4
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.runs import RunFolder
from pipeline.tasks.objectives import Classification
from pipeline.training import compiled
from pipeline.training.compiled import Compiled
from pipeline.training.context import LocalContext, run_processes
from pipeline.training.loop import train
from pipeline.training.outer import OuterConfig, make_optimizer, update
from pipeline.types import MetaGradient, MetaState, TaskBatch
from tests.faults import assert_same_end, final_params, open_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # a compiler on busy cores

TASKS, CLASSES = 2, 3


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.CACHE_VARIABLE, str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry a program made."""
    made: list[Any] = []
    make = compiled._compile

    def counting(*args: Any) -> Any:
        made.append(args)
        return make(*args)

    monkeypatch.setattr(compiled, "_compile", counting)
    return made


def images(tasks: int = TASKS, n_query: int = 2, dtype: torch.dtype = torch.float64) -> TaskBatch:
    generator = torch.Generator().manual_seed(4)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, CLASSES * per_class, 1, 16, 16, generator=generator, dtype=dtype)
        return x, torch.arange(CLASSES).repeat_interleave(per_class).expand(tasks, -1)

    return TaskBatch(*part(2), *part(n_query))


def maml(model: str, dtype: torch.dtype = torch.float64, **options: Any) -> MAML:
    shape = {"input_shape": (1, 16, 16), "num_outputs": CLASSES, "dtype": dtype}
    built: Any = {
        "mlp": MLPConfig(name="mlp", hidden=[7]),
        "mlp-batch": MLPConfig(name="mlp", hidden=[7], normalization="batch"),
        "conv4-stride": Conv4Config(name="conv4", hidden=4, downsample="stride"),
        "conv4-max_pool": Conv4Config(name="conv4", hidden=4),
    }[model].build(**shape)
    return MAML(MAMLConfig(name="maml", inner_lr=0.3, **options), model=built, objective=Classification())


def assert_close(ours: MetaGradient, theirs: MetaGradient, relative: float = 1e-10) -> None:
    for part, reference in zip(ours, theirs, strict=True):
        assert list(part) == list(reference)
        largest = max((float(value.norm()) for value in reference.values()), default=0.0)
        for name, value in reference.items():  # a bias before a normalization has a gradient of zero, but for rounding
            assert float((part[name] - value).norm()) <= relative * max(float(value.norm()), 1e-3 * largest), name


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == compiled.log.name]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"adaptation_steps": 2}),
        ("mlp-batch", {"first_order": True, "inductive_statistics": "running"}),
        ("conv4-stride", {}),
        ("conv4-max_pool", {"first_order": True, "normalization": "inductive"}),
    ],
    ids=str,
)
def test_the_same_as_eager_in_float64(
    model: str, options: dict[str, Any], counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At three points of a training, with the statistics it collects; one program for all of them."""
    monkeypatch.setattr(conv4, "BLOCKS", 2)  # of four that are alike; compiling takes half the time
    eager = maml(model, **options)
    fast = Compiled(eager)
    state, batch = eager.init(0), images()
    config = OuterConfig(outer_lr=0.01)
    optimizer = make_optimizer(config, state.params)
    for step in range(3):
        expected = eager.meta_grad(state, batch, step=step)
        assert_close(fast.meta_grad(state, batch, step=step), expected)
        update(config, optimizer, state.params, expected.grads, lr=0.01)
        state = MetaState(state.params, fast.update_buffers(state.buffers, expected.statistics))
    assert len(counted) == 1
    assert fast.programs == 1, "else these were eager"
    again = [fast.meta_grad(state, batch, step=9) for _ in range(2)]
    assert all(torch.equal(again[0].grads[name], value) for name, value in again[1].grads.items())


def test_no_compiler_is_said_and_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config

    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    eager = maml("mlp", adaptation_steps=4)
    fast, state = Compiled(eager), eager.init(0)
    assert_close(fast.meta_grad(state, images(), step=0), eager.meta_grad(state, images(), step=0), relative=0)
    assert fast.programs == 0
    assert ["cannot be compiled here" in message for message in said(caplog)] == [True]


def compile_and_save(context: Any, folder: str) -> None:
    os.environ[compiled.CACHE_VARIABLE] = f"{folder}/cache"
    torch.set_num_threads(1)
    eager = maml("mlp", torch.float32)
    fast = Compiled(eager)
    gradient = fast.meta_grad(eager.init(0), images(dtype=torch.float32), step=0)
    assert fast.programs == 1
    torch.save(gradient.grads, f"{folder}/{context.rank}.pt")


def test_workers_that_start_together_share_the_work(tmp_path: Path) -> None:
    run_processes(compile_and_save, str(tmp_path), num_workers=2)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


class StopsAt(LocalContext):
    """Asked to end before the given outer step."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_stopped_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    def sinusoid(folder: Path, **training: Any) -> experiments.Experiment:
        content = {
            "name": "sinusoid",
            "task": {"family": "sinusoid", "k_shot": 5, "n_query": 5},
            "model": {"name": "mlp", "hidden": [8]},
            "algorithm": {"name": "maml", "inner_lr": 0.01},
            "training": {"steps": 20, "validate_every": 5, "meta_batch_size": 5, "task_chunk": 3, "backend": "local"},
            "evaluation": {"validation_episodes": 4},
            "tracking": {"runs": str(folder)},
        }
        content["training"] |= training  # type: ignore[operator]
        return experiments.from_dict(content, source="test")

    ends: list[RunFolder] = []
    for name, calls in (("whole", [99]), ("stopped", [7, 99])):
        exp = sinusoid(tmp_path / name, compile=True)
        run = open_run(exp)
        for left in calls:
            try:
                train(StopsAt(left), exp, run)
            except StopRequested:
                assert left == 7
        ends.append(run)
    assert_same_end(*ends)
    exp = sinusoid(tmp_path / "eager")
    eager = open_run(exp)
    train(LocalContext(), exp, eager)
    for name, value in final_params(eager).items():
        torch.testing.assert_close(final_params(ends[0])[name], value, rtol=1e-3, atol=1e-5)
