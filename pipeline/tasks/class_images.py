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

import numpy as np

from pipeline.config import validate
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import shards
from pipeline.tasks.class_cache import private_array
from pipeline.tasks.decoded_cache import DecodedCache
from pipeline.tasks.shards.examples import ExamplesDigest

DECODING = 1  # raised where the same file becomes other pixels


class ClassImages:
    """Images by class number; threads read at the same time. decoded: where decoded classes are kept; None: nowhere."""

    def __init__(self, folder: str, manifest: shards.Manifest, decoded: DecodedCache | None = None) -> None:
        """Raises DataError: picture files without the preprocessing that makes them images of one size."""
        self.manifest = manifest
        self._reader = shards.ShardReader(folder, manifest, keep=False)
        self._decoded = decoded
        self._preprocessing: Preprocessing | None = None
        if manifest.modality == "encoded_image":
            self._preprocessing = _preprocessing(folder, manifest)

    def nbytes(self, number: int) -> int:
        return self.manifest.classes[number].count * self.manifest.image_bytes

    def read(self, number: int) -> np.ndarray:
        """uint8 [count, H, W, C]. Raises DataError: names the shard that cannot be read, or is not the manifest's."""
        shape = (self.manifest.classes[number].count, *self.manifest.shape)
        if self._preprocessing is None:
            images = private_array(shape)
            self._fill(number, images)
            return images
        key = self._key(number)
        kept = self._decoded.get(key, shape) if self._decoded else None
        if kept is not None:
            return kept
        images = private_array(shape)
        self._fill(number, images)
        if self._decoded:
            self._decoded.put(key, images)
        return images

    def _fill(self, number: int, images: np.ndarray) -> None:
        digest, start = ExamplesDigest(), 0
        for part in self._reader.parts(number):
            digest.update(part)
            for place, example in enumerate(part, start):
                images[place] = example if self._preprocessing is None else self._decode(number, place, example)
            start += len(part)
        if digest.hexdigest() != self.manifest.classes[number].sha256:
            raise DataError(
                f"{self._place(number)}: differs from the manifest's sha256. Restore these files, or prepare the data "
                "set again."
            )

    def _decode(self, number: int, place: int, file: bytes) -> np.ndarray:
        assert self._preprocessing is not None
        return self._preprocessing(decode_picture(io.BytesIO(file), name=f"{self._place(number)}, example {place}"))

    def _place(self, number: int) -> str:
        entry = self.manifest.classes[number]
        files = dict.fromkeys(self.manifest.shards[group.shard].file for group in entry.row_groups)
        return f"{self._reader.folder}: class {entry.name} in {', '.join(files)}"

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
