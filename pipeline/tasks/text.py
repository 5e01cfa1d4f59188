"""Text classification episodes from Parquet shards: sentences, cut into hashed tokens.

A data set whose token numbers fit into memory is cut once, when the family is built; of a larger one each episode's
sentences are read and cut when they are drawn, one step ahead, or, with windows, each class when it is read.

Shapes: T tasks · S support · Q query examples · L max_tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks import shards
from pipeline.tasks.classes import ClassTasks, ClassTasksConfig
from pipeline.tasks.sampler import EpisodeIndices
from pipeline.tasks.shapes import UnequalEpisodes
from pipeline.tasks.tokens import Tokens
from pipeline.types import Inputs, Split

TEXTS_AT_ONCE = 4096  # whose tokens are counted
NUMBER_BYTES = 4  # of a token number in memory


class TextTasksConfig(ClassTasksConfig):
    """N-way K-shot classification of texts."""

    family: Literal["text"]
    split: str = "random"  # which of the data set's class splits
    tokens: Tokens = Tokens()  # what a text is cut into

    def build(self, *, device: torch.device, dtype: torch.dtype) -> TextTasks:
        return TextTasks(self, device=device, dtype=dtype)


class TextTasks(ClassTasks):
    """Task family: x are token numbers, int64 [L]; 0 where a text has no more of them."""

    inputs: Inputs = "tokens"
    modalities = ("text",)
    config: TextTasksConfig

    def __init__(self, config: TextTasksConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.input_shape = (config.tokens.max_tokens,)
        self._rows = self._row_store(partial(_numbers, config.tokens), self.input_shape, "int32")

    def _example_bytes(self) -> int:
        return self.config.tokens.max_tokens * NUMBER_BYTES

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.config.tokens.model_dump(mode="json")

    def texts(self, split: Split) -> Iterator[Tensor]:
        """The token numbers [L] of each text of a part."""
        for class_id, count in zip(self._members[split], self._counts[split].tolist(), strict=True):
            rows = torch.arange(count, device=class_id.device).view(1, 1, -1)
            yield from self._rows.gather(class_id.view(1, 1), rows)[0, 0]

    def sentences(self, split: Split, step: int, slots: Tensor, *, seed: int) -> list[tuple[list[str], list[str]]]:
        """The episodes' texts as they are stored, of fixed shapes: S of support and Q of query for each task."""
        indices = self._indices(split, step, slots, seed=seed)
        classes = self._members[split][indices.classes].tolist()
        with shards.ShardReader(self.config.data, self.manifest) as reader:

            def of_task(classes: list[int], rows: list[list[int]]) -> list[str]:
                return [str(text) for c, r in zip(classes, rows, strict=True) for text in reader.read_class(c, r)]

            rows = zip(classes, indices.support.tolist(), indices.query.tolist(), strict=True)
            return [(of_task(c, support), of_task(c, query)) for c, support, query in rows]

    def _inputs(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        support, query = self._gathered(self._rows, split, indices)
        return support.long(), query.long()


def _numbers(tokens: Tokens, texts: list[str]) -> np.ndarray:
    """int32 [texts, L]."""
    return tokens(texts).astype(np.int32)


class Rarity:
    """log((1 + n) / (1 + d)) + 1 of a token in d of n texts, as in scikit-learn's TfidfVectorizer."""

    def __init__(self, texts: Iterable[Tensor]) -> None:
        """texts: token numbers [L] each."""
        self._number = 0
        self._tokens = self._texts = torch.zeros(0, dtype=torch.int64)  # which there are; how many texts have each
        texts = iter(texts)
        while some := [numbers.unique() for numbers in itertools.islice(texts, TEXTS_AT_ONCE)]:
            new, seen = torch.cat(some).unique(return_counts=True)
            counts = torch.cat([self._texts, seen])
            self._tokens, back = torch.cat([self._tokens, new]).unique(return_inverse=True)
            self._texts = torch.zeros(len(self._tokens), dtype=torch.int64).index_add_(0, back, counts)
            self._number += len(some)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[V] -> float64 [V]."""
        place = torch.searchsorted(self._tokens, tokens).clamp_max(len(self._tokens) - 1)
        texts = torch.where(self._tokens[place] == tokens, self._texts[place], 0)
        return torch.log((1 + self._number) / (1 + texts.to(torch.float64))) + 1
