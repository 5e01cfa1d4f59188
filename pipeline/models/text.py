"""Text classifier: a bag of token embeddings and fully connected layers, native over a leading task axis.

After fastText (Joulin, Grave, Bojanowski, Mikolov 2017, "Bag of Tricks for Efficient Text Classification"): an example
is the sum of the embeddings of its tokens, here divided by the square root of their number, so that random embeddings
make features of unit variance however long a text is. Tokens are numbered by a hash (`pipeline.tasks.tokens`); the
table takes them modulo its rows.

Even a fresh table is of use: sums of random vectors keep the angles between bags of words. What meta-training adds is
mostly which tokens tell classes apart and which ones (the, please, can you) do not.

Disadvantages: the order of words is known only as far as the tokens hold it (n-grams); a token of unseen classes that
meta-training never met keeps its random vector; adapting the table costs memory of its size for every task, so
gradient-based algorithms mostly leave it alone (algorithm.freeze: ["embedding.*"]).

Shapes: T tasks · N examples · L tokens · D units of the embedding · F features.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline import kernels
from pipeline.config import Section
from pipeline.kernels import Kernel, Precision
from pipeline.keys import uniform
from pipeline.models.bag import PADDING, bag
from pipeline.models.mlp import affine, init_affine
from pipeline.types import Inputs, Params, Statistics


class TextConfig(Section):
    """A bag of embeddings and layers with ReLU; without layers the head sees the bag itself."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens",)

    name: Literal["text"]
    buckets: int = Field(default=8192, ge=2, le=2**24)  # rows of the embedding table, which hashed tokens share
    embedding: int = Field(default=128, ge=1)  # units of a token's vector
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[])  # units per layer after the bag
    dropout: float = Field(default=0.0, ge=0, lt=1)  # share of an example's tokens left out, in meta-training

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: Kernel = "auto",
        precision: Precision = "float32",
    ) -> Text:
        """Raises ConfigError: kernels were asked for that it does not have. It is the same on every device."""
        kernels.only_stock_ops(self.name, kernel, precision)
        return Text(self, num_outputs=num_outputs, dtype=dtype)


class Text:
    """Parameters: `embedding.weight` [buckets + 1, D], whose row 0 is never read, `layer{i}.*` and the head's.

    x are token numbers, int64 [T, N, L]; 0 is no token. An example without any is the zero vector.
    """

    cpu_task_chunk = None
    kernel, precision = "pure", "float32"
    head = ("head.weight", "head.bias")

    def __init__(self, config: TextConfig, *, num_outputs: int, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.sizes = [config.embedding, *config.hidden, num_outputs]
        self.stochastic = config.dropout > 0
        self.constant_names: list[str] = []
        self.norm_layers: list[str] = []
        self._layers = [f"layer{i}" for i in range(1, len(config.hidden) + 1)]
        self.parameter_names = ["embedding.weight"]
        for name in (*self._layers, "head"):
            self.parameter_names += [f"{name}.weight", f"{name}.bias"]

    def init(self, seed: int) -> Params:
        """Normal embeddings of unit variance; layers and head as in `MLP`."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.config.buckets + 1, self.config.embedding)
        params = {"embedding.weight": torch.empty(size, dtype=torch.float64).normal_(generator=generator)}
        params["embedding.weight"][PADDING] = 0
        for name, fan_in, fan_out in zip((*self._layers, "head"), self.sizes, self.sizes[1:], strict=False):
            params |= init_affine(name, fan_in, fan_out, generator)
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
        """x int64 [T, N, L] -> outputs [T, N, num_outputs], no statistics."""
        return affine(params, "head", self.features(params, x, keys=keys)[0]), {}

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
        """x int64 [T, N, L] -> the last layer, or the bag, [T, N, F], no statistics."""
        rows = torch.where(x == 0, PADDING, 1 + (x - 1).remainder(self.config.buckets))
        if keys is not None and self.stochastic:
            dropped = uniform(keys, x[0].numel()).view(x.shape) < self.config.dropout
            rows = rows.masked_fill(dropped, PADDING)
        number = (rows != PADDING).sum(dim=-1, keepdim=True).clamp_min(1)
        h = bag(params["embedding.weight"], rows) * number.to(self.dtype).rsqrt()
        for name in self._layers:
            h = F.relu(affine(params, name, h))
        return h, {}
