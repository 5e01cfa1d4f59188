"""What the algorithms share that adapt by gradient steps: the inner loop, its options, and the way through it.

A subclass is one paper: it changes where adaptation starts (`_start`), what a step uses (`_params`, `_rates`,
`_transform`) or does (`_update`), which parameters move (`freeze`), or how the meta-gradient is taken (`meta_grad`).

The state of the inner loop is a dict of named tensors, each with a leading task axis: the parameters that adapt, by
their own names, and the inner optimizer's. What steps use and do not change is another one, `learned`: parameters that
stay, rates. Everything a meta-gradient should reach is in one of them, so that any step can be recomputed.

Where only the head adapts, the body's features of the support set are computed once (ANIL's saving).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms import inner_steps
from pipeline.algorithms.episodic import Episodic, Support, network, of_classes, per_task
from pipeline.algorithms.inner_optimizer import InnerOptimizer, InnerStepsConfig, gradients, not_frozen
from pipeline.types import Adapted, MetaState, Objective, Params, Statistics, TaskModel

FEATURES = "support/features"  # [T, S, F], among what steps use


class GradientBased(Episodic):
    """Algorithm: gradient steps on the support loss, θ' = θ − α ∇L_support(θ), and the query loss through them."""

    config: InnerStepsConfig
    first_order_keeps_a_graph = False  # of a step's inside, beside the inner gradient's

    def __init__(
        self, config: InnerStepsConfig, *, model: TaskModel, objective: Objective, train_classes: int | None = None
    ) -> None:
        super().__init__(config, model=model, objective=objective)
        self.train_steps = config.adaptation_steps
        self.eval_steps = config.eval_adaptation_steps or config.adaptation_steps
        self.optimizer = InnerOptimizer(config)
        names = model.parameter_names
        self.adapted_names = not_frozen(names, self._left_alone(names))  # the parameters that inner steps change

    def _left_alone(self, names: list[str]) -> list[str]:
        """Patterns of the model's parameters that inner steps do not change."""
        return self.config.freeze

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
        meta_params = {k: v.detach() for k, v in state.params.items()}
        support = self._support(support_x, support_y, num_classes)
        statistics: Statistics | None = None
        with torch.no_grad():
            inner, learned = self._start(meta_params, support, None)
        for number in range(steps + 1):
            if number:
                inner = self._step_without_graph(inner, learned, number - 1, support)
            if last_only and number < steps:
                continue
            with torch.no_grad():
                params = self._params(inner, learned, number)
                wanted = inductive and statistics is None
                adapted = self._adapted(params, state.buffers, support, inductive=wanted, step=number)
                if inductive and self._features_stay():  # so do the body's statistics
                    statistics = adapted.statistics if statistics is None else statistics
                    adapted = Adapted(adapted.params, statistics)
            yield adapted

    def _step_without_graph(
        self, inner: Params, learned: Params, number: int, support: Support, keys: Tensor | None = None
    ) -> Params:
        """An inner step of which nothing is kept but where it leads; `learned` without a graph."""
        with torch.enable_grad():
            inner = {k: v.detach().requires_grad_() for k, v in inner.items()}
            inner = self._inner_step(inner, learned, number, support, create_graph=False, keys=keys)
        return {k: v.detach() for k, v in inner.items()}

    def _support_passes(self) -> int:
        return self.train_steps + 1

    def _adapt(
        self, meta_params: Params, buffers: Statistics, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Adapted, dict[str, Tensor]]:
        *of_steps, on_support = keys
        states, learned = self._states(meta_params, support, of_steps, step=step)
        inner = inner_steps.last(states)
        params = self._params(inner, learned, self.train_steps)
        adapted = self._adapted(
            params, buffers, support, inductive=self._inductive, step=self.train_steps, keys=on_support
        )
        return adapted, self._metrics(inner)

    def _states(
        self, meta_params: Params, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Iterator[Params], Params]:
        """The inner loop's states in meta-training after 0, 1, … steps, with their graph, and what steps use.

        keys: for each step.
        """
        inner, learned = self._start(meta_params, support, keys[0])
        states = inner_steps.path(
            lambda inner, learned, number, *, create_graph: self._inner_step(
                inner, learned, number, support, create_graph=create_graph, keys=keys[number]
            ),
            inner,
            self.train_steps,
            learned=learned,
            first_order=self._first_order(step),
            recompute=self.config.recompute_inner_steps,
            first_order_keeps_a_graph=self.first_order_keeps_a_graph,
        )
        return states, learned

    def _metrics(self, inner: Params) -> dict[str, Tensor]:
        """What the state after the last step tells, summed over tasks."""
        return {}

    def _first_order(self, step: int) -> bool:
        """Whether outer step `step` takes the inner gradients as constants."""
        return self.config.first_order

    def _start(self, meta_params: Params, support: Support, keys: Tensor | None) -> tuple[Params, Params]:
        """The inner loop's state before its first step, and what steps use and do not change."""
        params = self._initial(meta_params, support, keys)
        adapted = {k: params[k] for k in self.adapted_names}
        learned = {k: v for k, v in params.items() if k not in adapted}
        if self._features_stay() and FEATURES not in learned:
            params = self._params(adapted, learned, 0)
            learned[FEATURES] = self._support_features(params, learned, support.x, keys)
        return adapted | self._optimizer_state(adapted), learned

    def _optimizer_state(self, adapted: Params) -> Params:
        """What steps carry on beside the parameters, before the first one; its names hold a "/"."""
        return self.optimizer.start(adapted)

    def _initial(self, meta_params: Params, support: Support, keys: Tensor | None) -> Params:
        """What each task begins with, [T, ...] each: the network's parameters and what steps use besides."""
        return per_task(meta_params, support.tasks)

    def _features_stay(self) -> bool:
        """Whether the body's features of the support set are the same at every step."""
        return set(self.adapted_names) <= set(self.model.head)

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
        """One step of every task at once (tasks are independent: the sum's gradient is each one's)."""
        adapted = {k: inner[k] for k in self.adapted_names}
        losses = self._inner_losses(adapted, learned, number, support, keys)
        grads = gradients(losses.sum(), adapted, create_graph=create_graph)
        grads = self._transform(grads, learned, number)
        optimizer = {k: v for k, v in inner.items() if k not in adapted}
        losses = losses if create_graph else losses.detach()
        adapted, optimizer = self._update(adapted, optimizer, grads, losses, learned, number)
        return adapted | optimizer

    def _update(
        self, adapted: Params, optimizer: Params, grads: Params, losses: Tensor, learned: Params, number: int
    ) -> tuple[Params, Params]:
        """Step `number` itself: new parameters and a new optimizer's state, from gradients and support losses [T]."""
        return self.optimizer.update(adapted, optimizer, grads, self._rates(learned, number))

    def _inner_losses(
        self, adapted: Params, learned: Params, number: int, support: Support, keys: Tensor | None
    ) -> Tensor:
        """What step `number` reduces, [T]."""
        outputs = self._support_outputs(adapted, learned, number, support.x, keys)
        return self.objective.loss(of_classes(outputs, support.num_classes), support.y)

    def _support_outputs(
        self, adapted: Params, learned: Params, number: int, support: Any, keys: Tensor | None
    ) -> Tensor:
        params = self._params(adapted, learned, number)
        if FEATURES in learned:
            weight, bias = (params[name] for name in self.model.head)
            return linear(learned[FEATURES], weight, bias)
        return self.model.apply(params, support, keys=keys)[0]

    def _support_features(self, params: Params, learned: Params, support: Any, keys: Tensor | None) -> Tensor:
        """[T, S, F], by the batch statistics of the support set."""
        return self.model.features(params, support, keys=keys)[0]

    def _transform(self, grads: Params, learned: Params, number: int) -> Params:
        """Step `number`'s gradients as the inner optimizer gets them."""
        return grads

    def _rates(self, learned: Params, number: int) -> Params | None:
        """The rates of step `number` by parameter, [T] or of its shape; None: the configuration's α for all."""
        return None

    def _params(self, inner: Params, learned: Params, number: int) -> Params:
        """The network's parameters [T, ...] after `number` inner steps, under the model's names."""
        return network(inner | learned)

    def _adapted(
        self,
        params: Params,
        buffers: Statistics,
        support: Support,
        *,
        inductive: bool,
        step: int,
        keys: Tensor | None = None,
    ) -> Adapted:
        """With the statistics for inductive prediction after `step` inner steps, where that is asked for."""
        if not inductive:
            return Adapted(params, None)
        if self._running and buffers:
            return Adapted(params, per_task(buffers, support.tasks))
        return Adapted(params, self.model.apply(params, support.x, observe=True, keys=keys)[1])


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features [T, N, F], weight [T, D, F], bias [T, D] -> [T, N, D]."""
    return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
