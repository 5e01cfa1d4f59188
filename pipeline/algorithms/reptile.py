"""Reptile: move the initialization towards where plain training on each task ends.

Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms". Train on a task τ for k steps from θ, which
gives φ_τ = U^k_τ(θ), then θ ← θ + ε (φ_τ − θ): algorithm 1, one task at a time, is `meta_batch_size: 1`; algorithm 2,
θ ← θ + ε · mean_τ (φ_τ − θ), is any larger one, which is also what several workers compute together. The papers' update
is the outer optimizer `sgd` with rate ε, and `schedule: linear` with `final_lr_fraction: 0` takes ε to zero as theirs.
Here θ − φ_τ is the meta-gradient (section 3), a gradient like any other, so every outer optimizer works.

With k = 1 and the whole set in a step this is the gradient of the mean loss over tasks, that is plain joint training.
The part that learns to adapt comes from the steps' different minibatches: in expectation it moves θ to where the
gradients of two minibatches of a task agree (section 5.1). So k > 1, and `inner_batch_size` below the size of the set.

A task is trained on its support set, or on support and query set (`train_on: all`), as there is no query loss to learn
by: the paper has one set of more shots in training (10 to 15 a class) than at test (`task.k_shot`, `task.eval_k_shot`).
The set is gone through in a random order, and then in another. In training orders follow from the episode; at test
there is one sequence of orders for all tasks, a function of the size of the support set alone. Adam with β1 = 0, which
the paper found best, is `inner_optimizer: adam`. Its state is each task's own here; the authors' code keeps one
through all of training.

Inductive prediction here normalizes by the statistics of the support set, the authors' code by those of the support set
and the one query. Transductive is the same.

Disadvantages: a meta-gradient is small and noisy next to MAML's, so it takes many outer steps and the decay of the
rate; nothing tells it that the query set is what matters; parameters that do not adapt (`freeze`) are not learned at
all. No graph is kept beyond a step, so `first_order` and `recompute_inner_steps` change nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import keys as random_numbers
from pipeline.algorithms.episodic import Query, QueryLoss, Support
from pipeline.algorithms.gradient_based import FEATURES, GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.types import Adapted, Objective, Params, Statistics, TaskBatch, TaskModel


class ReptileConfig(InnerLoopConfig):
    """Reptile, serial (meta_batch_size: 1) or batched."""

    name: Literal["reptile"]
    inner_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.999)  # adam
    inner_batch_size: int | None = Field(default=None, ge=1)
    # examples of an inner step; None, or more than there are: all of them
    eval_inner_batch_size: int | None = Field(default=None, ge=1)  # in evaluation and serving; None: as in training
    train_on: Literal["support", "all"] = "support"  # of a task in meta-training; all: its query set too

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> Reptile:
        return Reptile(self, model=model, objective=objective)


class Reptile(GradientBased):
    """Algorithm: inner steps on minibatches, and θ − φ as the meta-gradient."""

    config: ReptileConfig

    def _sets(self, batch: TaskBatch) -> tuple[Support, Query]:
        if batch.keys is None:
            batch = batch._replace(keys=_no_keys(batch.support_x))
        support, query = super()._sets(batch)
        if self.config.train_on == "support":
            return support, query
        x, y = torch.cat([batch.support_x, batch.query_x], dim=1), torch.cat([batch.support_y, batch.query_y], dim=1)
        return self._support(x, y, batch.num_classes, batch.keys), query

    def _adapt(
        self, meta_params: Params, buffers: Statistics, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Adapted, dict[str, Tensor]]:
        *of_steps, on_support = keys
        with torch.no_grad():
            inner, learned = self._start({k: v.detach() for k, v in meta_params.items()}, support, of_steps[0])
        for number, of_step in enumerate(of_steps):
            inner = self._step_without_graph(inner, learned, number, support, of_step)
        with torch.no_grad():
            params = self._params(inner, learned, self.train_steps)
            return self._adapted(
                params, buffers, support, inductive=self._inductive, step=self.train_steps, keys=on_support
            ), {}

    def _meta_gradients(self, answer: QueryLoss, meta_params: Params) -> Params:
        assert answer.adapted is not None
        return {k: (v.detach() - answer.adapted[k]).sum(dim=0) for k, v in meta_params.items()}

    def _inner_step(
        self,
        inner: Params,
        learned: Params,
        number: int,
        support: Support,
        *,
        create_graph: bool,
        keys: Tensor | None,
    ) -> Params:
        which = self._minibatch(support, number)
        if which is not None:
            x, y = _examples(support.examples, which), _examples(support.y, which)
            support = self._support(x, y, support.num_classes, support.keys)
            if FEATURES in learned:
                learned = {**learned, FEATURES: _examples(learned[FEATURES], which)}
        return super()._inner_step(inner, learned, number, support, create_graph=create_graph, keys=keys)

    def _minibatch(self, support: Support, number: int) -> Tensor | None:
        """The examples [T, B] of step `number`; None: all of them."""
        there = support.examples.shape[1]
        size, keys = self.config.inner_batch_size, support.keys
        if keys is None:
            size, keys = self.config.eval_inner_batch_size or size, _no_keys(support.examples)
        if size is None or size >= there:
            return None
        first, last = number * size, (number + 1) * size - 1  # of the orders one after another
        orders = [random_numbers.order(keys, there, again) for again in range(first // there, last // there + 1)]
        start = first % there
        return torch.cat(orders, dim=1)[:, start : start + size]


def _no_keys(examples: Tensor) -> Tensor:
    """The same for every task, int64 [T]."""
    return torch.zeros(len(examples), dtype=torch.int64, device=examples.device)


def _examples(values: Tensor, which: Tensor) -> Tensor:
    """Values [T, N, ...] at positions [T, B] -> [T, B, ...]."""
    tasks = torch.arange(len(values), device=values.device).unsqueeze(1)
    return values[tasks, which]
