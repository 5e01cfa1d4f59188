"""Compiled meta-gradients: what a program would freeze stays eager, and there are never too many programs.

What is compiled for real takes minutes: tests/distributed/test_compiled.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.training import compiled
from pipeline.training.compiled import MAX_PROGRAMS, Compiled
from pipeline.types import MetaGradient, MetaState, TaskBatch
from tests.distributed.test_compiled import assert_close, images, maml, said


class Scaled(MAML):
    """Changes what `meta_grad` returns."""

    def scale(self, step: int, batch: TaskBatch) -> Any:
        raise NotImplementedError

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        gradient = super().meta_grad(state, batch, step=step)
        scale = self.scale(step, batch)
        return gradient._replace(grads={name: value * scale for name, value in gradient.grads.items()})


class Annealed(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        return max(0.0, 1 - step / 10)


class AnnealedByPhase(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        return 1.0 if step < 2 else 0.5


class AnnealedQuietly(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        try:
            return 1.0 / (1 + step)
        except Exception:
            return 1.0


class ByValue(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        return 2.0 if batch.query_x.mean() > 0.5 else 0.5


class ByNumpy(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        return float(batch.query_x.numpy().mean())


class Random(Scaled):
    def scale(self, step: int, batch: TaskBatch) -> Any:
        return torch.rand((), dtype=batch.query_x.dtype)


class Outside(Scaled):
    factor = torch.tensor(2.0)  # it could be another at the next call

    def scale(self, step: int, batch: TaskBatch) -> Any:
        return self.factor


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Annealed, "anneals by the outer step"),
        (AnnealedByPhase, "anneals by the outer step"),
        (AnnealedQuietly, "anneals by the outer step"),
        (ByValue, "cannot be traced"),
        (ByNumpy, "cannot be traced"),
        (Random, "draws global random numbers"),
        (Outside, "cannot be traced"),
    ],
)
def test_what_a_program_would_freeze_stays_eager(
    kind: type[Scaled], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = maml("mlp")
    eager = kind(base.config, model=base.model, objective=base.objective)
    fast, state = Compiled(eager), eager.init(0)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            for scale in (1.0, 0.01):
                batch = images()
                batch = batch._replace(query_x=batch.query_x * scale)
                torch.manual_seed(step)
                ours = fast.meta_grad(state, batch, step=step)
                torch.manual_seed(step)
                assert_close(ours, eager.meta_grad(state, batch, step=step), relative=0)
    messages = said(caplog)
    assert [reason in message for message in messages] == [True], "said once"
    assert "\n" not in messages[0]


def test_a_folder_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    eager = maml("mlp")
    fast = Compiled(eager)
    fast.meta_grad(eager.init(0), images(), step=0)
    assert [f"{tmp_path}/file/cache cannot be written" in message for message in said(caplog)] == [True]


def test_every_shape_its_program_and_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = maml("mlp")
    made: list[int] = []

    program = compiled._Program(lambda *inputs: list(inputs[:6]), (tuple(eager.init(0).params), (), ()), None)
    monkeypatch.setattr(compiled, "_compile", lambda *args: made.append(len(args[2].support_x)) or program)
    fast, state = Compiled(eager), eager.init(0)
    for _ in range(3):
        for tasks in range(1, MAX_PROGRAMS + 3):
            fast.meta_grad(state, images(tasks), step=0)
    assert made == list(range(1, MAX_PROGRAMS + 1))
