"""MAML and first-order MAML: learn an initialization from which a few gradient steps solve a new task.

Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks".
Inner step (eq. 1): θ' = θ − α ∇_θ L_support(θ). Outer objective (eq. 2): Σ_tasks L_query(θ'), differentiated
through the inner steps; the first-order variant takes the inner gradients as constants.

Disadvantages: second order keeps the graph of every inner step (memory grows with the steps, or time with
`recompute_inner_steps`); a fixed inner rate is delicate; transductive batch statistics, which the paper uses, let
queries inform each other.
"""

from __future__ import annotations

from typing import Literal

from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.types import Objective, TaskModel


class MAMLConfig(InnerLoopConfig):
    """Model-agnostic meta-learning."""

    name: Literal["maml"]

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> MAML:
        return MAML(self, model=model, objective=objective)


class MAML(GradientBased):
    """Algorithm: the inner loop as it is, and the derivative through all of it."""
