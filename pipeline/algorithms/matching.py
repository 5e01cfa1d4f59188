"""Matching networks, without full-context embeddings: a query's label is the labels it attends to in the support set.

Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, "Matching Networks for One Shot Learning". P(y | x, S) is
Σ_i a(x, x_i) y_i (eq. 1), with the attention a(x, x_i) a softmax over the support set of the cosine similarity of
features (section 2.1.1). Outputs are the logarithms of the class sums, up to a constant.

What is left out: full-context embeddings (section 2.1.2), LSTMs that make features depend on the whole support set.

The paper's softmax is over cosines as they are (scale: 1), which leaves even a perfect match uncertain; here they are
multiplied by 10 unless the configuration says otherwise.

Disadvantages: an answer costs a comparison with every support example; a class with more of them than others gets more
of the attention, whatever the query; nothing in the network changes for a task. With one shot and equal scales it is
ProtoNet with cosine distance.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.metric_based import MetricBased, MetricConfig
from pipeline.types import Objective, TaskModel

SCALE = 10.0


class MatchingConfig(MetricConfig):
    """Attention over the support set. `scale` is 10 by default; the paper's is 1."""

    name: Literal["matching"]

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> Matching:
        return Matching(self, model=model, objective=objective, scale=SCALE)


class Matching(MetricBased):
    """Algorithm: attention by cosine similarity, summed over each class's support examples."""

    def _similarities(self, support: Tensor, members: Tensor, query: Tensor, scale: Tensor | float) -> Tensor:
        cosines = torch.bmm(F.normalize(query, dim=-1), F.normalize(support, dim=-1).transpose(1, 2))  # [T, Q, S]
        of_class = members.unsqueeze(1)  # [T, 1, S, W]
        return (scale * cosines).unsqueeze(-1).masked_fill(~of_class, -torch.inf).logsumexp(dim=2)
