"""sha256 of files, and of what is in them."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.storage import Location, ObjectPath

HASH_BYTES = 8 << 20  # read at once while hashing


def pixels_sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def file_sha256(file: Location) -> str:
    with file.open_input() if isinstance(file, ObjectPath) else file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(HASH_BYTES):
            digest.update(block)
        return digest.hexdigest()
