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
there is one sequence of orders for all tasks, a function of the size of the support set alone.

Adam with β1 = 0, which the paper found best, is `inner_optimizer: adam`. A task whose Adam begins anew changes every
parameter by the whole rate in its first step, however small the gradient. The authors' code keeps one state through all
of training, task after task, and at test goes on from it: `inner_state: carried`. Tasks of one meta-batch begin with
the same state, and the next ones with the mean of what these end with.

Inductive prediction here normalizes by the statistics of the support set, the authors' code by those of the support set
and the one query. Transductive is the same.

Disadvantages: a meta-gradient is small and noisy next to MAML's, so it takes many outer steps and the decay of the
rate; nothing tells it that the query set is what matters; parameters that do not adapt (`freeze`) are not learned at
all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import keys as random_numbers
from pipeline.algorithms.episodic import Query, QueryLoss, Support, network
from pipeline.algorithms.gradient_based import FEATURES, GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.types import Adapted, MetaState, Objective, Params, Statistics, TaskBatch, TaskModel

CARRIED = "reptile/"  # begins the buffers' names of the inner optimizer's state


class ReptileConfig(InnerLoopConfig):
    """Reptile, serial (meta_batch_size: 1) or batched."""

    name: Literal["reptile"]
    inner_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.999)  # adam
    inner_batch_size: int | None = Field(default=None, ge=1)
    # examples of an inner step; None, or more than there are: all of them
    eval_inner_batch_size: int | None = Field(default=None, ge=1)  # in evaluation and serving; None: as in training
    train_on: Literal["support", "all"] = "support"  # of a task in meta-training; all: its query set too
    inner_state: Literal["fresh", "carried"] = "fresh"
    # of Adam or momentum at a task's start; carried: from those before

    differentiates_steps: ClassVar[bool] = False

    @model_validator(mode="after")
    def _there_is_a_state_to_carry(self) -> Self:
        if self.inner_state == "carried" and self.inner_optimizer == "sgd" and not self.inner_momentum:
            raise ValueError("inner_state: carried is for inner_optimizer: adam, or sgd with inner_momentum")
        return self

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

    def init(self, seed: int) -> MetaState:
        """Buffers are there from the start, so that a compiled program knows of them."""
        state = super().init(seed)
        if not self._carries:
            return state
        begun = self.optimizer.start({k: state.params[k].unsqueeze(0) for k in self.adapted_names})
        return state._replace(buffers={CARRIED + k: v.squeeze(0) for k, v in begun.items()})

    @property
    def _carries(self) -> bool:
        return self.config.inner_state == "carried"

    def _carried_on(self, buffers: Statistics) -> Params:
        """What tasks begin with besides the meta-parameters."""
        return _carried(buffers) if self._carries else {}

    def adaptation_path(self, state: MetaState, support_x: Tensor, support_y: Tensor, **how: Any) -> Iterator[Adapted]:
        state = state._replace(params={**state.params, **self._carried_on(state.buffers)})
        return super().adaptation_path(state, support_x, support_y, **how)

    def _start(self, meta_params: Params, support: Support, keys: Tensor | None) -> tuple[Params, Params]:
        inner, learned = super()._start(meta_params, support, keys)
        begun = {k.removeprefix(CARRIED): learned.pop(k) for k in _carried(learned)}
        return inner | begun, learned

    def _query_loss(self, meta_params: Params, buffers: Statistics, *sets: Any, **how: Any) -> QueryLoss:
        answer = super()._query_loss(meta_params, buffers, *sets, **how)
        assert answer.adapted is not None
        return answer._replace(observed=answer.observed | _carried(answer.adapted))

    def update_buffers(self, buffers: Statistics, observed: Statistics) -> Statistics:
        """The inner optimizer's state is the last tasks', not an average over all."""
        return super().update_buffers(buffers, network(observed)) | _carried(observed)

    def _adapt(
        self, meta_params: Params, buffers: Statistics, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Adapted, dict[str, Tensor]]:
        *of_steps, on_support = keys
        with torch.no_grad():
            start = {k: v.detach() for k, v in meta_params.items()} | self._carried_on(buffers)
            inner, learned = self._start(start, support, of_steps[0])
        for number, of_step in enumerate(of_steps):
            inner = self._step_without_graph(inner, learned, number, support, of_step)
        with torch.no_grad():
            params = self._params(inner, learned, self.train_steps)
            adapted = self._adapted(
                params, buffers, support, inductive=self._inductive, step=self.train_steps, keys=on_support
            )
        if self._carries:
            ends = {CARRIED + k: v for k, v in inner.items() if k not in self.adapted_names}
            adapted = adapted._replace(params=adapted.params | ends)
        return adapted, {}

    def _answer(self, params: Params, query: Any, **how: Any) -> tuple[Tensor, Statistics]:
        return super()._answer(network(params), query, **how)

    def _adapted(self, params: Params, buffers: Statistics, support: Support, **how: Any) -> Adapted:
        return super()._adapted(params, network(buffers), support, **how)

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


def _carried(values: Params) -> Params:
    """Those of the inner optimizer's state, under the buffers' names."""
    return {k: v for k, v in values.items() if k.startswith(CARRIED)}


def _no_keys(examples: Tensor) -> Tensor:
    """The same for every task, int64 [T]."""
    return torch.zeros(len(examples), dtype=torch.int64, device=examples.device)


def _examples(values: Tensor, which: Tensor) -> Tensor:
    """Values [T, N, ...] at positions [T, B] -> [T, B, ...]."""
    tasks = torch.arange(len(values), device=values.device).unsqueeze(1)
    return values[tasks, which]
