"""Problems small enough for references by hand: a quadratic with a closed form, and a network written out in plain ops.

Nothing here comes from the package's algorithms: one task at a time, PyTorch's own derivatives, float64.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.mlp import MLP, MLPConfig
from pipeline.tasks.objectives import Regression
from pipeline.types import MetaState, Params, Statistics, TaskBatch

DIMENSION = 3  # of the quadratic
TASKS, N_WAY, INPUTS, HIDDEN = 3, 3, 4, 5  # of the network's episodes


class Point:
    """A model whose output is its parameter: with a squared loss, a quadratic in the parameters."""

    stochastic = False
    parameter_names = ("theta",)
    head = ("head.weight", "head.bias")  # it has none
    norm_layers: ClassVar[list[str]] = []

    def init(self, seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        return {"theta": torch.randn(DIMENSION, generator=generator, dtype=torch.float64)}

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        return params["theta"].unsqueeze(1), {}


class Quadratic(Regression):
    """½‖θ − c‖² per task; targets [T, 1, D] hold c."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(dim=(1, 2))


def quadratic_batch(tasks: int) -> TaskBatch:
    """Tasks whose support and query losses are both ½‖θ − c‖²; c is `support_y` [T, 1, D]."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(tasks, 1, DIMENSION, generator=generator, dtype=torch.float64)
    x = torch.zeros(tasks, 1, 1, dtype=torch.float64)
    return TaskBatch(x, centres, x, centres)


def network(normalization: str = "batch") -> MLP:
    """One hidden layer: `layer1`, `norm1`, ReLU, `head`."""
    config = MLPConfig(name="mlp", hidden=[HIDDEN], normalization=normalization)  # type: ignore[arg-type]
    return config.build(input_shape=(INPUTS,), num_outputs=N_WAY, dtype=torch.float64)


def episodes() -> TaskBatch:
    generator = torch.Generator().manual_seed(4)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, N_WAY * per_class, INPUTS, generator=generator, dtype=torch.float64)
        return x, torch.arange(N_WAY).repeat_interleave(per_class).expand(TASKS, -1)

    return TaskBatch(*part(2), *part(3))


def shaken(state: MetaState, size: float = 0.3) -> MetaState:
    """With random numbers added to every meta-parameter, so that all of them matter and none are alike."""
    generator = torch.Generator().manual_seed(5)
    params = {k: v + size * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.params.items()}
    return MetaState(params, state.buffers)


def features(params: Params, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """One task's hidden layer: x [N, INPUTS] -> [N, HIDDEN], normalized by its own or the given mean and variance."""
    x = x @ params["layer1.weight"].T + params["layer1.bias"]
    if "norm1.weight" in params:
        mean, var = statistics or (x.mean(0), x.var(0, unbiased=False))
        x = (x - mean) / (var + 1e-5).sqrt() * params["norm1.weight"] + params["norm1.bias"]
    return x.clamp_min(0)


def outputs(params: Params, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    return features(params, x, statistics) @ params["head.weight"].T + params["head.bias"]


def loss(params: Params, x: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    return F.cross_entropy(outputs(params, x, statistics), y)


def leaves(params: Params) -> Params:
    return {k: v.clone().requires_grad_() for k, v in params.items()}


def assert_gradients(got: Params, total: Tensor, wanted: Params, tolerance: float = 1e-10) -> None:
    """Each of `got` is the derivative of `total` by the leaf of its name, to a relative tolerance."""
    assert got.keys() == wanted.keys()
    scale = torch.stack([g.norm() for g in got.values()]).norm()
    expected = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    for name, want in zip(wanted, expected, strict=True):
        want = torch.zeros_like(wanted[name]) if want is None else want
        # layer1.bias stands before a normalization: its gradient is zero but for rounding
        assert float((got[name] - want).norm()) <= tolerance * float(want.norm() + 1e-3 * scale), name
