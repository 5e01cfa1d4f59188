"""Classification episodes from the rows of a table, or from vectors (features of a pretrained encoder), in shards.

Shapes: T tasks · S support · Q query examples · D columns · F inputs of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.tasks import shards
from pipeline.tasks.classes import ClassTasks, ClassTasksConfig
from pipeline.tasks.sampler import EpisodeIndices
from pipeline.tasks.shapes import UnequalEpisodes
from pipeline.tasks.shards.manifest import Column
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


class Moments(NamedTuple):
    """Of a numeric column over some rows."""

    rows: float  # that have a value
    mean: float
    variance: float


class TabularTasks(ClassTasks):
    """Task family: x are normalized numbers, masks of missing values and categories, [F]."""

    inputs: Inputs = "vectors"
    modalities = ("vector",)
    config: TabularTasksConfig

    def __init__(self, config: TabularTasksConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self._rows = self._row_store(np.asarray, self.manifest.shape, "float32")
        self.moments = self._moments()
        self.use(joint_encoding({config.data: self}, [1.0]))

    def _example_bytes(self) -> int:
        return 4 * len(self.manifest.columns)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.encoding.model_dump(mode="json")

    def _moments(self) -> dict[str, Moments]:
        """Of the numeric columns, over the first rows of meta-training's classes."""
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
        variance = spread / np.maximum(number, 1)
        names = [self.manifest.columns[i].name for i in numeric]
        found = zip(number.tolist(), mean.tolist(), variance.tolist(), strict=True)
        return {name: Moments(*moments) for name, moments in zip(names, found, strict=True)}

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


def joint_encoding(sets: Mapping[str, TabularTasks], weights: Sequence[float]) -> TableEncoding:
    """What a model trained on sets of the same columns has: all their categories, and the statistics of their mixture.

    A set's rows count by its weight; one that has no value of a column says nothing of it. Columns and categories are
    in the first set's order, more categories after them.

    Raises ConfigError: sets that differ in columns, `normalize` or `prior_examples`.
    """
    (first, model), *others = sets.items()
    for name, family in others:
        _check_columns(first, model.manifest.columns, name, family.manifest.columns)
        for key in ("normalize", "prior_examples"):
            ours, theirs = getattr(family.config, key), getattr(model.config, key)
            if ours != theirs:
                raise ConfigError(
                    f"task.sets: {key} is {theirs} in {first} and {ours} in {name}; one model makes its inputs in one "
                    f"way. Give both the same {key}."
                )
    columns = []
    named = [{column.name: column for column in family.manifest.columns} for family in sets.values()]
    for column in model.manifest.columns:
        same = [by_name[column.name] for by_name in named]
        categories = list(dict.fromkeys(category for each in same for category in each.categories))
        missing = any(each.missing for each in same)
        columns.append(column.model_copy(update={"categories": categories, "missing": missing}))
    moments = [
        _mixed([family.moments[column.name] for family in sets.values()], weights)
        for column in columns
        if column.kind == "numeric"
    ]
    return TableEncoding(
        columns=columns,
        normalize=model.config.normalize,
        prior_examples=model.config.prior_examples,
        mean=[each.mean for each in moments],
        variance=[each.variance for each in moments],
    )


def _check_columns(first: str, columns: Sequence[Column], name: str, others: Sequence[Column]) -> None:
    """Raises ConfigError: a column that only one set has, or of another kind in the other."""
    kinds, other_kinds = ({column.name: column.kind for column in each} for each in (columns, others))
    for one, only in ((first, kinds.keys() - other_kinds.keys()), (name, other_kinds.keys() - kinds.keys())):
        if only:
            names = ", ".join(map(repr, sorted(only)[:10])) + (", …" if len(only) > 10 else "")
            raise ConfigError(
                f"task.sets: of {first} and {name} only {one} has the columns {names}; a column must mean the same in "
                "all sets. Prepare the data sets with the same columns (--features, --leave-out)."
            )
    for column, kind in kinds.items():
        if kind != other_kinds[column]:
            raise ConfigError(
                f"task.sets: column {column!r} is {kind} in {first} and {other_kinds[column]} in {name}. Prepare both "
                f"with --numeric {column} or both with --categorical {column}."
            )


def _mixed(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Of rows that are drawn from several sets by their weights."""
    shares = [weight * (each.rows > 0) for weight, each in zip(weights, moments, strict=True)]
    total = sum(shares) or 1.0
    shares = [share / total for share in shares]
    mean = sum(share * each.mean for share, each in zip(shares, moments, strict=True))
    variance = sum(
        share * (each.variance + (each.mean - mean) ** 2) for share, each in zip(shares, moments, strict=True)
    )
    return Moments(sum(each.rows for each in moments), mean, variance)
