"""ResNet-12: the residual network of few-shot learning, native over a leading task axis.

Oreshkin, Rodríguez López, Lacoste 2018 (TADAM); widths and regularization as in Lee, Maji, Ravichandran, Soatto 2019
("Meta-Learning with Differentiable Convex Optimization", MetaOptNet, sec. 4.1): four residual blocks of 64, 160, 320
and 640 channels. A block is three 3×3 convolutions, each with batch-statistics normalization, and a 1×1 convolution
with normalization beside them; LeakyReLU(0.1) between and after; max-pooling 2×2; then the spatial mean.

DropBlock (Ghiasi, Lin, Le 2018, "DropBlock: A regularization method for convolutional networks") in the last two
blocks, as in MetaOptNet: the seeds of the squares that are dropped come with the probability of eq. 1,

    γ = (1 − keep) / block_size² · h·w / ((h − block_size + 1)(w − block_size + 1)),

anywhere a whole square fits, each channel on its own, and what is kept is scaled up by the share of what was dropped
(algorithm 1), counted per task, so that tasks do not see each other. The masks come from the pass's keys. MetaOptNet's
growth of the rate over training is left out: a pass does not know how far training is.

Disadvantages: with 12.4 million parameters at the default widths a second-order inner step wants a GPU; the grouped
convolutions of many tasks are slow on CPUs.

Activations are [N, T·C, H, W], tasks side by side on the channel axis, as in `conv4`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision
from pipeline.keys import bits, uniform
from pipeline.models.normalization import Normalizer
from pipeline.types import Inputs, Params, Statistics

BLOCKS, CONVOLUTIONS = 4, 3
SLOPE = 0.1  # of LeakyReLU
DROPPING = (3, 4)  # the blocks with DropBlock
Width = Annotated[int, Field(ge=1)]


class ResNet12Config(Section):
    """Four residual blocks of three 3×3 convolutions."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images",)

    name: Literal["resnet12"]
    widths: tuple[Width, Width, Width, Width] = (64, 160, 320, 640)  # channels of each block
    drop_rate: float = Field(default=0.0, ge=0, lt=1)  # of DropBlock in meta-training; MetaOptNet: 0.1
    drop_block_size: int = Field(default=5, ge=1)  # pixels of the activations; at most their height and width

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: Kernel = "auto",
        precision: Precision = "float32",
    ) -> ResNet12:
        """Raises ConfigError: the inputs are not images, or are too small; kernels that it does not have."""
        kernels.only_stock_ops(self.name, kernel, precision)
        return ResNet12(self, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype)


