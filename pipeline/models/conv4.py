"""Conv4: the four-block convolutional network of few-shot learning, native over a leading task axis.

Vinyals et al. 2016 (Matching Networks) with max-pooling; Finn, Abbeel, Levine 2017 (MAML) with strided
convolutions and a spatial mean on Omniglot. Each block: convolution 3×3, batch-statistics normalization, ReLU.
The convolution has no bias: before a batch normalization its gradient is zero.

Activations are [N, T·C, H, W], tasks side by side on the channel axis, so a task-batched convolution is one
grouped convolution and per-channel statistics are per-task ones. `_pure` says what is computed; `_fast` computes the
same with the kernels of `pipeline.kernels`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision, closed, native
from pipeline.kernels.closed import Images
from pipeline.models.normalization import Normalizer
from pipeline.types import Inputs, Params, Statistics

BLOCKS = 4
OF_BLOCK = ("conv.weight", "norm.weight", "norm.bias")
CPU = torch.device("cpu")


class Conv4Config(Section):
    """Four blocks of 3×3 convolutions."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images",)

    name: Literal["conv4"]
    hidden: int = Field(default=64, ge=1)  # channels of every block
    downsample: Literal["max_pool", "stride"] = "max_pool"
    readout: Literal["flatten", "mean"] | None = None  # None: flatten after max_pool, mean after stride (the papers)

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        kernel: Kernel = "closed",
        precision: Precision = "float32",
    ) -> Conv4:
        """Raises ConfigError: the inputs are not images, or are too small; kernels that cannot be used."""
        choice = kernels.choose(kernel, precision, device=device, channels=self.hidden, dtype=dtype)
        return Conv4(self, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype, choice=choice)


