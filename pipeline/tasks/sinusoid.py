"""Sinusoid regression: the toy family of MAML (Finn, Abbeel, Levine 2017, section 5.1).

A task is y = A·sin(x − φ) with amplitude A ~ U[0.1, 5] and phase φ ~ U[0, π]; inputs x ~ U[−5, 5].

Shapes: T tasks · S k_shot · Q n_query; x and y are [T, N, 1].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline import keys
from pipeline.config import Section
from pipeline.tasks.ahead import StepsAhead
from pipeline.tasks.objectives import Regression
from pipeline.tasks.points import PointTasks
from pipeline.types import SPLITS, Inputs, Split, TaskBatch

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)  # radians
INPUT = (-5.0, 5.0)


class SinusoidConfig(Section):
    """Regression of random sinusoids; nothing is read from disk."""

    family: Literal["sinusoid"]
    k_shot: int = Field(default=10, ge=1)  # support points in meta-training
    n_query: int = Field(default=10, ge=1)  # query points in meta-training
    eval_k_shot: int = Field(default=5, ge=1)  # support points in validation and test
    eval_n_query: int = Field(default=100, ge=1)

    def build(self, *, device: torch.device, dtype: torch.dtype) -> SinusoidTasks:
        return SinusoidTasks(self, device=device, dtype=dtype)

    def verify(self) -> str:
        """Procedural: the digest names the family and its ranges."""
        return f"sinusoid:A{AMPLITUDE}:phase{PHASE}:x{INPUT}"


class _Drawn(NamedTuple):
    amplitude: Tensor  # [T, 1, 1]
    phase: Tensor  # [T, 1, 1], radians
    x: Tensor  # [T, S + Q, 1]
    keys: Tensor  # int64 [T], the episodes' own


class SinusoidTasks(PointTasks):
    """Task family: the splits are independent draws of one distribution, as in the paper."""

    objective = Regression()
    inputs: Inputs = "vectors"
    input_shape = (1,)
    num_outputs = 1
    train_classes = None
    weighting = None
    prefetch = False

    def __init__(self, config: SinusoidConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.description = {"family": config.family, "k_shot": config.eval_k_shot, "n_query": config.eval_n_query}
        self.device = device
        self.dtype = dtype
        self._drawn = StepsAhead(self._draw, device)

    def _draw(self, split: Split, seed: int, steps: Tensor, slots: Tensor) -> _Drawn:
        key = keys.of_episodes(seed, SPLITS.index(split), steps, slots)
        u = keys.uniform(key, 2 + sum(self._sizes(split))).unsqueeze(-1)
        return _Drawn(
            amplitude=_scale(u[..., :1, :], AMPLITUDE),
            phase=_scale(u[..., 1:2, :], PHASE),
            x=_scale(u[..., 2:, :], INPUT),
            keys=key,
        )

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        assert weights is None, "these tasks have no classes"
        n_support, _ = self._sizes(split)
        amplitude, phase, x, key = self._drawn(split, step, slots, seed=seed)
        y = (amplitude * torch.sin(x - phase)).to(self.dtype)
        x = x.to(self.dtype)
        return TaskBatch(x[:, :n_support], y[:, :n_support], x[:, n_support:], y[:, n_support:], key)


def _scale(u: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return low + (high - low) * u
