"""What the algorithms share that compare queries with the support set in a learned feature space: no inner steps.

A subclass is one paper: it says how similar each query is to each class (`_similarities`). The features are the
model's (`TaskModel.features`); its linear head is never used, so it is no meta-parameter. Outputs have a column for
each class of the episode, however many it has.

Normalization. Support and query must be normalized alike, or distances between them mean little:

- transductive: one pass over support and query set together, whose batch statistics are of both. This is what the code
  of Prototypical Networks does in training.
- inductive, running: averages of those statistics over meta-training, for support and query set (that code's test
  mode; the default here).
- inductive, support: the support set's own statistics for both, which the few images of a 1-shot episode make noisy.
  Meta-training may use them too (normalization: inductive).

Shapes: T tasks · S support · Q query · W classes of the episode · F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.algorithms.episodic import (
    Episodic,
    EpisodicConfig,
    Query,
    QueryLoss,
    Support,
    needs_body,
    needs_features,
    network,
    one_hot,
    only_classification,
    per_task,
    statistics_for,
)
from pipeline.algorithms.gradient_based import FEATURES
from pipeline.types import (
    Adapted,
    MetaState,
    Normalization,
    Objective,
    Params,
    Statistics,
    TaskBatch,
    TaskModel,
)

# what an adapted learner keeps of its support set: inputs [T, S, ...], whether example s is of class w [T, S, W], and
# (FEATURES) features [T, S, F] under the statistics for inductive prediction
INPUTS, MEMBERS = "support/inputs", "support/members"


class MetricConfig(EpisodicConfig):
    """Keys of every algorithm that compares features."""

    inductive_statistics: Literal["support", "running"] = "running"
    # what inductive prediction normalizes support and query set by: averages over meta-training, or the support set's
    # own (the default with normalization: inductive)
    scale: float | None = Field(default=None, gt=0)  # similarities are multiplied by (1/temperature); None: as below
    learn_scale: bool = False  # from there, as a meta-parameter

    @model_validator(mode="before")
    @classmethod
    def _as_in_training(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("normalization") == "inductive":
            return {"inductive_statistics": "support", **content}
        return content


class MetricBased(Episodic):
    """Algorithm: query features are compared with support features. `_similarities` is a subclass's."""

    config: MetricConfig
    any_way = True

    def __init__(self, config: Any, *, model: TaskModel, objective: Objective, scale: float) -> None:
        """scale: what similarities are multiplied by where the configuration leaves it open.

        Raises ConfigError: the task is no classification, or the model has no features or nothing before its head.
        """
        super().__init__(config, model=model, objective=objective)
        only_classification(config.name, objective)
        needs_features(config.name, model)
        needs_body(config.name, model)
        self._initial_scale = config.scale or scale
        self._name = config.name
        self._log_scale = f"{config.name}/log_scale"  # the learned one's name

    def init(self, seed: int) -> MetaState:
        params = without_head(self.model, seed)
        if self.config.learn_scale:
            like = next(iter(params.values()))
            params[self._log_scale] = torch.tensor(math.log(self._initial_scale), dtype=like.dtype)
        return MetaState(params, {})

    def describe(self, state: MetaState) -> dict[str, float]:
        if not self.config.learn_scale:
            return {}
        return {f"{self._name}/scale": float(state.params[self._log_scale].detach().exp())}

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        """There are no steps: the same learner, steps + 1 times."""
        with torch.no_grad():
            params = per_task({k: v.detach() for k, v in state.params.items()}, len(support_x))
            adapted = self._kept(params, state.buffers, support_x, support_y, num_classes, inductive=inductive)
        for _ in range(1 if last_only else steps + 1):
            yield adapted

    def _kept(
        self,
        params: Params,
        buffers: Statistics,
        support_x: Tensor,
        support_y: Tensor,
        num_classes: int | None,
        *,
        inductive: bool,
    ) -> Adapted:
        kept = {**params, INPUTS: support_x, MEMBERS: self._members(support_y, num_classes)}
        if not inductive:
            return Adapted(kept, None)
        x = self.model.prepare(support_x)
        if self._running and buffers:
            statistics = per_task(buffers, len(support_x))
            kept[FEATURES] = self.model.features(network(params), x, statistics=statistics)[0]
        else:
            kept[FEATURES], statistics = self.model.features(network(params), x, observe=True)
        return Adapted(kept, statistics)

    def predict(self, adapted: Adapted, query_x: Tensor, normalization: Normalization) -> Tensor:
        params = adapted.params
        if normalization == "inductive":
            x = self.model.prepare(query_x)
            query = self.model.features(network(params), x, statistics=statistics_for(adapted))[0]
            return self._outputs(params, params[FEATURES], params[MEMBERS], query)
        support, query, _ = self._together(params, params[INPUTS], query_x)
        return self._outputs(params, support, params[MEMBERS], query)

    def _sets(self, batch: TaskBatch) -> tuple[Support, Query]:
        """As they are: both may go through the network together."""
        return (
            Support(
                batch.support_x, batch.support_y, batch.num_classes, len(batch.support_x), batch.support_x, batch.keys
            ),
            Query(batch.query_x, batch.query_y),
        )

    def _query_loss(
        self,
        meta_params: Params,
        buffers: Statistics,
        support: Support,
        query: Query,
        keys: list[Tensor | None],
        *,
        step: int,
    ) -> QueryLoss:
        params = per_task(meta_params, support.tasks)
        observed: Statistics = {}
        if self._inductive:
            support_x, query_x = self.model.prepare(support.x), self.model.prepare(query.x)
            supports, statistics = self.model.features(network(params), support_x, observe=True, keys=keys[0])
            queries, _ = self.model.features(
                network(params), query_x, statistics=statistics, low_precision=True, keys=keys[1]
            )
        else:
            supports, queries, observed = self._together(
                params, support.x, query.x, observe=self._running, low_precision=True, keys=keys[0]
            )
        outputs = self._outputs(params, supports, self._members(support.y, support.num_classes), queries)
        return QueryLoss(self.objective.loss(outputs, query.y), outputs, observed, {})

    def _together(
        self, params: Params, support_x: Tensor, query_x: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Features of support and query set from one pass over both, and observed statistics. how: as `features`."""
        x = self.model.prepare(torch.cat([support_x, query_x], dim=1))
        features, observed = self.model.features(network(params), x, **how)
        shots = support_x.shape[1]
        return features[:, :shots], features[:, shots:], observed

    def _outputs(self, params: Params, support: Tensor, members: Tensor, query: Tensor) -> Tensor:
        """Features [T, S, F] and [T, Q, F], members [T, S, W] -> logits [T, Q, W]."""
        scale: Tensor | float = self._initial_scale
        if self._log_scale in params:
            scale = params[self._log_scale].exp().view(-1, 1, 1)
        return self._similarities(support, members, query, scale)

    def _similarities(self, support: Tensor, members: Tensor, query: Tensor, scale: Tensor | float) -> Tensor:
        """Support features [T, S, F] of classes by `members` [T, S, W], query features [T, Q, F] -> logits [T, Q, W].

        scale: a number, or [T, 1, 1].
        """
        raise NotImplementedError

    def _members(self, support_y: Tensor, num_classes: int | None) -> Tensor:
        """Labels [T, S] -> bool [T, S, W]: whether example s is of class w."""
        return one_hot(support_y, self._num_outputs if num_classes is None else num_classes, torch.bool)


def class_means(features: Tensor, members: Tensor) -> Tensor:
    """Features [T, S, F] of classes by `members` [T, S, W] -> prototypes [T, W, F].

    Classes may have different numbers of examples, of which none has zero.
    """
    weights = members.to(features.dtype)
    return torch.bmm(weights.transpose(1, 2), features) / weights.sum(1).unsqueeze(-1)


def without_head(model: TaskModel, seed: int) -> Params:
    """A model's fresh parameters but those of its head."""
    return {k: v for k, v in model.init(seed).items() if k not in model.head}
