"""Whole classes as uint8 images: read, checked against the manifest, and decoded where they are picture files.

Pictures are decoded by threads: Pillow gives up the interpreter's lock while it decodes and scales, and what they
decode need not travel. Two threads decode more than two processes (293 and 253 JPEGs of 500 pixels a second, 213 one
after another, on a busy machine); beside a loop of small operators a process disturbs it less (125 and 100 thousand a
second).
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np

from pipeline.config import validate
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import shards
from pipeline.tasks.class_arrays import ClassArrays
from pipeline.tasks.decoded_cache import DecodedCache

DECODING = 1  # raised where the same file becomes other pixels


class ClassImages(ClassArrays):
    """Images uint8 [count, H, W, C]. decoded: where decoded classes are kept; None: nowhere."""

    def __init__(self, folder: str, manifest: shards.Manifest, decoded: DecodedCache | None = None) -> None:
        """Raises DataError: picture files without the preprocessing that makes them images of one size."""
        super().__init__(folder, manifest, shape=manifest.shape, dtype="uint8", convert=np.asarray)
        self._decoded = decoded
        self._preprocessing: Preprocessing | None = None
        if manifest.modality == "encoded_image":
            self._preprocessing = _preprocessing(folder, manifest)

    def read(self, number: int) -> np.ndarray:
        """See `ClassArrays.read`. Raises DataError also where a picture is none."""
        if self._preprocessing is None or self._decoded is None:
            return super().read(number)
        key = self._key(number)
        images = self._decoded.get(key, (self.manifest.classes[number].count, *self.shape))
        if images is None:
            images = super().read(number)
            self._decoded.put(key, images)
        return images

    def _put(self, number: int, first: int, examples: Any, rows: np.ndarray) -> None:
        if self._preprocessing is None:
            super()._put(number, first, examples, rows)
            return
        for place, file in enumerate(examples):
            name = f"{self._place(number)}, example {first + place}"
            rows[place] = self._preprocessing(decode_picture(io.BytesIO(file), name=name))

    def _key(self, number: int) -> str:
        """Of the files of a class, in order, and of how they are decoded."""
        how = json.dumps([DECODING, self.manifest.preprocessing], sort_keys=True)
        return hashlib.sha256(f"{self.manifest.classes[number].sha256} {how}".encode()).hexdigest()


def _preprocessing(folder: str, manifest: shards.Manifest) -> Preprocessing:
    try:
        preprocessing = validate(Preprocessing, manifest.preprocessing, source=f"{folder}/{shards.MANIFEST}")
    except ConfigError as error:
        raise DataError(f"{error} Its pictures need it (kind, size, channels). Prepare the data set again.") from None
    made = (preprocessing.size, preprocessing.size, preprocessing.channels)
    if made != manifest.shape:
        raise DataError(
            f"{folder}/{shards.MANIFEST}: its preprocessing makes images of {made}, and its shape is {manifest.shape}. "
            "Prepare the data set again."
        )
    return preprocessing
