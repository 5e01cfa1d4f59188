"""Pictures that lie as rows of large arrays: what MNIST, CIFAR and their kin share.

Shapes: N rows · H W C of one picture.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Problem, RawClass, Source

ITEM_BYTES = 64 << 10  # of the pictures that an item stands for: processes read dozens of items at once


class Rows(NamedTuple):
    """Some rows of one of a source's arrays."""

    part: str  # "train", "test", …
    numbers: tuple[int, ...]
    file: Path  # of the array: an interrupted preparation does not go on with another one


class ArraySource(Source):
    """A source whose pictures are rows of uint8 arrays [N, H, W] or [N, H, W, C]."""

    preprocessing: Preprocessing
    labels: Mapping[str, np.ndarray]  # of each part, int [N]: indices into `names`
    files: Mapping[str, Path]  # the same, where its pictures lie
    names: Sequence[str]  # of the classes
    groups: Sequence[str]  # of each of them

    @abstractmethod
    def pictures(self, part: str) -> np.ndarray:
        """A part's array, in any process. Raises DataError."""

    def classes(self) -> Iterator[RawClass]:
        size, channels = self.preprocessing.size, self.preprocessing.channels
        at_once = max(1, ITEM_BYTES // (size * size * channels))
        for number, (name, group) in enumerate(zip(self.names, self.groups, strict=True)):
            items = [
                Rows(part, tuple(rows[start : start + at_once].tolist()), self.files[part])
                for part, rows in ((part, np.flatnonzero(labels == number)) for part, labels in self.labels.items())
                for start in range(0, len(rows), at_once)
            ]
            yield RawClass(name, group, items)

    def read(self, items: Sequence[Rows]) -> tuple[np.ndarray, list[Problem]]:
        size, channels = self.preprocessing.size, self.preprocessing.channels
        images = np.empty((sum(len(item.numbers) for item in items), size, size, channels), np.uint8)
        at = 0
        for part, numbers, _ in items:
            array = self.pictures(part)
            for number in numbers:
                images[at] = self.preprocessing(Image.fromarray(np.asarray(array[number])))
                at += 1
        return images, []
