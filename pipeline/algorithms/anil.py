"""ANIL and BOIL: only the head of the network adapts, or only its body.

ANIL: Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML". The inner step (eq. 1) changes the last layer alone, θ_l' = θ_l − α ∇_{θ_l} L_support; all layers are
meta-learned. The body's features of the support set are the same at every step, so they are computed once.

BOIL: Oh, Yoo, Kim, Yun 2021, "BOIL: Towards Representation Change for Few-shot Learning". The opposite (eq. 3): the
head's inner rate is zero, the body adapts.

Disadvantages: ANIL cannot change its features for a task unlike those it was trained on; BOIL costs as much as MAML,
and its head, which no task changes, ties every output to its position.
"""

from __future__ import annotations

from typing import Literal

from pipeline.algorithms.episodic import needs_features
from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.types import Objective, TaskModel


class ANILConfig(InnerLoopConfig):
    """Almost no inner loop: the head adapts, the body is reused."""

    name: Literal["anil"]

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> ANIL:
        """Raises ConfigError: the model has no head."""
        needs_features(self.name, model)
        return ANIL(self, model=model, objective=objective)


class BOILConfig(InnerLoopConfig):
    """Body only in the inner loop: the head is the same for every task."""

    name: Literal["boil"]

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> BOIL:
        """Raises ConfigError: the model has no head."""
        needs_features(self.name, model)
        return BOIL(self, model=model, objective=objective)


class ANIL(GradientBased):
    """Algorithm: MAML whose inner steps change the head."""

    def _left_alone(self, names: list[str]) -> list[str]:
        return [*self.config.freeze, *(name for name in names if name not in self.model.head)]


class BOIL(GradientBased):
    """Algorithm: MAML whose inner steps change all but the head."""

    def _left_alone(self, names: list[str]) -> list[str]:
        return [*self.config.freeze, *self.model.head]
