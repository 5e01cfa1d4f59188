"""Prototypical networks: a class is the mean of its support features, a query belongs to the nearest one.

Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning". Prototypes (eq. 1): c_w is the mean of the
features of class w's support examples. Classification (eq. 2): p(w | x) ∝ exp(−d(f(x), c_w)), d the squared Euclidean
distance. Expanded (eq. 8), −‖f − c‖² = 2 c·f − ‖c‖² − ‖f‖², of which the last is the same for every class: a linear
layer of weight 2c and bias −‖c‖², which is what is computed here. distance: cosine compares directions instead.

Training with more classes in an episode than test has (task.n_way: 60, task.eval_n_way: 5) is what the paper does on
Omniglot: a harder task for the features. The shots are the same in both.

Disadvantages: nothing in the network changes for a task, so more support examples only make the means less noisy; a
class of several looks has its mean between them; memory grows with the classes of an episode, as all their images go
through the network at once.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.gradient_based import linear
from pipeline.algorithms.metric_based import MetricBased, MetricConfig, class_means
from pipeline.types import Objective, TaskModel

SCALE = {"euclidean": 1.0, "cosine": 10.0}  # cosines are at most 1 apart from 0: without a scale, no class is certain


class ProtoNetConfig(MetricConfig):
    """Distances to the classes' means. `scale` is 1 for euclidean (as in the paper) and 10 for cosine by default."""

    name: Literal["protonet"]
    distance: Literal["euclidean", "cosine"] = "euclidean"  # squared, as in the paper

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> ProtoNet:
        return ProtoNet(self, model=model, objective=objective, scale=SCALE[self.distance])


class ProtoNet(MetricBased):
    """Algorithm: distances between queries and class means."""

    config: ProtoNetConfig

    def _similarities(self, support: Tensor, members: Tensor, query: Tensor, scale: Tensor | float) -> Tensor:
        prototypes = class_means(support, members)
        if self.config.distance == "euclidean":
            return scale * linear(query, *nearest_prototype(prototypes))
        return scale * torch.bmm(F.normalize(query, dim=-1), F.normalize(prototypes, dim=-1).transpose(1, 2))


def nearest_prototype(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Prototypes [T, W, F] -> the linear layer that classifies by squared Euclidean distance: [T, W, F], [T, W]."""
    return 2 * prototypes, -prototypes.square().sum(dim=-1)
