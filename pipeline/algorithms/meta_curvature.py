"""Meta-Curvature: learn how a gradient is transformed before it is a step.

Park & Oliva 2019, "Meta-Curvature". The inner step (sec. 3) is θ' = θ − α MC(∇L_support(θ)). The gradient of a
convolution's weight is a tensor G of outputs × inputs × filter positions, and the transformation multiplies each of its
modes by a learned matrix: MC(G) = G ×₃ M_f ×₂ M_i ×₁ M_o. A fully connected layer's weight has the two modes outputs
and inputs, a vector (bias, gain) the one. All matrices start as the identity, where the inner step is MAML's; they are
the same at every step and for every task. The whole is a Kronecker-factored preconditioner, whose large matrix is never
made.

Disadvantages: a layer's matrices have as many entries as the squares of its sizes, so a head on many features has more
curvature than weights; nothing holds the matrices positive definite, so a transformed step need not descend; what is
learned fits to the number of steps and shots of training. With `first_order` curvature still learns, the
initialization's second derivatives are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.errors import ConfigError
from pipeline.types import MetaState, Objective, Params, TaskModel

LARGEST_MODE = 4096  # of a parameter: its matrix has that many entries squared
MODES = ("out", "in", "filter")  # of a parameter [outputs, inputs, ...], as far as it has them; a scalar has one


class MetaCurvatureConfig(InnerLoopConfig):
    """Learned matrices that transform gradients."""

    name: Literal["meta_curvature"]

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> MetaCurvature:
        return MetaCurvature(self, model=model, objective=objective)


class MetaCurvature(GradientBased):
    """Algorithm: MAML with transformed inner gradients."""

    def __init__(
        self, config: MetaCurvatureConfig, *, model: TaskModel, objective: Objective, train_classes: int | None = None
    ) -> None:
        """Raises ConfigError: a parameter that adapts is too long for a matrix of its length squared."""
        super().__init__(config, model=model, objective=objective, train_classes=train_classes)
        params = model.init(0)
        for name in self.adapted_names:
            longest = max(_mode_sizes(params[name]))
            if longest > LARGEST_MODE:
                raise ConfigError(
                    f"algorithm.name: meta_curvature learns a matrix of {longest}×{longest} for {name}, which is too "
                    f"large. Leave it alone in inner steps (algorithm.freeze: [{name}]), or choose another algorithm."
                )

    def init(self, seed: int) -> MetaState:
        params = self.model.init(seed)
        matrices = {}
        for name in self.adapted_names:
            value = params[name]
            for mode, size in zip(MODES, _mode_sizes(value), strict=False):
                matrices[_name_of(mode, name)] = torch.eye(size, dtype=value.dtype)
        return MetaState(params | matrices, {})

    def describe(self, state: MetaState) -> dict[str, float]:
        """How far each matrix is from the identity: ‖M − I‖ / ‖I‖ (Frobenius)."""
        names = [_name_of(mode, name) for name in self.adapted_names for mode in MODES]
        matrices = {name: state.params[name].detach() for name in names if name in state.params}
        eyes = [torch.eye(len(m), dtype=m.dtype, device=m.device) for m in matrices.values()]
        distances = [(m - eye).norm() / eye.norm() for m, eye in zip(matrices.values(), eyes, strict=True)]
        numbers = torch.stack(distances).tolist()
        return {name.replace("meta_curvature/", "curvature_", 1): d for name, d in zip(matrices, numbers, strict=True)}

    def _transform(self, grads: Params, learned: Params, number: int) -> Params:
        return {
            name: transformed(grad, [learned[_name_of(mode, name)] for mode in MODES[: max(grad.ndim - 1, 1)]])
            for name, grad in grads.items()
        }


def transformed(grad: Tensor, matrices: list[Tensor]) -> Tensor:
    """grad [T, outputs, inputs, ...] with each mode multiplied by its matrix [T, size, size]; the same shape.

    One matrix for the outputs, one for the inputs, one for all further dimensions together, as many as there are.
    """
    value = grad.flatten(3) if grad.ndim > 3 else grad.reshape(len(grad), -1) if grad.ndim == 1 else grad
    for dimension, matrix in enumerate(matrices, start=1):
        along = value.movedim(dimension, 1)
        value = torch.einsum("tab,tb...->ta...", matrix, along).movedim(1, dimension)
    return value.reshape(grad.shape)


def _mode_sizes(value: Tensor) -> list[int]:
    outputs_and_inputs, filters = list(value.shape[:2]) or [1], value.shape[2:]
    return outputs_and_inputs + ([math.prod(filters)] if filters else [])


def _name_of(mode: str, name: str) -> str:
    return f"meta_curvature/{mode}/{name}"
