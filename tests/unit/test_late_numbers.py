"""The loop as it runs on a GPU, where the host reads a step's numbers one step late; here both ways run on a CPU.

The device itself leaves out a step that is not finite; what is trained and written must not differ in a bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.errors import StopRequested, TrainingStopped
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training import journal, loop
from pipeline.training.context import LocalContext
from pipeline.training.outer import OuterConfig, load_optimizer, make_optimizer, update, update_where
from pipeline.types import MetaGradient, MetaState, Params, TaskBatch
from tests.faults import assert_same_end, experiment, open_run

SPOILT = (0, 5, 6, 11)  # outer steps that are not finite, the first one among them
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.1, "gradient_clip": 0.5},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
]


class StopsAt(LocalContext):
    def __init__(self, outer_step: int) -> None:
        super().__init__()
        self.left = outer_step

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    meta_grad = MAML.meta_grad

    def not_always_finite(self: MAML, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        if step in SPOILT:
            batch = batch._replace(query_x=batch.query_x * float("nan"))
        return meta_grad(self, state, batch, step=step)

    monkeypatch.setattr(MAML, "meta_grad", not_always_finite)


def trained(exp: Experiment, monkeypatch: pytest.MonkeyPatch, *, steps_late: int, stop_at: int = 1000) -> RunFolder:
    run = open_run(exp)
    monkeypatch.setattr(loop, "_steps_late", lambda device: steps_late)
    loop.train(StopsAt(stop_at), exp, run)
    return run


@pytest.mark.parametrize("algorithm", [{}, {"inductive_statistics": "running"}], ids=["plain", "running"])
@pytest.mark.parametrize("outer", [OPTIMIZERS[0], OPTIMIZERS[3]], ids=["adam", "momentum"])
def test_nothing_differs(
    algorithm: dict, outer: dict, spoilt: None, monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path
) -> None:
    runs = []
    for steps_late in (0, 1):
        exp = experiment(tmp_path / str(steps_late), tiny_data, backend="local", outer=outer, dtype="float32")
        exp = exp.model_copy(update={"algorithm": exp.algorithm.model_copy(update=algorithm)})
        runs.append(trained(exp, monkeypatch, steps_late=steps_late))
    assert_same_end(*runs)
    records = journal.read(runs[1].journal)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert ["meta_loss" not in record for record in records] == [step in SPOILT for step in range(20)]
    assert records[-1]["skipped_steps"] == len(SPOILT)


@pytest.mark.parametrize("stop_at", [0, 7, 9, 10])
def test_a_stop_is_followed_with_a_checkpoint_of_every_step_taken(
    stop_at: int, monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path
) -> None:
    whole = trained(experiment(tmp_path / "whole", tiny_data, backend="local"), monkeypatch, steps_late=1)
    exp = experiment(tmp_path / "stopped", tiny_data, backend="local")
    with pytest.raises(StopRequested):
        trained(exp, monkeypatch, steps_late=1, stop_at=stop_at)
    run = open_run(exp)
    assert len(journal.read(run.journal)) == run.checkpoints.latest() in (stop_at + 1, stop_at + 2)
    assert_same_end(trained(exp, monkeypatch, steps_late=1), whole)


def test_too_many_steps_that_are_not_finite_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path
) -> None:
    exp = experiment(tmp_path, tiny_data, backend="local", dtype="float32", max_nonfinite_steps=3)
    exp = exp.model_copy(update={"algorithm": exp.algorithm.model_copy(update={"inner_lr": 1e30})})
    with pytest.raises(TrainingStopped, match="not finite 3 times in a row"):
        trained(exp, monkeypatch, steps_late=1)


def some_params(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"weight": (4, 3), "bias": (4,)}.items()}


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_an_update_that_is_left_out_changes_no_bit(options: dict[str, Any]) -> None:
    """Left out at the first step, where the optimizer has no state yet, and later; the others equal `update`."""
    config = OuterConfig(**options)
    params, theirs = some_params(0), some_params(0)
    optimizer, their_optimizer = make_optimizer(config, params), make_optimizer(config, theirs)
    for step in range(6):
        grads = some_params(step + 1)
        finite = step not in (0, 3)
        if finite:
            expected = update(config, their_optimizer, theirs, grads, lr=0.1)
        else:
            grads["bias"] = grads["bias"] * float("nan")
        norm = update_where(torch.tensor(finite), config, optimizer, params, grads, lr=0.1)
        assert not finite or torch.equal(norm, expected)
        assert all(torch.equal(params[name], theirs[name]) for name in params)
        for ours, other in zip(optimizer.state.values(), their_optimizer.state.values(), strict=False):
            assert all(torch.equal(ours[k], v) for k, v in other.items() if isinstance(v, torch.Tensor))


def test_a_checkpoint_of_another_device_keeps_this_ones_counters() -> None:
    params = some_params(0)
    optimizer = make_optimizer(OuterConfig(), params)
    update(OuterConfig(), optimizer, params, some_params(1), lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["capturable"] = True  # written on a GPU
    other = make_optimizer(OuterConfig(), some_params(0))
    load_optimizer(other, saved)
    assert other.param_groups[0]["capturable"] is False
    assert saved["param_groups"][0]["capturable"] is True
