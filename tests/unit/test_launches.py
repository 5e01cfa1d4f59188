"""What a meta-step launches: a number of ops that does not depend on how many tasks there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.kernels import closed
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.types import TaskBatch


class Launches(TorchDispatchMode):
    """Counts ops; views launch nothing and are counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            self.views += 1
        else:
            self.ops += 1
        return func(*args, **(kwargs or {}))


def launches(kind: str, *, tasks: int, steps: int) -> Launches:
    model: Any
    if kind == "mlp":
        model = MLPConfig(name="mlp").build(input_shape=(1,), num_outputs=1, dtype=torch.float32)
        points = torch.rand(tasks, 10, 1)
        batch, objective = TaskBatch(points, points, points, points), Regression()
    else:
        config = Conv4Config(name="conv4", hidden=16, downsample=kind)  # type: ignore[arg-type]
        model = config.build(input_shape=(1, 28, 28), num_outputs=5, dtype=torch.float32)
        images, labels = torch.rand(tasks, 5, 1, 28, 28), torch.arange(5).expand(tasks, 5)
        batch, objective = TaskBatch(images, labels, images, labels), Classification()  # type: ignore[assignment]
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=steps), model=model, objective=objective)
    with Launches() as counted:
        maml.meta_grad(maml.init(0), batch, step=0)
    return counted


@pytest.mark.parametrize("kind", ["mlp", "stride", "max_pool"])
def test_as_many_for_eight_tasks_as_for_two(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "_tasks_at_once", len)  # as on a GPU
    few, many = (launches(kind, tasks=tasks, steps=2) for tasks in (2, 8))
    assert (few.ops, few.views) == (many.ops, many.views)


def test_every_inner_step_of_the_mlp_launches_the_same() -> None:
    """And no more than is known: a change that launches more should be a decision."""
    counts = [launches("mlp", tasks=2, steps=steps).ops for steps in (2, 3, 4)]
    assert counts[1] - counts[0] == counts[2] - counts[1] <= 80
