"""scikit-learn's handwritten digits: 1797 drawings of ten classes, 8×8 pixels, which the library ships. No download.

Alpaydin, Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), its test set. A pixel counts the ink of a 4×4
block of the original, 0 to 16, so a drawing is small and grey all over: enlarged to 28×28 its strokes are wide and
soft. Ten classes are too few to be split: there is one class split, `all_test`, with every class in meta_test, for
models that were trained on other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import SourceOptions
from pipeline.types import Split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_INK = 16


class DigitsOptions(SourceOptions):
    """Of the digits."""

    size: int = Field(28, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Digits:
        return Digits(size=self.size)


class Digits(Source):
    """Raw classes by digit, in the order of the library's rows."""

    preprocessing: Preprocessing

    def __init__(self, *, size: int = 28) -> None:
        self.preprocessing = Preprocessing(kind="drawing", size=size)

    def classes(self) -> Iterator[RawClass]:
        _, labels = _shipped()
        for digit, name in enumerate(NAMES):
            yield RawClass(name, "all", np.flatnonzero(labels == digit).tolist())

    def read(self, items: Sequence[int]) -> tuple[np.ndarray, list[Problem]]:
        ink, _ = _shipped()
        images = np.empty((len(items), self.preprocessing.size, self.preprocessing.size, 1), np.uint8)
        for at, row in enumerate(items):
            images[at] = self.preprocessing(Image.fromarray((ink[row] * (255 / MOST_INK)).round().astype(np.uint8)))
        return images, []

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {"all_test": dict.fromkeys(NAMES, "meta_test")}


@lru_cache(maxsize=1)
def _shipped() -> tuple[np.ndarray, np.ndarray]:
    """Ink [1797, 8, 8] in 0…16, and the digits [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
