"""torchvision's FakeData: pictures of noise, for a first try of a configuration. There is nothing to learn in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import SourceOptions
from pipeline.datasets.splits import random_split
from pipeline.types import Split


class FakeOptions(SourceOptions):
    """Of the noise."""

    classes: int = Field(50, ge=3, le=10_000, description="Number of classes.")
    per_class: int = Field(20, ge=2, le=10_000, description="Examples per class, on average: labels are random.")
    size: int = Field(32, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Fake:
        return Fake(classes=self.classes, per_class=self.per_class, size=self.size, seed=seed)


class Fake(Source):
    """`torchvision.datasets.FakeData` by class. An example is a function of (seed, its number, size)."""

    preprocessing: Preprocessing

    def __init__(self, *, classes: int, per_class: int, size: int, seed: int) -> None:
        self.preprocessing = Preprocessing(kind="photo", size=size, channels=3)
        self._classes, self._examples, self._seed = classes, classes * per_class, seed

    def _data(self) -> Any:
        from torchvision.datasets import FakeData

        size = self.preprocessing.size
        offset = self._seed * self._examples  # it seeds each example by its number
        return FakeData(self._examples, (3, size, size), self._classes, random_offset=offset)

    def classes(self) -> Iterator[RawClass]:
        members: list[list[int]] = [[] for _ in range(self._classes)]
        data = self._data()
        for number in range(self._examples):
            members[data[number][1]].append(number)
        for name, numbers in zip(self._names(), members, strict=True):
            yield RawClass(name, "all", numbers)

    def read(self, items: Sequence[int]) -> tuple[np.ndarray, list[Problem]]:
        data = self._data()
        images = [self.preprocessing(data[number][0]) for number in items]
        size = self.preprocessing.size
        return np.stack(images) if images else np.empty((0, size, size, 3), np.uint8), []

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {"random": random_split(self._names(), seed=seed, shares=(60, 20, 20))}

    def _names(self) -> list[str]:
        return [f"fake{number:0{len(str(self._classes - 1))}d}" for number in range(self._classes)]