class Conv4:
    """Parameters: `block{1..4}.conv.weight` [O, I, 3, 3], `block{1..4}.norm.weight` and `.bias` [O], and the head's."""

    stochastic = False
    head = ("head.weight", "head.bias")

    def __init__(
        self,
        config: Conv4Config,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        choice: kernels.Choice,
    ) -> None:
        if len(input_shape) != 3:
            raise ConfigError(f"model.name: conv4 takes images [C, H, W], the task has inputs {list(input_shape)}.")
        self.config = config
        self.dtype = dtype
        self.kernel, self.precision = choice
        self.stride, self.pool = (2, 1) if config.downsample == "stride" else (1, 2)
        # more tasks side by side leave the caches: tests/benchmarks/chunks.py
        self.cpu_task_chunk = 8 if config.downsample == "stride" else 4
        self.in_channels, height, width = input_shape
        self.num_outputs = num_outputs
        self.readout = config.readout or ("flatten" if config.downsample == "max_pool" else "mean")
        for _ in range(BLOCKS):
            height, width = self._halve(height), self._halve(width)
        if min(height, width) < 1:
            raise ConfigError(
                f"model.name: conv4 halves its input four times; {input_shape[1]}×{input_shape[2]} is too small."
            )
        self._num_features = config.hidden * (height * width if self.readout == "flatten" else 1)
        blocks = range(1, BLOCKS + 1)
        self.constant_names: list[str] = []
        self.parameter_names = [f"block{block}.{name}" for block in blocks for name in OF_BLOCK] + [*self.head]
        self.norm_layers = [f"block{block}.norm" for block in blocks]

    def _halve(self, size: int) -> int:
        return size // 2 if self.config.downsample == "max_pool" else (size + 1) // 2

    def init(self, seed: int) -> Params:
        """Glorot-uniform weights, zero biases, unit gains (as in MAML's code).

        Filters are channels-last in memory, as the kernels take them: what is adapted from them stays so.
        """
        generator = torch.Generator().manual_seed(seed)
        params: Params = {}
        channels = self.in_channels
        for block in range(1, BLOCKS + 1):
            weight = torch.empty(self.config.hidden, channels, 3, 3, dtype=torch.float64)
            weight = nn.init.xavier_uniform_(weight, generator=generator)
            params[f"block{block}.conv.weight"] = weight.contiguous(memory_format=torch.channels_last)
            params[f"block{block}.norm.weight"] = torch.ones(self.config.hidden)
            params[f"block{block}.norm.bias"] = torch.zeros(self.config.hidden)
            channels = self.config.hidden
        weight = torch.empty(self.num_outputs, self._num_features, dtype=torch.float64)
        params["head.weight"] = nn.init.xavier_uniform_(weight, generator=generator)
        params["head.bias"] = torch.zeros(self.num_outputs)
        return {name: value.to(self.dtype) for name, value in params.items()}

    def prepare(self, x: Tensor) -> Tensor | Images:
        """x [T, N, C, H, W] -> what `apply` takes, for several passes over the same images."""
        return x if self.kernel == "pure" else closed.prepare(x, stride=self.stride)

    def apply(
        self,
        params: Params,
        x: Tensor | Images,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, C, H, W], or what `prepare` made of it -> logits [T, N, num_outputs], observed statistics."""
        features, observed = self.features(
            params, x, statistics=statistics, observe=observe, low_precision=low_precision, keys=keys
        )
        weight, bias = (params[name] for name in self.head)
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2)), observed

    def features(
        self,
        params: Params,
        x: Tensor | Images,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, C, H, W], or what `prepare` made of it -> features [T, N, F], observed statistics."""
        if isinstance(x, Tensor) and (self.kernel == "pure" or statistics is not None):
            x = x.transpose(0, 1).flatten(1, 2)  # [N, T·C, H, W]
        elif isinstance(x, Tensor):
            x = closed.prepare(x, stride=self.stride)
        if isinstance(x, Images) and statistics is None:
            half = low_precision and self.precision == "mixed"
            observed: Statistics = {}
            x = self._fast(params, x, torch.bfloat16 if half else self.dtype, observed if observe else None)
            return self._read_out(x), observed
        normalize = Normalizer(statistics, observe)
        x = self._pure(params, x.side_by_side if isinstance(x, Images) else x, normalize)
        return self._read_out(x), normalize.observed

    def _pure(self, params: Params, x: Tensor, normalize: Normalizer) -> Tensor:
        """The four blocks in stock ops: x [N, T·C, H, W] -> [N, T·hidden, H', W']."""
        for block in range(1, BLOCKS + 1):
            weight, gain, offset = _of_block(params, block)
            x = F.conv2d(x, weight.flatten(0, 1), stride=self.stride, padding=1, groups=len(weight))
            x = F.relu(normalize(f"block{block}.norm", x, gain, offset))
            if self.pool > 1:
                x = F.max_pool2d(x, self.pool)
        return x

    def _fast(self, params: Params, images: Images, dtype: torch.dtype, observed: Statistics | None) -> Tensor:
        """The four blocks in ops closed under differentiation; activations of `dtype`.

        Writes the pass's batch statistics into `observed`.
        """
        ops = native if self.kernel == "native" and images.padded.device.type == "cpu" else closed
        if observed is not None:
            observed["block1.norm.mean"], observed["block1.norm.var"] = closed.moments(_of_block(params, 1)[0], images)
        x = ops.first_layer(images, *_of_block(params, 1), stride=self.stride, pool=self.pool, dtype=dtype)
        for block in range(2, BLOCKS + 1):
            weight, gain, offset = _of_block(params, block)
            x = ops.convolution(x, weight.flatten(0, 1), stride=self.stride, tasks=len(weight))
            if observed is not None:
                name = f"block{block}.norm"
                observed[f"{name}.mean"], observed[f"{name}.var"] = _moments(x.to(self.dtype), tasks=len(weight))
            x = ops.norm_relu_pool(x, gain.flatten(), offset.flatten(), pool=self.pool)
        return x

    def _read_out(self, x: Tensor) -> Tensor:
        """x [N, T·hidden, H', W'] -> features [T, N, F]."""
        x = x.to(self.dtype).unflatten(1, (-1, self.config.hidden)).transpose(0, 1)  # [T, N, hidden, H', W']
        return x.mean(dim=(3, 4)) if self.readout == "mean" else x.flatten(2)


def _of_block(params: Params, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Filters [T, O, I, 3, 3], gains and offsets [T, O]."""
    weight, gain, offset = (params[f"block{block}.{name}"] for name in OF_BLOCK)
    return weight, gain, offset


def _moments(x: Tensor, *, tasks: int) -> tuple[Tensor, Tensor]:
    """Activations [N, T·C, H, W] -> mean and biased variance of each channel, [T, C]."""
    var, mean = torch.var_mean(x.permute(0, 2, 3, 1).flatten(0, 2), dim=0, correction=0)
    return mean.view(tasks, -1), var.view(tasks, -1)
