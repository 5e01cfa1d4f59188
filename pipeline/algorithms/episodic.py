"""What the algorithms share that learn by the query loss of episodes: the meta-gradient, normalization, prediction.

Such an algorithm says how a learner is adapted to a support set (`_adapt`, with a graph back to the meta-parameters),
and how an adapted one answers (`_answer`). Its meta-gradient is the derivative of the query loss of that answer.

Meta-parameters are the model's, by the model's names, and what an algorithm learns besides (rates, curvatures, an
embedding of its own), by names that begin with "ALGORITHM/".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.keys import pass_keys
from pipeline.types import (
    Adapted,
    MetaGradient,
    MetaState,
    Normalization,
    Objective,
    Params,
    Statistics,
    TaskBatch,
    TaskModel,
)


class EpisodicConfig(Section):
    """Keys of every algorithm that learns from episodes."""

    normalization: Normalization = "transductive"  # of the query set in meta-training
    inductive_statistics: Literal["support", "running"] = "support"
    # what inductive prediction normalizes by: the adapted network's statistics on the support set, or running
    # averages over meta-training
    running_momentum: float = Field(default=0.99, gt=0, lt=1)  # weight of the old running statistics at each step

    @model_validator(mode="after")
    def _running_statistics_need_batch_statistics(self) -> Self:
        if self.normalization == "inductive" and self.inductive_statistics == "running":
            raise ValueError(
                "inductive_statistics: running collects batch statistics of query sets, so it needs "
                "normalization: transductive in training"
            )
        return self


class Support(NamedTuple):
    """The support sets of T tasks."""

    x: Any  # what the model's `prepare` made of [T, S, ...]
    y: Tensor  # [T, S] or [T, S, D]
    num_classes: int | None  # in the episode; None: as many as the model has outputs
    tasks: int  # T
    examples: Tensor  # [T, S, ...] as they came
    keys: Tensor | None  # int64 [T], of the episodes in meta-training; None in evaluation and serving


class Query(NamedTuple):
    """The query sets of T tasks."""

    x: Any  # what the model's `prepare` made of [T, Q, ...]
    y: Tensor  # [T, Q] or [T, Q, D]


class QueryLoss(NamedTuple):
    """What meta-training minimizes, and what came up on the way."""

    losses: Tensor  # [T], of which the meta-gradient is the sum's derivative
    outputs: Tensor  # [T, Q, num_outputs] of the adapted learner, for the score
    observed: Statistics  # [T, ...] each, for the running buffers; empty where none are kept
    metrics: dict[str, Tensor]  # scalars, summed over tasks
    adapted: Params | None = None  # [T, ...] each, the learner whose loss this is; None: there is no one such


class Episodic:
    """Algorithm: see `pipeline.types.Algorithm`. `_adapt`, `adaptation_path` and mostly `_answer` are a subclass's."""

    any_way = False
    train_steps = 0
    eval_steps = 0

    def __init__(
        self, config: Any, *, model: TaskModel, objective: Objective, train_classes: int | None = None
    ) -> None:
        self.config = config
        self.model = model
        self.objective = objective
        self._running = config.inductive_statistics == "running"
        self._watched: int | None = None  # classes of meta-training whose losses are wanted

    def init(self, seed: int) -> MetaState:
        return MetaState(self.model.init(seed), {})

    def describe(self, state: MetaState) -> dict[str, float]:
        """What was learned besides the network's parameters, by name, for the metrics of a validation."""
        return {}

    def curves(self, state: MetaState, batch: TaskBatch) -> dict[str, Tensor]:
        """What an evaluation of episodes shows besides their scores, by name: one value over 1, 2, … [T, points]."""
        return {}

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
        raise NotImplementedError

    def predict(self, adapted: Adapted, query_x: Tensor, normalization: Normalization) -> Tensor:
        statistics = statistics_for(adapted) if normalization == "inductive" else None
        return self._answer(adapted.params, query_x, statistics=statistics)[0]

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        meta_params = {k: v.detach().requires_grad_() for k, v in state.params.items()}
        support, query = self._sets(batch)
        passes = self._support_passes() + self._query_passes()
        with torch.enable_grad():
            keys = pass_keys(batch.keys if self.model.stochastic else None, passes)
            answer = self._query_loss(meta_params, state.buffers, support, query, keys, step=step)
            grads = self._meta_gradients(answer, meta_params)
        metrics = {
            "meta_loss": answer.losses.detach().sum(),
            f"train_{self.objective.score_name}": self.objective.score(answer.outputs.detach(), batch.query_y).sum(),
            **answer.metrics,
        }
        statistics = {k: v.detach().sum(dim=0) for k, v in answer.observed.items()}
        classes = self._class_losses(answer.outputs.detach(), batch)
        return MetaGradient(grads, metrics, statistics, classes)

    @property
    def tells_class_losses(self) -> bool:
        """Whether `watch_classes` has an effect: a `meta_grad` of a subclass's own knows nothing of it."""
        return type(self).meta_grad is Episodic.meta_grad

    def watch_classes(self, number: int) -> None:
        """From now on `meta_grad` also tells the query losses of each of the `number` classes of meta-training."""
        self._watched = number

    def _class_losses(self, outputs: Tensor, batch: TaskBatch) -> Statistics:
        """`MetaGradient.classes` of answers [T, Q, n_way] to the queries. Empty where nobody asked for them."""
        if self._watched is None or batch.classes is None:
            return {}
        of_label = one_hot(batch.query_y, batch.classes.shape[1], outputs.dtype)  # [T, Q, n_way]
        losses = self.objective.losses(outputs, batch.query_y).unsqueeze(-1)  # [T, Q, 1]
        means = (losses * of_label).sum(dim=1) / of_label.sum(dim=1)  # [T, n_way]
        # no scatter: on a GPU it would add in another order each time
        of_class = one_hot(batch.classes.flatten(), self._watched, outputs.dtype)  # [T·n_way, classes]
        return {"loss": (means.view(-1, 1) * of_class).sum(dim=0), "count": of_class.sum(dim=0)}

    def update_buffers(self, buffers: Statistics, observed: Statistics) -> Statistics:
        """Exponential averages; the first observation starts them."""
        keep = self.config.running_momentum
        return {k: keep * buffers[k] + (1 - keep) * v if k in buffers else v for k, v in observed.items()}

    def _sets(self, batch: TaskBatch) -> tuple[Support, Query]:
        """The support and query sets as `_query_loss` gets them."""
        support = self._support(batch.support_x, batch.support_y, batch.num_classes, batch.keys)
        return support, Query(self.model.prepare(batch.query_x), batch.query_y)

    def _support(self, x: Tensor, y: Tensor, num_classes: int | None, keys: Tensor | None = None) -> Support:
        return Support(self.model.prepare(x), y, num_classes, len(x), x, keys)

    def _meta_gradients(self, answer: QueryLoss, meta_params: Params) -> Params:
        """Sums over tasks."""
        grads = torch.autograd.grad(answer.losses.sum(), list(meta_params.values()), allow_unused=True)
        return named_gradients(meta_params, grads)

    def _support_passes(self) -> int:
        """Passes over the support set in meta-training, each of which gets keys of its own."""
        return 1

    def _query_passes(self) -> int:
        """The same over the query set."""
        return 1

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
        """The adapted learner's loss on the query sets, differentiable with respect to `meta_params`.

        keys: for each pass over the support set, then for each over the query set.
        """
        *of_support, on_query = keys
        adapted, metrics = self._adapt(meta_params, buffers, support, of_support, step=step)
        outputs, observed = self._answer(
            adapted.params,
            query.x,
            statistics=adapted.statistics,
            observe=self._running,
            low_precision=True,
            keys=on_query,
        )
        outputs = of_classes(outputs, support.num_classes)
        return QueryLoss(self.objective.loss(outputs, query.y), outputs, observed, metrics, adapted.params)

    def _adapt(
        self, meta_params: Params, buffers: Statistics, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Adapted, dict[str, Tensor]]:
        """Adapted to the support sets, differentiable with respect to `meta_params`, and metrics summed over tasks.

        Its statistics are those the query pass of meta-training is normalized by: None where the configuration says
        transductive. keys: for each pass over the support set.
        """
        raise NotImplementedError

    def _answer(self, params: Params, query: Any, **how: Any) -> tuple[Tensor, Statistics]:
        """Adapted parameters [T, ...] and queries -> outputs [T, Q, num_outputs], observed statistics.

        how: as `TaskModel.apply`.
        """
        return self.model.apply(params, query, **how)

    @cached_property
    def _num_outputs(self) -> int:
        return len(self.model.init(0)[self.model.head[1]])

    @property
    def _inductive(self) -> bool:
        """Whether meta-training normalizes the query set by statistics that do not depend on it."""
        return self.config.normalization == "inductive"


