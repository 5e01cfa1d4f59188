"""Classification episodes from the rows of a table, or from vectors (features of a pretrained encoder), in shards.

Shapes: T tasks · S support · Q query examples · D columns · F inputs of the network.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.tasks import shards
from pipeline.tasks.classes import ClassTasks, ClassTasksConfig
from pipeline.tasks.sampler import EpisodeIndices
from pipeline.tasks.shapes import UnequalEpisodes
from pipeline.tasks.tables import MatchedColumns, Normalize, TableEncoding
from pipeline.types import Inputs, Split

ROWS_PER_CLASS = 256  # first ones of each class of meta-training, which its statistics are of
MOST_CLASSES = 256  # about; of more, so many from all over the list: a set of any size is begun with at once


class TabularTasksConfig(ClassTasksConfig):
    """N-way K-shot classification of rows."""

    family: Literal["tabular"]
    split: str = "random"  # which of the data set's class splits
    normalize: Normalize = "support"
    # numeric columns, by the mean and deviation of the task's support set, or of meta-training; or not at all
    prior_examples: float = Field(default=1.0, ge=0)
    # normalize: support draws its statistics towards meta-training's, as if so many rows of it were in the support set

    def build(self, *, device: torch.device, dtype: torch.dtype) -> TabularTasks:
        return TabularTasks(self, device=device, dtype=dtype)


class TabularTasks(ClassTasks):
    """Task family: x are normalized numbers, masks of missing values and categories, [F]."""

    inputs: Inputs = "vectors"
    modalities = ("vector",)
    config: TabularTasksConfig

    def __init__(self, config: TabularTasksConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self._rows = self._row_store(np.asarray, self.manifest.shape, "float32")
        self.use(self._encoding())

    def _example_bytes(self) -> int:
        return 4 * len(self.manifest.columns)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.encoding.model_dump(mode="json")

    def _encoding(self) -> TableEncoding:
        """With the statistics of meta-training, over the first rows of its classes."""
        members = self._members["meta_train"].tolist()
        members = members[:: -(-len(members) // MOST_CLASSES) or 1]
        numeric = [i for i, column in enumerate(self.manifest.columns) if column.kind == "numeric"]
        number, mean, spread = np.zeros((3, len(numeric)))
        with shards.ShardReader(self.config.data, self.manifest) as reader:
            for class_id in members:
                count = min(self.manifest.classes[class_id].count, ROWS_PER_CLASS)
                rows = np.asarray(reader.read_class(class_id, np.arange(count)), dtype=np.float64)[:, numeric]
                there = ~np.isnan(rows)
                more = there.sum(axis=0)
                own = np.where(there, rows, 0).sum(axis=0) / np.maximum(more, 1)
                share = more / np.maximum(number + more, 1)
                apart = own - mean
                spread += np.square(np.where(there, rows - own, 0)).sum(axis=0) + apart**2 * number * share
                mean += apart * share
                number += more
        return TableEncoding(
            columns=self.manifest.columns,
            normalize=self.config.normalize,
            prior_examples=self.config.prior_examples,
            mean=mean.tolist(),
            variance=(spread / np.maximum(number, 1)).tolist(),
        )

    def use(self, encoding: TableEncoding) -> None:
        """Make inputs as a model was trained on: its columns, found by their names, and its categories by theirs.

        Raises DataError: a column is missing or of another kind.
        """
        columns = self.manifest.columns
        self._matched = MatchedColumns(columns, encoding.columns, source=self.config.data, device=self.device)
        self.encoding = encoding
        self.input_shape = (encoding.width,)

    @property
    def unknown_categories(self) -> dict[str, list[str]]:
        """Column -> those of its categories that the encoding does not know, which count as missing."""
        return self._matched.unknown

    def _inputs(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        support, query = map(self._matched, self._raw(split, indices))
        scale = self.encoding.scale(support)
        return self.encoding(support, scale), self.encoding(query, scale)

    def rows(self, split: Split, step: int, slots: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """The episodes' rows as they are stored, of fixed shapes: support [T, S, D] and query [T, Q, D]."""
        return self._raw(split, self._indices(split, step, slots, seed=seed))

    def _raw(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        support, query = self._gathered(self._rows, split, indices)
        return support.to(self.dtype), query.to(self.dtype)