class ResNet12:
    """Parameters: `block{1..4}.conv{1..3}.weight` [O, I, 3, 3], `block{1..4}.norm{1..3}.{weight,bias}` [O],
    `block{1..4}.shortcut.conv.weight` [O, I, 1, 1], `block{1..4}.shortcut.norm.{weight,bias}`, `head.{weight,bias}`."""

    cpu_task_chunk: int | None = None
    kernel, precision = "pure", "float32"
    head = ("head.weight", "head.bias")

    def __init__(
        self, config: ResNet12Config, *, input_shape: tuple[int, ...], num_outputs: int, dtype: torch.dtype
    ) -> None:
        if len(input_shape) != 3:
            raise ConfigError(f"model.name: resnet12 takes images [C, H, W], the task has inputs {list(input_shape)}.")
        if min(input_shape[1:]) < 2**BLOCKS:
            raise ConfigError(
                f"model.name: resnet12 halves its input four times; {input_shape[1]}×{input_shape[2]} is too small."
            )
        self.config = config
        self.dtype = dtype
        self.in_channels = input_shape[0]
        self.num_outputs = num_outputs
        self.stochastic = config.drop_rate > 0
        shapes = self._shapes()
        self.parameter_names = list(shapes)
        weights = [name for name in shapes if name.endswith(".weight")]
        self.norm_layers = [name.removesuffix(".weight") for name in weights if len(shapes[name]) == 1]
        self.constant_names: list[str] = []

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        channels = self.in_channels
        for block, width in enumerate(self.config.widths, start=1):
            inputs = channels
            for i in range(1, CONVOLUTIONS + 1):
                shapes[f"block{block}.conv{i}.weight"] = (width, inputs, 3, 3)
                shapes[f"block{block}.norm{i}.weight"] = shapes[f"block{block}.norm{i}.bias"] = (width,)
                inputs = width
            shapes[f"block{block}.shortcut.conv.weight"] = (width, channels, 1, 1)
            shapes[f"block{block}.shortcut.norm.weight"] = shapes[f"block{block}.shortcut.norm.bias"] = (width,)
            channels = width
        return shapes | {"head.weight": (self.num_outputs, channels), "head.bias": (self.num_outputs,)}

    def init(self, seed: int) -> Params:
        """He-normal filters by fan-out, as in MetaOptNet's code; a Glorot-uniform head, zero biases, unit gains."""
        generator = torch.Generator().manual_seed(seed)
        params: Params = {}
        for name, shape in self._shapes().items():
            value = torch.zeros(shape, dtype=torch.float64)
            if len(shape) == 4:
                nn.init.kaiming_normal_(value, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu", generator=generator)
            elif len(shape) == 2:
                nn.init.xavier_uniform_(value, generator=generator)
            elif name.endswith(".weight"):
                value.fill_(1)
            params[name] = value.to(self.dtype)
        return params

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
        """x [T, N, C, H, W] -> logits [T, N, num_outputs], observed statistics."""
        features, observed = self.features(params, x, statistics=statistics, observe=observe, keys=keys)
        weight, bias = (params[name] for name in self.head)
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2)), observed

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
        """x [T, N, C, H, W] -> features [T, N, F], F the last block's channels, and observed statistics."""
        normalize = Normalizer(statistics, observe)
        tasks = len(x)
        x = x.transpose(0, 1).flatten(1, 2)  # [N, T·C, H, W]
        of_blocks = bits(keys, len(DROPPING)).unbind(-1) if keys is not None and self.stochastic else None
        for block in range(1, BLOCKS + 1):
            x = self._block(params, x, block, normalize)
            if of_blocks is not None and block in DROPPING:
                x = self._drop(x, of_blocks[DROPPING.index(block)])
        return x.mean(dim=(2, 3)).unflatten(1, (tasks, -1)).transpose(0, 1), normalize.observed

    def _block(self, params: Params, x: Tensor, block: int, normalize: Normalizer) -> Tensor:
        """x [N, T·I, H, W] -> [N, T·O, H/2, W/2]."""

        def normalized(x: Tensor, conv: str, norm: str, padding: int) -> Tensor:
            weight = params[f"block{block}.{conv}.weight"]
            x = F.conv2d(x, weight.flatten(0, 1), padding=padding, groups=len(weight))
            name = f"block{block}.{norm}"
            return normalize(name, x, params[f"{name}.weight"], params[f"{name}.bias"])

        beside = normalized(x, "shortcut.conv", "shortcut.norm", 0)
        for i in range(1, CONVOLUTIONS + 1):
            x = normalized(x, f"conv{i}", f"norm{i}", 1)
            if i < CONVOLUTIONS:
                x = F.leaky_relu(x, SLOPE)
        return F.max_pool2d(F.leaky_relu(x + beside, SLOPE), 2)

    def _drop(self, x: Tensor, keys: Tensor) -> Tensor:
        """DropBlock on x [N, T·C, H, W], by one key of each task [T]."""
        tasks = len(keys)
        kept = drop_block_mask(
            keys, (len(x), x.shape[1] // tasks, *x.shape[2:]), self.config.drop_rate, self.config.drop_block_size
        ).to(x.dtype)  # [T, N, C, H, W]
        share = kept.mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1 / kept[0].numel())
        return x * (kept / share).transpose(0, 1).flatten(1, 2)


def drop_block_mask(keys: Tensor, shape: tuple[int, ...], drop_rate: float, block_size: int) -> Tensor:
    """What DropBlock keeps of activations of `shape` (N, C, H, W): bool [T, N, C, H, W] for keys [T]."""
    number, channels, height, width = shape
    size = min(block_size, height, width)
    rows, columns = height - size + 1, width - size + 1  # places where a whole square fits
    gamma = drop_rate / size**2 * (height * width) / (rows * columns)
    drawn = uniform(keys, math.prod((number, channels, rows, columns))).view(-1, channels, rows, columns)
    seeds = F.pad((drawn < gamma).to(torch.float32), [size - 1] * 4)
    kept = F.max_pool2d(seeds, size, stride=1) == 0
    return kept.view(len(keys), number, channels, height, width)
