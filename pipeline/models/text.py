"""Text classifier: a bag of token embeddings and fully connected layers, native over a leading task axis.

After fastText (Joulin, Grave, Bojanowski, Mikolov 2017, "Bag of Tricks for Efficient Text Classification"): an example
is the sum of the embeddings of its tokens, here divided by the square root of their number, so that random embeddings
make features of unit variance however long a text is. Tokens are numbered by a hash (`pipeline.tasks.tokens`); the
table takes them modulo its rows.

Even a fresh table is of use: sums of random vectors keep the angles between bags of words, the better the more units
they have. `embedding: null` keeps the bag itself, a unit for each row of the table, which is then one weight a row.
What meta-training adds is mostly which tokens tell classes apart and which ones (the, please, can you) do not.

`start: tfidf` begins with what counting says about that: a row counts by its rarity in meta-training's texts. With
`center`, features have unit length and then lose a vector, at the start their mean over these texts: what all texts
have in common says nothing about any (as in SimpleShot: Wang, Chao, Weinberger, van der Maaten 2019). Both are computed
when a run is made (`pipeline.text_start`), learned on like all else and part of the registered model.

Disadvantages: the order of words is known only as far as the tokens hold it (n-grams); a token of unseen classes that
meta-training never met keeps its random vector; adapting the table costs memory of its size for every task, so
gradient-based algorithms mostly leave it alone (algorithm.freeze: ["embedding.*"]).

Shapes: T tasks · N examples · L tokens · D units of the embedding · F features.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import kernels
from pipeline.config import Section
from pipeline.kernels import Kernel, Precision
from pipeline.keys import uniform
from pipeline.models.bag import PADDING, bag
from pipeline.models.mlp import affine, init_affine
from pipeline.storage import absolute
from pipeline.types import Inputs, Params, Statistics

SHORTEST = 1e-12  # a bag's squared length below which it is taken for empty


class TextConfig(Section):
    """A bag of embeddings and layers with ReLU; without layers the head sees the bag itself."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens",)

    name: Literal["text"]
    buckets: int = Field(default=8192, ge=2, le=2**24)  # rows of the embedding table, which hashed tokens share
    embedding: int | None = Field(default=128, ge=1)
    # units of a token's vector; null: a unit for each row of the table, with a weight (memory: texts x buckets)
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[])  # units per layer after the bag
    dropout: float = Field(default=0.0, ge=0, lt=1)  # share of an example's tokens left out, in meta-training
    start: Literal["random", "tfidf"] = "random"  # tfidf: rows are multiplied by their rarity in meta-training's texts
    center: bool = False  # bags get unit length and lose a learned vector, with start: tfidf at first their mean
    vectors: str | None = Field(default=None, min_length=1, examples=["glove.6B.100d.txt"])
    # a file of words' vectors that rows of the table start from: GloVe's text (.txt, .vec) or .safetensors by word

    @model_validator(mode="after")
    def _vectors_need_a_table(self) -> Self:
        if self.vectors is not None and self.embedding is None:
            raise ValueError("vectors are rows of the table, and embedding: null has none: set it to their length")
        return self

    @property
    def starts_from(self) -> str | None:
        """What pipeline.text_start makes the first parameters of, for the user; None: random ones."""
        told = [f"vectors: {self.vectors}"] if self.vectors else []
        return ", ".join(told + (["start: tfidf"] if self.start == "tfidf" else [])) or None

    def absolute(self) -> Self:
        """With an absolute path of the vectors: a run is resumed from any folder."""
        return self if self.vectors is None else self.model_copy(update={"vectors": absolute(self.vectors)})

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
    """Parameters: `embedding.weight` [buckets + 1, D], `center` [D] where asked for, `layer{i}.*` and the head's.

    Row 0 of the table is never read. With embedding: null it is [buckets + 1], and D is buckets.

    x are token numbers, int64 [T, N, L]; 0 is no token. An example without any is the zero vector.
    """

    kernel, precision = "pure", "float32"
    head = ("head.weight", "head.bias")

    def __init__(self, config: TextConfig, *, num_outputs: int, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        units = config.buckets if config.embedding is None else config.embedding
        self.sizes = [units, *config.hidden, num_outputs]
        self.cpu_task_chunk = 4 if config.embedding is None else None  # bags are wide: for memory's sake
        self.stochastic = config.dropout > 0
        self.constant_names: list[str] = []
        self.norm_layers: list[str] = []
        self._layers = [f"layer{i}" for i in range(1, len(config.hidden) + 1)]
        self.parameter_names = ["embedding.weight", "center"] if config.center else ["embedding.weight"]
        for name in (*self._layers, "head"):
            self.parameter_names += [f"{name}.weight", f"{name}.bias"]

    def init(self, seed: int) -> Params:
        """Normal embeddings of unit variance, or weights of one; a center of zeros; layers and head as in `MLP`."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.config.buckets + 1
        if self.config.embedding is None:
            table = torch.ones(rows, dtype=torch.float64)
        else:
            table = torch.empty(rows, self.config.embedding, dtype=torch.float64).normal_(generator=generator)
        table[PADDING] = 0
        params = {"embedding.weight": table}
        if self.config.center:
            params["center"] = torch.zeros(self.sizes[0], dtype=torch.float64)
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
        rows = self.rows(x)
        if keys is not None and self.stochastic:
            dropped = uniform(keys, x[0].numel()).view(x.shape) < self.config.dropout
            rows = rows.masked_fill(dropped, PADDING)
        h = self.bags(params["embedding.weight"], rows)
        number = (rows != PADDING).sum(dim=-1, keepdim=True)
        if self.config.center:  # a text without tokens stays zero: where it pointed otherwise would be chance
            h = unit_length(h) - (number > 0).to(self.dtype) * params["center"].unsqueeze(1)
        else:
            h = h * number.clamp_min(1).to(self.dtype).rsqrt()
        for name in self._layers:
            h = F.relu(affine(params, name, h))
        return h, {}

    def rows(self, x: Tensor) -> Tensor:
        """The rows of the table that token numbers share, from 1 on; 0 where there is no token."""
        return torch.where(x == 0, PADDING, 1 + (x - 1).remainder(self.config.buckets))

    def bags(self, table: Tensor, rows: Tensor) -> Tensor:
        """Row numbers [T, N, L] -> sums of rows [T, N, D]."""
        if self.config.embedding is not None:
            return bag(table, rows)
        counts = table.new_zeros(*rows.shape[:2], self.config.buckets + 1)
        counts = counts.scatter_add_(2, rows, torch.ones_like(rows, dtype=table.dtype))  # whole numbers: in any order
        return counts[..., 1:] * table[:, None, 1:]


def unit_length(bags: Tensor) -> Tensor:
    """[..., D] of length 1; zeros stay zeros. Its second derivative is finite there too, unlike F.normalize's."""
    return bags * bags.square().sum(dim=-1, keepdim=True).clamp_min(SHORTEST).rsqrt()
