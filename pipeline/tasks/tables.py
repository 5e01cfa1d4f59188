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

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Section
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
