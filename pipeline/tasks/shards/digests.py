"""sha256 of files."""

from __future__ import annotations

import hashlib

from pipeline.storage import Location, ObjectPath

HASH_BYTES = 8 << 20  # read at once while hashing


def file_sha256(file: Location) -> str:
    with file.open_input() if isinstance(file, ObjectPath) else file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(HASH_BYTES):
            digest.update(block)
        return digest.hexdigest()
