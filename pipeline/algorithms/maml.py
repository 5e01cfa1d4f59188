"""MAML and first-order MAML: learn an initialization from which a few gradient steps solve a new task.

Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks".
Inner step (eq. 1): θ' = θ − α ∇_θ L_support(θ). Outer objective (eq. 2): Σ_tasks L_query(θ'), differentiated
through the inner steps; the first-order variant takes the inner gradients as constants.

Disadvantages: second order keeps the graph of every inner step (memory grows with the steps, or time with
`recompute_inner_steps`); a fixed inner rate is delicate; transductive batch statistics, which the paper uses, let
queries inform each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.algorithms import inner_steps
from pipeline.config import Section
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


class MAMLConfig(Section):
    """Model-agnostic meta-learning."""

    name: Literal["maml"]
    inner_lr: float = Field(gt=0)  # α, step size of the support-loss gradient
    adaptation_steps: int = Field(default=1, ge=1)  # inner steps in meta-training
    eval_adaptation_steps: int | None = Field(default=None, ge=1)  # in evaluation and serving; None: as in training
    first_order: bool = False
    recompute_inner_steps: bool = False  # exact, and memory does not grow with the steps, for up to 1.4 times the time
    normalization: Normalization = "transductive"  # of the query set in meta-training
    inductive_statistics: Literal["support", "running"] = "support"
    # what inductive prediction normalizes by: the adapted network's statistics on the support set, or running
    # averages over meta-training
    running_momentum: float = Field(default=0.99, gt=0, lt=1)  # weight of the old running statistics at each step

    @model_validator(mode="after")
    def _running_statistics_need_batch_statistics(self) -> MAMLConfig:
        if self.normalization == "inductive" and self.inductive_statistics == "running":
            raise ValueError(
                "inductive_statistics: running collects batch statistics of query sets, so it needs "
                "normalization: transductive in training"
            )
        return self

    def build(self, *, model: TaskModel, objective: Objective) -> MAML:
        return MAML(self, model=model, objective=objective)


class MAML:
    """Algorithm: see `pipeline.types.Algorithm`."""

    def __init__(self, config: MAMLConfig, *, model: TaskModel, objective: Objective) -> None:
        self.config = config
        self.model = model
        self.objective = objective
        self.train_steps = config.adaptation_steps
        self.eval_steps = config.eval_adaptation_steps or config.adaptation_steps
        self._running = config.inductive_statistics == "running"

    def init(self, seed: int) -> MetaState:
        return MetaState(self.model.init(seed), {})

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
    ) -> Iterator[Adapted]:
        params = _per_task({k: v.detach() for k, v in state.params.items()}, len(support_x))
        support = self.model.prepare(support_x)
        for step in range(steps + 1):
            if step:
                with torch.enable_grad():
                    params = {k: v.detach().requires_grad_() for k, v in params.items()}
                    params = self._inner_step(params, support, support_y, num_classes, create_graph=False)
            with torch.no_grad():
                yield self._adapted(params, state.buffers, support, len(support_x), inductive)

    def predict(self, adapted: Adapted, query_x: Tensor, normalization: Normalization) -> Tensor:
        statistics = adapted.statistics if normalization == "inductive" else None
        return self.model.apply(adapted.params, query_x, statistics=statistics)[0]

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        config = self.config
        meta_params = {k: v.detach().requires_grad_() for k, v in state.params.items()}
        tasks = len(batch.support_x)
        support, query = self.model.prepare(batch.support_x), self.model.prepare(batch.query_x)
        with torch.enable_grad():
            keys = batch.keys if self.model.stochastic else None
            *of_steps, on_support, on_query = pass_keys(keys, config.adaptation_steps + 2)
            params = inner_steps.unroll(
                lambda params, _, step, *, create_graph: self._inner_step(
                    params, support, batch.support_y, None, create_graph=create_graph, keys=of_steps[step]
                ),
                _per_task(meta_params, tasks),
                config.adaptation_steps,
                first_order=config.first_order,
                recompute=config.recompute_inner_steps,
            )
            inductive = config.normalization == "inductive"
            adapted = self._adapted(params, state.buffers, support, tasks, inductive, keys=on_support)
            outputs, observed = self.model.apply(
                adapted.params,
                query,
                statistics=adapted.statistics,
                observe=self._running,
                low_precision=True,
                keys=on_query,
            )
            losses = self.objective.loss(outputs, batch.query_y)  # [T]
            grads = torch.autograd.grad(losses.sum(), list(meta_params.values()))
        metrics = {
            "meta_loss": losses.detach().sum(),
            f"train_{self.objective.score_name}": self.objective.score(outputs.detach(), batch.query_y).sum(),
        }
        statistics = {k: v.detach().sum(dim=0) for k, v in observed.items()}
        return MetaGradient(dict(zip(meta_params, grads, strict=True)), metrics, statistics)

    def update_buffers(self, buffers: Statistics, observed: Statistics) -> Statistics:
        """Exponential averages; the first observation starts them."""
        keep = self.config.running_momentum
        return {k: keep * buffers[k] + (1 - keep) * v if k in buffers else v for k, v in observed.items()}

    def _inner_step(
        self,
        params: Params,
        support: Any,
        support_y: Tensor,
        num_classes: int | None,
        *,
        create_graph: bool,
        keys: Tensor | None = None,
    ) -> Params:
        """θ' = θ − α ∇L_support(θ) for every task at once (tasks are independent: the sum's gradient is each one's)."""
        outputs, _ = self.model.apply(params, support, keys=keys)
        losses = self.objective.loss(outputs[..., :num_classes], support_y)
        grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=create_graph)
        return {k: v.add(g, alpha=-self.config.inner_lr) for (k, v), g in zip(params.items(), grads, strict=True)}

    def _adapted(
        self,
        params: Params,
        buffers: Statistics,
        support: Any,
        tasks: int,
        inductive: bool,
        keys: Tensor | None = None,
    ) -> Adapted:
        if not inductive:
            return Adapted(params, None)
        if self._running and buffers:
            return Adapted(params, _per_task(buffers, tasks))
        return Adapted(params, self.model.apply(params, support, observe=True, keys=keys)[1])


def _per_task(params: Params, tasks: int) -> Params:
    """[...] -> [tasks, ...] per leaf, without copying; its backward sums over tasks."""
    return {k: v.expand(tasks, *v.shape) for k, v in params.items()}
