"""Multilayer perceptron, native over a leading task axis: every layer is one batched matrix product."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config import Section
from pipeline.kernels import Kernel, Precision
from pipeline.models.dense import dense
from pipeline.models.normalization import Normalizer
from pipeline.types import Inputs, Params, Statistics


class MLPConfig(Section):
    """Fully connected layers with ReLU; inputs of any shape are flattened."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "vectors")

    name: Literal["mlp"]
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[40, 40])  # units per layer; []: a head alone
    normalization: Literal["none", "batch"] = "none"  # batch: MAML's non-convolutional Omniglot network

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: Kernel = "auto",
        precision: Precision = "float32",
    ) -> MLP:
        """Raises ConfigError: kernels were asked for that it does not have. It is the same on every device."""
        kernels.only_stock_ops(self.name, kernel, precision)
        return MLP(self, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype)


class MLP:
    """Parameters: `layer{i}.{weight,bias}`, `norm{i}.{weight,bias}` with normalization, `head.{weight,bias}`."""

    cpu_task_chunk = None
    kernel, precision = "pure", "float32"
    stochastic = False
    head = ("head.weight", "head.bias")

    def __init__(
        self, config: MLPConfig, *, input_shape: tuple[int, ...], num_outputs: int, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.sizes = [math.prod(input_shape), *config.hidden, num_outputs]
        self.constant_names: list[str] = []
        self.parameter_names = list(self.init(0))
        normalized = config.hidden if config.normalization == "batch" else []
        self.norm_layers = [f"norm{layer}" for layer in range(1, len(normalized) + 1)]

    def init(self, seed: int) -> Params:
        """PyTorch's own default for linear layers: uniform in ±1/√fan_in for weights and biases."""
        generator = torch.Generator().manual_seed(seed)
        params: Params = {}
        layers = len(self.sizes) - 1
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False), start=1):
            params |= init_affine("head" if layer == layers else f"layer{layer}", fan_in, fan_out, generator)
            if self.config.normalization == "batch" and layer < layers:
                params[f"norm{layer}.weight"] = torch.ones(fan_out)
                params[f"norm{layer}.bias"] = torch.zeros(fan_out)
        return {name: value.to(self.dtype) for name, value in params.items()}

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, ...] -> outputs [T, N, num_outputs], observed statistics (empty without normalization)."""
        if self.config.normalization == "none":
            return self._dense(params, x.flatten(2), [*self._layers(), "head"]), {}
        x, observed = self.features(params, x, statistics=statistics, observe=observe)
        return affine(params, "head", x), observed

    def features(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, ...] -> the last hidden layer [T, N, units], observed statistics (empty without normalization).

        Without hidden layers the inputs themselves.
        """
        x = x.flatten(2)
        if not self.config.hidden:
            return x, {}
        if self.config.normalization == "none":
            return F.relu(self._dense(params, x, self._layers())), {}
        normalize = Normalizer(statistics, observe)
        for layer in range(1, len(self.sizes) - 1):
            x = affine(params, f"layer{layer}", x)
            tasks = x.shape[0]
            side_by_side = x.transpose(0, 1).flatten(1)  # [N, T·units]
            weight, bias = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
            normalized = normalize(f"norm{layer}", side_by_side, weight, bias)
            x = normalized.unflatten(1, (tasks, -1)).transpose(0, 1)
            x = F.relu(x)
        return x, normalize.observed

    def _layers(self) -> list[str]:
        return [f"layer{layer}" for layer in range(1, len(self.sizes) - 1)]

    def _dense(self, params: Params, x: Tensor, names: list[str]) -> Tensor:
        return dense(x, [params[f"{name}.weight"] for name in names], [params[f"{name}.bias"] for name in names])


def init_affine(name: str, fan_in: int, fan_out: int, generator: torch.Generator) -> Params:
    """`NAME.weight` [out, in] and `NAME.bias` [out], float64: PyTorch's default, uniform in ±1/√fan_in."""
    limit = 1 / math.sqrt(fan_in)
    return {
        f"{name}.{key}": nn.init.uniform_(torch.empty(shape, dtype=torch.float64), -limit, limit, generator=generator)
        for key, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,)))
    }


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    """x [T, N, in] -> [T, N, out], by `NAME.weight` [T, out, in] and `NAME.bias` [T, out]."""
    return torch.baddbmm(params[f"{name}.bias"].unsqueeze(1), x, params[f"{name}.weight"].transpose(1, 2))