def statistics_for(adapted: Adapted) -> Statistics:
    """Of inductive prediction. Raises ValueError: they were not asked for when the learner was adapted."""
    if adapted.statistics is None:
        raise ValueError("inductive prediction needs statistics: call adaptation_path with inductive=True")
    return adapted.statistics


def named_gradients(params: Params, grads: tuple[Tensor | None, ...]) -> Params:
    """By the names of `params`; zeros where the loss does not depend on one."""
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(params.items(), grads, strict=True)}


def network(params: Params) -> Params:
    """The network's own."""
    return {k: v for k, v in params.items() if "/" not in k}


def one_hot(numbers: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Integers [...] -> [..., classes], without looking at their values on the host."""
    return (numbers.unsqueeze(-1) == torch.arange(classes, device=numbers.device)).to(dtype)


def of_classes(outputs: Tensor, num_classes: int | None) -> Tensor:
    """Outputs [..., D] -> those of the episode's classes [..., num_classes]."""
    return outputs if num_classes is None or num_classes == outputs.shape[-1] else outputs[..., :num_classes]


def per_task(params: Params, tasks: int) -> Params:
    """[...] -> [tasks, ...] per leaf, without copying; its backward sums over tasks."""
    return {k: v.expand(tasks, *v.shape) for k, v in params.items()}


def only_classification(name: str, objective: Objective) -> None:
    """Raises ConfigError: the task is not a classification."""
    if objective.name != "classification":
        raise ConfigError(f"algorithm.name: {name} classifies, the task is a {objective.name}. Choose another of both.")


def needs_features(name: str, model: TaskModel) -> None:
    """Raises ConfigError: the model has no linear head, whose inputs are its features."""
    if not set(model.head) <= set(model.parameter_names):
        raise ConfigError(
            f"algorithm.name: {name} needs the features that a linear head gets, and the module has no nn.Linear with "
            "a bias. End model.factory's network in one, or choose another algorithm."
        )


def needs_body(name: str, model: TaskModel) -> None:
    """Raises ConfigError: the model is a head alone, which the algorithm does not learn."""
    if set(model.parameter_names) <= set(model.head):
        raise ConfigError(
            f"algorithm.name: {name} learns what lies before the head, and this model is a head alone. Give it layers "
            "(model.hidden), or choose another algorithm."
        )
