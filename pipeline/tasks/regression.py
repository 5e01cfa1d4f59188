"""Regression of random functions: sinusoids with a frequency, lines, two harmonics, steps. Nothing is read from disk.

A task is one function of the family, D outputs of the same inputs x, each output with parameters of its own; every
parameter is uniform in its range:

    sinusoid   y = A sin(ωx − φ)
    linear     y = Σ_i a_i x_i + b, of any number of inputs
    harmonic   y = A_1 sin(ωx − φ_1) + A_2 sin(2ωx − φ_2), a tone and its octave
    step       y is constant but at `edges` places of the input's range, where it jumps to another level

`test_ranges` gives meta-test ranges of its own: how a learner does on functions, or at inputs, that it was not trained
for. Normal noise may be added to what is observed: the targets of support sets, and of queries in meta-training. The
queries of validation and test are scored against the function itself, so that an error of 0 is possible.

MAML's own sinusoids (no frequency, one output) are the family `sinusoid`.

Shapes: T tasks · N support or query points · I inputs · D outputs · k values of a parameter for each output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import keys
from pipeline.config import Section
from pipeline.tasks.ahead import StepsAhead
from pipeline.tasks.objectives import Regression
from pipeline.tasks.points import PointTasks
from pipeline.types import SPLITS, Inputs, Split, TaskBatch

_PARAMETERS, _POINTS, _NOISE = 0, 1, 2  # streams of one task's key
INPUT = "input"  # the range of x

Range = tuple[float, float]
Parameters = dict[str, Tensor]  # [T, k, D] each


class Function(NamedTuple):
    """One kind of function: its parameters' ranges, and y [T, N, D] of x [T, N, I] and the parameters."""

    ranges: dict[str, Range]
    values: Callable[[Tensor, Parameters], Tensor]
    counts: Callable[[RegressionConfig], dict[str, int]]  # k of the parameters that have more than one


def _sinusoid(x: Tensor, p: Parameters) -> Tensor:
    return p["amplitude"] * torch.sin(p["frequency"] * x - p["phase"])


def _linear(x: Tensor, p: Parameters) -> Tensor:
    return torch.baddbmm(p["intercept"], x, p["slope"])


def _harmonic(x: Tensor, p: Parameters) -> Tensor:
    (a, octave), (phase, other) = p["amplitude"].split(1, dim=1), p["phase"].split(1, dim=1)
    angle = p["frequency"] * x
    return a * torch.sin(angle - phase) + octave * torch.sin(2 * angle - other)


def _step(x: Tensor, p: Parameters) -> Tensor:
    passed = (x.unsqueeze(2) >= p["edge"].unsqueeze(1)).sum(2)  # [T, N, D]
    return p["level"].gather(1, passed)


FUNCTIONS: dict[str, Function] = {
    "sinusoid": Function(
        {INPUT: (-5, 5), "amplitude": (0.1, 5), "frequency": (0.5, 2), "phase": (0, math.pi)}, _sinusoid, lambda c: {}
    ),
    "linear": Function(
        {INPUT: (-5, 5), "slope": (-3, 3), "intercept": (-3, 3)}, _linear, lambda c: {"slope": c.num_inputs}
    ),
    "harmonic": Function(
        {INPUT: (-4, 4), "amplitude": (-2, 2), "frequency": (0.5, 2), "phase": (0, 2 * math.pi)},
        _harmonic,
        lambda c: {"amplitude": 2, "phase": 2},
    ),
    "step": Function(
        {INPUT: (-5, 5), "edge": (-5, 5), "level": (-3, 3)}, _step, lambda c: {"edge": c.edges, "level": c.edges + 1}
    ),
}


