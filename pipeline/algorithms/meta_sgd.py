"""Meta-SGD: learn the initialization, and for every parameter how far a step goes and in which direction.

Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning". The inner step (sec. 3.1) is
θ' = θ − α ∘ ∇L_support(θ), with a rate α_i of its own for every parameter; θ and α are learned together (algorithm 1),
so a rate may shrink to zero or change its sign. Rates start from a uniform draw (the paper: between 0.005 and 0.1).
As in the paper one step is the usual; with several, every step has the same rates.

Disadvantages: twice as many meta-parameters as MAML; nothing keeps a rate from growing until a step diverges; rates
fit to the number of shots and steps they were trained with. With `first_order` the rates still learn, from the product
of the query gradient and the inner gradient.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerStepsConfig
from pipeline.keys import make, uniform
from pipeline.types import MetaState, Objective, Params, TaskModel

RATE = "meta_sgd/rate/"  # [...] as the parameter
_RATES = 0x7261746573  # no small number: those are the samplers' streams


class MetaSGDConfig(InnerStepsConfig):
    """Learned rates, one for every parameter."""

    name: Literal["meta_sgd"]
    initial_rates: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.005, 0.1)
    # rates start uniform between the two; equal ones start all rates there

    @field_validator("initial_rates")
    @classmethod
    def _lowest_first(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("should be two numbers, [lowest, highest]")
        return value

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> MetaSGD:
        return MetaSGD(self, model=model, objective=objective)


class MetaSGD(GradientBased):
    """Algorithm: MAML whose inner rates are meta-parameters of the shapes of the parameters."""

    config: MetaSGDConfig

    def init(self, seed: int) -> MetaState:
        params = self.model.init(seed)
        low, high = self.config.initial_rates
        rates = {}
        for number, name in enumerate(self.adapted_names):
            value = params[name]
            drawn = uniform(make(seed, _RATES, number), value.numel()).view(value.shape)
            rates[RATE + name] = (low + (high - low) * drawn).to(value.dtype)
        return MetaState(params | rates, {})

    def describe(self, state: MetaState) -> dict[str, float]:
        """The mean rate of every parameter tensor, and the share of its rates that are negative."""
        rates = [state.params[RATE + name].detach() for name in self.adapted_names]
        numbers = torch.stack([torch.stack([rate.mean(), (rate < 0).to(rate.dtype).mean()]) for rate in rates])
        described: dict[str, float] = {}
        for name, (mean, negative) in zip(self.adapted_names, numbers.tolist(), strict=True):
            described |= {f"rate/{name}": mean, f"negative_rates/{name}": negative}
        return described

    def _rates(self, learned: Params, number: int) -> Params:
        return {name: learned[RATE + name] for name in self.adapted_names}
