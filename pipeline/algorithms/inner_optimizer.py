"""The rule by which inner steps change parameters: SGD, momentum or Adam, with weight decay, clipping and frozen names.

Everything is differentiable and lives in named tensors: the optimizer's state travels with the adapted parameters, so
that a meta-gradient goes through it and a step can be recomputed from its inputs (`inner_steps.py`).

Shapes: every tensor carries a leading task axis; each task has its own gradient norm and its own state.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from pipeline.algorithms.episodic import EpisodicConfig, named_gradients
from pipeline.config import is_stored
from pipeline.errors import ConfigError
from pipeline.types import Params

EPSILON = 1e-8  # of Adam
MOMENTUM, FIRST, SECOND, COUNT = "momentum/", "adam.m/", "adam.v/", "adam.t/"  # prefixes of an optimizer's state


class InnerStepsConfig(EpisodicConfig):
    """Keys of every algorithm that adapts by gradient steps."""

    adaptation_steps: int = Field(default=1, ge=1)  # inner steps in meta-training
    eval_adaptation_steps: int | None = Field(default=None, ge=1)  # in evaluation and serving; None: as in training
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    inner_momentum: float = Field(default=0.0, ge=0, lt=1)  # sgd only
    inner_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)  # adam
    inner_weight_decay: float = Field(default=0.0, ge=0)  # added to the gradient, as L2 regularization
    inner_gradient_clip: float | None = Field(default=None, gt=0)  # bound on each task's gradient norm
    freeze: list[str] = Field(default=[], examples=[["block1.*", "*.norm.*"]])
    # patterns of parameters that inner steps leave as they are; the outer loop still learns them
    first_order: bool = False
    recompute_inner_steps: bool = False  # exact, and memory does not grow with the steps, for up to 1.4 times the time

    differentiates_steps: ClassVar[bool] = True  # whether the meta-gradient goes through the inner steps

    @model_validator(mode="after")
    def _steps_are_differentiated(self, info: ValidationInfo) -> Self:
        for key in ("first_order", "recompute_inner_steps"):
            if getattr(self, key) and not self.differentiates_steps and not is_stored(info):
                raise ValueError(
                    f"{key}: true changes nothing here: this algorithm does not differentiate its inner steps. Leave "
                    "it out"
                )
        return self

    @field_validator("inner_betas")
    @classmethod
    def _betas_are_of_adam(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        unused = info.data.get("inner_optimizer") == "sgd" and value != cls.model_fields["inner_betas"].default
        if unused and not is_stored(info):
            raise ValueError("are for inner_optimizer: adam; sgd has inner_momentum")
        return value

    @field_validator("inner_momentum")
    @classmethod
    def _momentum_is_of_sgd(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("inner_optimizer") == "adam":
            raise ValueError("is for inner_optimizer: sgd; Adam's is the first of inner_betas")
        return value


class InnerLoopConfig(InnerStepsConfig):
    """The same with one rate for all parameters, or for them to start from."""

    inner_lr: float = Field(gt=0)  # α, step size of the support-loss gradient


def not_frozen(names: list[str], freeze: list[str], *, key: str = "algorithm.freeze") -> list[str]:
    """The names that no pattern freezes. key: of the configuration, that the patterns come from.

    Raises ConfigError: a pattern that matches nothing, or all are frozen.
    """
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: {pattern!r} matches no parameter. There are: {', '.join(names)}.")
    adapted = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in freeze)]
    if not adapted:
        raise ConfigError(f"{key}: nothing is left to learn. Leave out a pattern.")
    return adapted


class InnerOptimizer:
    """Pure functions over a state of named tensors."""

    def __init__(self, config: InnerStepsConfig) -> None:
        self._config = config

    def start(self, params: Params) -> Params:
        """The state of an optimizer that has made no step yet; empty for plain SGD."""
        config = self._config
        if config.inner_optimizer == "adam":
            # with β1 = 0 the first moment is the gradient
            first = {FIRST + k: torch.zeros_like(v) for k, v in params.items() if config.inner_betas[0]}
            second = {SECOND + k: torch.zeros_like(v) for k, v in params.items()}
            leaf = next(iter(params.values()))
            return first | second | {COUNT: torch.zeros(len(leaf), dtype=leaf.dtype, device=leaf.device)}
        if config.inner_momentum:
            return {MOMENTUM + k: torch.zeros_like(v) for k, v in params.items()}
        return {}

    def update(
        self, params: Params, state: Params, grads: Params, rates: Params | None = None
    ) -> tuple[Params, Params]:
        """New parameters and new state.

        rates: what α is replaced by for each parameter, [T] or of its shape; None only where there is an α.
        """
        config = self._config
        if config.inner_weight_decay:
            grads = {k: g + config.inner_weight_decay * params[k] for k, g in grads.items()}
        if config.inner_gradient_clip is not None:
            grads = clipped(grads, config.inner_gradient_clip)
        if config.inner_optimizer == "adam":
            grads, state = self._adam(state, grads)
        elif config.inner_momentum:
            grads = {k: config.inner_momentum * state[MOMENTUM + k] + g for k, g in grads.items()}
            state = {MOMENTUM + k: g for k, g in grads.items()}
        if rates is None:
            assert isinstance(config, InnerLoopConfig)
            return {k: v.add(grads[k], alpha=-config.inner_lr) for k, v in params.items()}, state
        return {k: v - _broadcast(rates[k], v) * grads[k] for k, v in params.items()}, state

    def _adam(self, state: Params, grads: Params) -> tuple[Params, Params]:
        """Kingma & Ba 2015, algorithm 1: directions m̂ / (√v̂ + ε)."""
        beta1, beta2 = self._config.inner_betas
        count = state[COUNT] + 1
        new, directions = {COUNT: count}, {}
        for name, g in grads.items():
            t = _broadcast(count, g)
            v = torch.addcmul(beta2 * state[SECOND + name], g, g, value=1 - beta2)
            # the root's derivative is infinite at 0, where a unit that is never active has its gradient: ε² under it
            root = (v / (1 - beta2**t) + EPSILON**2).sqrt()
            new[SECOND + name] = v
            if beta1:
                new[FIRST + name] = torch.add(beta1 * state[FIRST + name], g, alpha=1 - beta1)
                directions[name] = new[FIRST + name] / (1 - beta1**t) / root
            else:
                directions[name] = g / root
        return directions, new


def clipped(grads: Params, bound: float) -> Params:
    """Each task's gradient, over all names [T, ...], scaled to a norm of at most `bound`."""
    squares = [g.square().reshape(len(g), -1).sum(1) for g in grads.values()]
    norm = (torch.stack(squares).sum(0) + EPSILON**2).sqrt()  # [T]
    scale = (bound / norm).clamp(max=1.0)
    return {k: g * _broadcast(scale, g) for k, g in grads.items()}


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """values [T], or more of like's first dimensions -> as many dimensions as `like`."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))


def gradients(loss: Tensor, params: Params, *, create_graph: bool) -> Params:
    """Of a sum over tasks with respect to [T, ...] each; zeros where it does not depend on a parameter."""
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph, allow_unused=True)
    return named_gradients(params, grads)
