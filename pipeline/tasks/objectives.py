"""The losses and scores of task families: classification and regression. Shapes: T tasks · N examples · D outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pipeline.types import Objective


class Classification:
    """Labels by their position in the episode; outputs are logits."""

    name = "classification"
    score_name = "accuracy"
    higher_is_better = True

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per example in nats: logits [T, N, D], labels [T, N] -> [T, N]."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy per task in nats: logits [T, N, D], labels [T, N] -> [T]."""
        return self.losses(outputs, targets).mean(1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Accuracy per task in 0…1: logits [T, N, D], labels [T, N] -> [T]. NaN is no right answer."""
        right = (outputs.argmax(dim=-1) == targets) & ~outputs.isnan().any(dim=-1)
        return right.to(outputs.dtype).mean(dim=1)

    def answers(self, outputs: Tensor) -> Tensor:
        """Class probabilities: logits [..., D] -> [..., D]."""
        return outputs.softmax(dim=-1)


class Regression:
    """Targets [T, N, D]; outputs are their predictions."""

    name = "regression"
    score_name = "mse"
    higher_is_better = False

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error per example, its mean over dimensions: [T, N, D], [T, N, D] -> [T, N]."""
        return (outputs - targets).square().mean(dim=2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error per task: [T, N, D], [T, N, D] -> [T]."""
        return (outputs - targets).square().mean(dim=(1, 2))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same mean squared error per task."""
        return self.loss(outputs, targets)

    def answers(self, outputs: Tensor) -> Tensor:
        """The predictions themselves."""
        return outputs


OBJECTIVES: dict[str, Objective] = {o.name: o for o in (Classification(), Regression())}
