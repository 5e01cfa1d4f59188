"""Rows of a table -> what a network takes. Training and serving use the same code.

A row is D numbers: numeric ones, NaN where a value is missing, and codes of categories. Numeric columns are normalized
by the statistics of the task's own support set, so that a task measured in other units is the same task; a missing
value is the support set's mean and a column of its own says so; a category is one of several columns, of which an
unknown or missing one has none.

A support set of a few rows says little about how much a column varies, and nothing where all of it is missing or the
same. So its mean and variance are drawn towards those of meta-training, as if it had shown `prior_examples` rows more.

Shapes: N rows · D columns · M numeric ones · F inputs of the network; any leading axes (tasks).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Section
from pipeline.errors import DataError
from pipeline.tasks.shards.manifest import Column

MOST_DEVIATIONS = 5.0  # that a normalized number is from 0: a column that hardly varied must not drown the others
Normalize = Literal["support", "training", "none"]


class Scale(NamedTuple):
    """What numeric columns are shifted and divided by: [..., 1, M] each."""

    mean: Tensor
    deviation: Tensor


class TableEncoding(Section):
    """Columns, and how they become inputs."""

    kind: Literal["table"] = "table"
    columns: list[Column] = Field(min_length=1)  # D
    normalize: Normalize
    prior_examples: float = Field(ge=0)
    mean: list[float]  # of the numeric columns, over meta-training
    variance: list[float]

    @model_validator(mode="after")
    def _statistics_of_numeric_columns(self) -> TableEncoding:
        if not len(self.mean) == len(self.variance) == len(self.numeric):
            raise ValueError(f"mean and variance should have {len(self.numeric)} entries, one per numeric column")
        return self

    @property
    def numeric(self) -> list[int]:
        """The numbers of the numeric columns."""
        return [i for i, column in enumerate(self.columns) if column.kind == "numeric"]

    @property
    def width(self) -> int:
        """F: numeric columns, a mask of each that may miss values, and the categories of the others."""
        categories = sum(len(column.categories) for column in self.columns)
        return len(self.numeric) + len(self._may_miss()) + categories

    def scale(self, support: Tensor) -> Scale:
        """From the support rows [..., N, D]."""
        values = support[..., self.numeric]
        mean, variance = (
            torch.tensor(numbers, dtype=values.dtype, device=values.device) for numbers in (self.mean, self.variance)
        )
        if self.normalize == "none":
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        elif self.normalize == "support":
            there = ~values.isnan()
            number = there.sum(dim=-2, keepdim=True)
            total = number + self.prior_examples
            weight = torch.where(
                total > 0, number / total.clamp_min(1e-12), 0
            )  # of the support set; 0 where it is mute
            own = values.nan_to_num(0).sum(dim=-2, keepdim=True) / number.clamp_min(1)
            spread = torch.where(there, values - own, 0).square().sum(dim=-2, keepdim=True) / number.clamp_min(1)
            apart = weight * (1 - weight) * (own - mean).square()  # of two groups with these means
            variance = weight * spread + (1 - weight) * variance + apart
            mean = weight * own + (1 - weight) * mean
        deviation = variance.sqrt()
        return Scale(mean, torch.where(deviation > 0, deviation, 1))

    def __call__(self, rows: Tensor, scale: Scale) -> Tensor:
        """Rows [..., N, D] -> inputs [..., N, F]: numeric columns, masks (1: missing), categories."""
        values = (rows[..., self.numeric] - scale.mean) / scale.deviation
        if self.normalize != "none":
            values = values.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        parts = [values.nan_to_num(0), rows[..., self._may_miss()].isnan().to(rows.dtype)]
        for number, column in enumerate(self.columns):
            if column.kind == "categorical":
                codes = torch.arange(len(column.categories), device=rows.device)
                parts.append((rows[..., number : number + 1] == codes).to(rows.dtype))
        return torch.cat(parts, dim=-1)

    def _may_miss(self) -> list[int]:
        return [i for i in self.numeric if self.columns[i].missing]


class MatchedColumns:
    """Rows of a table as those of another: its columns by their names, its categories by theirs.

    What the other table has not is left out: columns, and categories, which count as missing.
    """

    def __init__(
        self, columns: Sequence[Column], wanted: Sequence[Column], *, source: str, device: torch.device
    ) -> None:
        """Of rows with `columns`, of the data set `source` on a device, to rows with `wanted`.

        Raises DataError: a wanted column is not there, or is of another kind.
        """
        places = {column.name: place for place, column in enumerate(columns)}
        absent = [column.name for column in wanted if column.name not in places]
        if absent:
            raise DataError(
                f"{source}: has no {_listed('column', absent)}, which the model was trained with; it has: "
                f"{_some(places)}. Prepare the data set with the model's columns, under their names."
            )
        own = [columns[places[column.name]] for column in wanted]
        for ours, theirs in zip(own, wanted, strict=True):
            if ours.kind != theirs.kind:
                raise DataError(
                    f"{source}: column {ours.name!r} is {_kind(ours)} here, and {_kind(theirs)} where the model was "
                    f"trained. Prepare the data set with --{theirs.kind} {ours.name}."
                )
        self.unknown: dict[str, list[str]] = {}
        """Column -> its categories that the wanted ones have not."""
        order = [places[column.name] for column in wanted]
        self._order = None if order == list(range(len(columns))) else torch.tensor(order, device=device)
        self._codes: dict[int, Tensor] = {}  # number of a column -> [own categories + 1], the last for a missing value
        for number, (ours, theirs) in enumerate(zip(own, wanted, strict=True)):
            if ours.categories == theirs.categories:
                continue
            known = {name: float(code) for code, name in enumerate(theirs.categories)}
            codes = [*(known.get(name, torch.nan) for name in ours.categories), torch.nan]
            self._codes[number] = torch.tensor(codes, device=device)
            if unknown := [name for name in ours.categories if name not in known]:
                self.unknown[ours.name] = unknown

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., N, columns] -> [..., N, wanted columns]."""
        if self._order is not None:
            rows = rows.index_select(-1, self._order)
        elif self._codes:
            rows = rows.clone()
        for number, codes in self._codes.items():
            values = rows[..., number]
            missing = len(codes) - 1
            known = torch.where((values >= 0) & (values < missing), values, missing)  # NaN is neither
            rows[..., number] = codes[known.long()].to(rows.dtype)
        return rows


def _kind(column: Column) -> str:
    return f"{column.kind} ({_some(column.categories)})" if column.categories else column.kind


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{what}{'s' if len(names) > 1 else ''} {_some([repr(name) for name in names])}"


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:10]) + (", …" if len(names) > 10 else "")
