"""Conv4: the four-block convolutional network of few-shot learning, native over a leading task axis.

Vinyals et al. 2016 (Matching Networks) with max-pooling; Finn, Abbeel, Levine 2017 (MAML) with strided
convolutions and a spatial mean on Omniglot. Each block: convolution 3×3, batch-statistics normalization, ReLU.
The convolution has no bias: before a batch normalization its gradient is zero.

Activations are [N, T·C, H, W], tasks side by side on the channel axis, so a task-batched convolution is one
grouped convolution and per-channel statistics are per-task ones.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.models.normalization import Normalizer
from pipeline.types import Params, Statistics

BLOCKS = 4


class Conv4Config(Section):
    """Four blocks of 3×3 convolutions."""

    name: Literal["conv4"]
    hidden: int = Field(default=64, ge=1)  # channels of every block
    downsample: Literal["max_pool", "stride"] = "max_pool"
    readout: Literal["flatten", "mean"] | None = None  # None: flatten after max_pool, mean after stride (the papers)

    def build(self, *, input_shape: tuple[int, ...], num_outputs: int, dtype: torch.dtype) -> Conv4:
        """Raises ConfigError: the inputs are not images, or too small for four halvings."""
        return Conv4(self, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype)


class Conv4:
    """Parameters: `block{1..4}.conv.weight` [O, I, 3, 3], `block{1..4}.norm.weight` and `.bias` [O], and the head's."""

    cpu_task_chunk = 4  # more tasks side by side leave the caches: tests/benchmarks/chunks.py
    stochastic = False

    def __init__(
        self, config: Conv4Config, *, input_shape: tuple[int, ...], num_outputs: int, dtype: torch.dtype
    ) -> None:
        if len(input_shape) != 3:
            raise ConfigError(f"model.name: conv4 takes images [C, H, W], the task has inputs {list(input_shape)}.")
        self.config = config
        self.dtype = dtype
        self.in_channels, height, width = input_shape
        self.num_outputs = num_outputs
        self.readout = config.readout or ("flatten" if config.downsample == "max_pool" else "mean")
        for _ in range(BLOCKS):
            height, width = self._halve(height), self._halve(width)
        if min(height, width) < 1:
            raise ConfigError(
                f"model.name: conv4 halves its input four times; {input_shape[1]}×{input_shape[2]} is too small."
            )
        self.features = config.hidden * (height * width if self.readout == "flatten" else 1)

    def _halve(self, size: int) -> int:
        return size // 2 if self.config.downsample == "max_pool" else (size + 1) // 2

    def init(self, seed: int) -> Params:
        """Glorot-uniform weights, zero biases, unit gains (as in MAML's code)."""
        generator = torch.Generator().manual_seed(seed)
        params: Params = {}
        channels = self.in_channels
        for block in range(1, BLOCKS + 1):
            weight = torch.empty(self.config.hidden, channels, 3, 3, dtype=torch.float64)
            params[f"block{block}.conv.weight"] = nn.init.xavier_uniform_(weight, generator=generator)
            params[f"block{block}.norm.weight"] = torch.ones(self.config.hidden)
            params[f"block{block}.norm.bias"] = torch.zeros(self.config.hidden)
            channels = self.config.hidden
        weight = torch.empty(self.num_outputs, self.features, dtype=torch.float64)
        params["head.weight"] = nn.init.xavier_uniform_(weight, generator=generator)
        params["head.bias"] = torch.zeros(self.num_outputs)
        return {name: value.to(self.dtype) for name, value in params.items()}

    def apply(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, C, H, W] -> logits [T, N, num_outputs], observed statistics."""
        tasks = len(x)
        normalize = Normalizer(statistics, observe)
        x = x.transpose(0, 1).flatten(1, 2)  # [N, T·C, H, W]
        stride = 2 if self.config.downsample == "stride" else 1
        for block in range(1, BLOCKS + 1):
            name = f"block{block}"
            weight = params[f"{name}.conv.weight"].flatten(0, 1)
            x = F.conv2d(x, weight, stride=stride, padding=1, groups=tasks)
            x = normalize(f"{name}.norm", x, params[f"{name}.norm.weight"], params[f"{name}.norm.bias"])
            x = F.relu(x)
            if self.config.downsample == "max_pool":
                x = F.max_pool2d(x, 2)
        x = x.unflatten(1, (tasks, -1)).transpose(0, 1)  # [T, N, hidden, H', W']
        features = x.mean(dim=(3, 4)) if self.readout == "mean" else x.flatten(2)
        logits = torch.baddbmm(params["head.bias"].unsqueeze(1), features, params["head.weight"].transpose(1, 2))
        return logits, normalize.observed