class RegressionConfig(Section):
    """Regression of random functions of one kind."""

    family: Literal["regression"]
    function: Literal["sinusoid", "linear", "harmonic", "step"]
    num_inputs: int = Field(default=1, ge=1)  # numbers in x; more than one for linear
    num_outputs: int = Field(default=1, ge=1)  # numbers in y
    ranges: dict[str, Range] = Field(default={}, examples=[{"amplitude": [0.1, 5.0], "input": [-5.0, 5.0]}])
    # [lowest, highest] of the function's parameters (see the head of this file) and of the input; others as by default
    test_ranges: dict[str, Range] = Field(default={})  # in meta-test, those that differ
    noise: float = Field(default=0.0, ge=0)  # standard deviation, of what is observed
    edges: int = Field(default=2, ge=1)  # of a step function
    k_shot: int = Field(default=10, ge=1)  # support points in meta-training
    n_query: int = Field(default=10, ge=1)  # query points in meta-training
    eval_k_shot: int = Field(default=5, ge=1)  # support points in validation and test
    eval_n_query: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _ranges_are_the_functions_own(self) -> Self:
        known = FUNCTIONS[self.function].ranges
        for key, ranges in (("ranges", self.ranges), ("test_ranges", self.test_ranges)):
            for name, (low, high) in ranges.items():
                if name not in known:
                    raise ValueError(f"{key}.{name}: function {self.function} has {', '.join(known)}")
                if low > high:
                    raise ValueError(f"{key}.{name}: should be [lowest, highest], got [{low:g}, {high:g}]")
        if self.num_inputs > 1 and self.function != "linear":
            raise ValueError(f"num_inputs: {self.function} is a function of one number; more are for linear")
        return self

    def build(self, *, device: torch.device, dtype: torch.dtype) -> RegressionTasks:
        return RegressionTasks(self, device=device, dtype=dtype)

    def verify(self) -> str:
        """Procedural: the digest names the functions and their ranges."""
        content = {
            "function": self.function,
            "inputs": self.num_inputs,
            "outputs": self.num_outputs,
            "noise": self.noise,
            "ranges": [self.of_split(split) for split in ("meta_train", "meta_test")],
            **({"edges": self.edges} if self.function == "step" else {}),
        }
        return f"regression:{json.dumps(content, sort_keys=True)}"

    def of_split(self, split: Split) -> dict[str, Range]:
        """The ranges of one part."""
        own = self.test_ranges if split == "meta_test" else {}
        return {**FUNCTIONS[self.function].ranges, **self.ranges, **own}


class _Drawn(NamedTuple):
    parameters: Tensor  # [T, all k, D], uniform in 0…1
    x: Tensor  # [T, S + Q, I], uniform in 0…1
    noise: Tensor  # [T, S + Q, D], standard normal; [T, 0, D] where there is none
    keys: Tensor  # int64 [T], the episodes' own


class RegressionTasks(PointTasks):
    """Task family: validation draws from meta-training's distribution, meta-test from its own where that is given."""

    objective = Regression()
    inputs: Inputs = "vectors"
    train_classes = None
    weighting = None
    prefetch = False

    def __init__(self, config: RegressionConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.input_shape = (config.num_inputs,)
        self.num_outputs = config.num_outputs
        self.description: dict[str, Any] = {
            "family": config.family,
            "function": config.function,
            "k_shot": config.eval_k_shot,
            "n_query": config.eval_n_query,
            "ranges": config.of_split("meta_test"),
        }
        self.device = device
        self.dtype = dtype
        self._function = FUNCTIONS[config.function]
        counts = self._function.counts(config)
        self._counts = {name: counts.get(name, 1) for name in self._function.ranges if name != INPUT}
        self._drawn = StepsAhead(self._draw, device)

    def _draw(self, split: Split, seed: int, steps: Tensor, slots: Tensor) -> _Drawn:
        key = keys.of_episodes(seed, SPLITS.index(split), steps, slots)
        points, outputs = sum(self._sizes(split)), self.num_outputs
        noisy = points if self.config.noise else 0

        def uniform(stream: int, rows: int, columns: int) -> Tensor:
            return keys.uniform(keys.fold(key, stream), rows * columns).unflatten(-1, (rows, columns))

        return _Drawn(
            parameters=uniform(_PARAMETERS, sum(self._counts.values()), outputs),
            x=uniform(_POINTS, points, self.config.num_inputs),
            noise=torch.special.ndtri(uniform(_NOISE, noisy, outputs) + 2.0**-54),  # never of 0
            keys=key,
        )

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        assert weights is None, "these tasks have no classes"
        support, queries = self._sizes(split)
        drawn, ranges = self._drawn(split, step, slots, seed=seed), self.config.of_split(split)
        x = _scaled(drawn.x, ranges[INPUT])
        parts = drawn.parameters.split(list(self._counts.values()), dim=1)
        parameters = {name: _scaled(part, ranges[name]) for name, part in zip(self._counts, parts, strict=True)}
        y = self._function.values(x, parameters)
        if self.config.noise:
            observed = support + queries if split == "meta_train" else support
            y[:, :observed] += self.config.noise * drawn.noise[:, :observed]
        x, y = x.to(self.dtype), y.to(self.dtype)
        return TaskBatch(x[:, :support], y[:, :support], x[:, support:], y[:, support:], drawn.keys)


def _scaled(u: Tensor, limits: Range) -> Tensor:
    low, high = limits
    return low + (high - low) * u
