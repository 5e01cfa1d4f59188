"""Whole classes as arrays: read, checked against the manifest, and made what a family gathers its episodes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.class_cache import private_array
from pipeline.tasks.shards.examples import ExamplesDigest

CONVERTED_AT_ONCE = 1024  # examples: what a conversion needs meanwhile is in no cache's account

Convert = Callable[[Any], np.ndarray]
"""Examples of a class as its reader gives them -> an array [examples, ...]."""


class ClassArrays:
    """Arrays [count, *shape] by class number; threads read at the same time.

    convert: makes rows of this shape and dtype of examples, an image or vector being one as it is stored.
    """

    def __init__(
        self, folder: str, manifest: shards.Manifest, *, shape: tuple[int, ...], dtype: str, convert: Convert
    ) -> None:
        self.manifest = manifest
        self.shape = shape  # of one example
        self.dtype = np.dtype(dtype)
        self._convert = convert
        self._reader = shards.ShardReader(folder, manifest, keep=False)

    def nbytes(self, number: int) -> int:
        """Of a class in memory, known before it is read."""
        return self.manifest.classes[number].count * math.prod(self.shape) * self.dtype.itemsize

    def read(self, number: int) -> np.ndarray:
        """Raises DataError: names the shard that cannot be read, or is not the manifest's."""
        rows = private_array((self.manifest.classes[number].count, *self.shape), self.dtype)
        digest, start = ExamplesDigest(), 0
        for part in self._reader.parts(number):
            digest.update(part)
            for first in range(0, len(part), CONVERTED_AT_ONCE):
                some = part[first : first + CONVERTED_AT_ONCE]
                self._put(number, start, some, rows[start : start + len(some)])
                start += len(some)
        if digest.hexdigest() != self.manifest.classes[number].sha256:
            raise DataError(
                f"{self._place(number)}: differs from the manifest's sha256. Restore these files, or prepare the data "
                "set again."
            )
        return rows

    def _put(self, number: int, first: int, examples: Any, rows: np.ndarray) -> None:
        """Examples of a class, from its example `first` on, into their rows."""
        rows[:] = self._convert(examples)

    def _place(self, number: int) -> str:
        entry = self.manifest.classes[number]
        files = dict.fromkeys(self.manifest.shards[group.shard].file for group in entry.row_groups)
        return f"{self._reader.folder}: class {entry.name} in {', '.join(files)}"
