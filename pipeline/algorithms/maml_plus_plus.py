"""MAML++: MAML with learned rates, a loss at every step, and batch normalization that knows the step.

Antoniou, Edwards, Storkey 2019, "How to train your MAML", sec. 4. Each part has a key of its own:

LSLR  `per_step_rates`: a learned rate for every parameter tensor and inner step, all from `inner_lr` at first. Here a
      layer's weight and bias have rates of their own, as in the authors' code.
MSL   `multi_step_loss_steps`: the meta-loss is Σ_i v_i L_query(θ_i) over the learners after each inner step i. The
      weights start equal and go to the last step over that many outer steps (with the authors' floor of 0.03 / K for
      the others); after them only the last step counts.
BNRS  `per_step_statistics`: running statistics for every number of inner steps, by which inductive prediction
      normalizes. They are observed on the query sets of meta-training, whose answers they stand in for.
BNWB  `per_step_affine`: gains and offsets of batch normalization for every number of inner steps, as what is added to
      the network's own; zero at first.
DA    `first_order_steps`: first order for that many outer steps, then second order.
CA    a cosine outer rate: `training.outer.schedule: cosine`.

The paper does not adapt the normalization's gains and offsets in the inner loop: `freeze` them by name. A learner that
makes more steps than in training uses the last step's rates, statistics and gains again.

Disadvantages: rates and gains are fit to one number of steps; the multi-step loss costs a query pass and its derivative
for each step while it lasts; running statistics answer queries one by one but lose what the task at hand would tell.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.algorithms.episodic import Query, QueryLoss, Support, of_classes
from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.types import Adapted, MetaState, Objective, Params, Statistics, TaskModel

RATE = "maml_plus_plus/rate/"  # [K], one for every inner step
AFFINE = "maml_plus_plus/affine/"  # [K + 1, channels], for 0, 1, … K steps made; added to the network's own
LEAST_WEIGHT = 0.03  # of a step before the last, times 1 / K, while the multi-step loss lasts


class MAMLPlusPlusConfig(InnerLoopConfig):
    """MAML with what makes it train well; every part can be switched off."""

    name: Literal["maml_plus_plus"]
    adaptation_steps: int = Field(default=5, ge=1)  # inner steps in meta-training, K
    inductive_statistics: Literal["support", "running"] = "running"
    per_step_rates: bool = True  # learned rates; false: inner_lr for all
    multi_step_loss_steps: int = Field(default=5000, ge=0)  # outer steps with a loss at every inner step; 0: never
    per_step_statistics: bool = True  # running statistics for every number of inner steps
    per_step_affine: bool = True  # gains and offsets of batch normalization for every number of inner steps
    first_order_steps: int = Field(default=0, ge=0)  # outer steps before second order begins

    @model_validator(mode="after")
    def _per_step_statistics_are_running_ones(self) -> Self:
        if self.per_step_statistics and self.inductive_statistics == "support":
            raise ValueError(
                "per_step_statistics are running statistics and inductive_statistics is support: set the first to "
                "false or the second to running"
            )
        return self

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> MAMLPlusPlus:
        return MAMLPlusPlus(self, model=model, objective=objective)


class MAMLPlusPlus(GradientBased):
    """Algorithm: MAML's inner loop, of which every step has quantities of its own."""

    config: MAMLPlusPlusConfig

    def __init__(self, config: MAMLPlusPlusConfig, *, model: TaskModel, objective: Objective) -> None:
        super().__init__(config, model=model, objective=objective)
        layers = model.norm_layers if config.per_step_affine else []
        self._affine_names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]

    def init(self, seed: int) -> MetaState:
        params = self.model.init(seed)
        steps = self.train_steps
        learned = {}
        if self.config.per_step_rates:
            for name in self.adapted_names:
                learned[RATE + name] = torch.full((steps,), self.config.inner_lr, dtype=params[name].dtype)
        for name in self._affine_names:
            learned[AFFINE + name] = params[name].new_zeros(steps + 1, *params[name].shape)
        return MetaState(params | learned, {})

    def describe(self, state: MetaState) -> dict[str, float]:
        """The rate of every parameter tensor at every step (from 1), and the size (root mean square) of what is added
        to gains and offsets."""
        learned = {k: v.detach() for k, v in state.params.items()}
        described: dict[str, float] = {}
        if self.config.per_step_rates:
            rates = torch.stack([learned[RATE + name] for name in self.adapted_names])
            for name, row in zip(self.adapted_names, rates.tolist(), strict=True):
                described |= {f"rate/{name}/step{number}": rate for number, rate in enumerate(row, start=1)}
        if self._affine_names:
            sizes = torch.stack([learned[AFFINE + name].square().mean().sqrt() for name in self._affine_names])
            described |= {f"affine/{k}": size for k, size in zip(self._affine_names, sizes.tolist(), strict=True)}
        return described

    def _first_order(self, step: int) -> bool:
        # short-circuits: a program that is compiled for all steps must not ask for the step
        return self.config.first_order or (self.config.first_order_steps > 0 and step < self.config.first_order_steps)

    def _features_stay(self) -> bool:
        return super()._features_stay() and not self._affine_names

    def _rates(self, learned: Params, number: int) -> Params | None:
        if not self.config.per_step_rates:
            return None
        column = min(number, self.train_steps - 1)
        return {name: learned[RATE + name][:, column] for name in self.adapted_names}

    def _params(self, inner: Params, learned: Params, number: int) -> Params:
        params = super()._params(inner, learned, number)
        row = min(number, self.train_steps)
        return params | {name: params[name] + learned[AFFINE + name][:, row] for name in self._affine_names}

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
        if self.config.per_step_statistics:
            buffers = {name: value[min(step, self.train_steps)] for name, value in buffers.items()}
        return super()._adapted(params, buffers, support, inductive=inductive, step=step, keys=keys)

    def _support_passes(self) -> int:
        return 2 * self.train_steps  # of the steps, and of each learner's statistics for inductive training

    def _query_passes(self) -> int:
        return self.train_steps

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
        steps = self.train_steps
        of_steps, on_support, on_query = keys[:steps], keys[steps : 2 * steps], keys[2 * steps :]
        weights = self._loss_weights(step)
        states, learned = self._states(meta_params, support, of_steps, step=step)
        each_observed: list[Statistics] = []
        losses: list[Tensor] = []
        for number, inner in enumerate(states):
            params = self._params(inner, learned, number)
            if self.config.per_step_statistics and (number == 0 or each_observed[0]):
                with torch.no_grad():
                    each_observed.append(self._answer(params, query.x, observe=True)[1])
            if number == 0 or weights[number - 1] == 0:
                continue
            adapted = self._adapted(
                params, buffers, support, inductive=self._inductive, step=number, keys=on_support[number - 1]
            )
            outputs, observed = self._answer(
                adapted.params,
                query.x,
                statistics=adapted.statistics,
                observe=self._running and not self.config.per_step_statistics and number == steps,
                low_precision=True,
                keys=on_query[number - 1],
            )
            outputs = of_classes(outputs, support.num_classes)
            losses.append(self.objective.loss(outputs, query.y))
        if each_observed:
            observed = {k: torch.stack([seen[k] for seen in each_observed], dim=1) for k in each_observed[0]}
        used = [weight for weight in weights if weight]
        total = sum((weight * loss for weight, loss in zip(used, losses, strict=True)), torch.zeros_like(losses[-1]))
        metrics = {}
        if len(losses) > 1:
            metrics = {f"query_loss_step{i}": loss.detach().sum() for i, loss in enumerate(losses, start=1)}
        return QueryLoss(total, outputs, observed, metrics)

    def _loss_weights(self, step: int) -> list[float]:
        """v_1 … v_K of the multi-step loss at an outer step; they add up to 1."""
        steps, last = self.train_steps, self.config.multi_step_loss_steps
        if last == 0 or step >= last:
            return [0.0] * (steps - 1) + [1.0]
        other = max(1 - step / last, LEAST_WEIGHT) / steps
        return [other] * (steps - 1) + [1 - (steps - 1) * other]
