"""sha256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.storage import Readable

HASH_BYTES = 8 << 20  # read at once while hashing


def file_sha256(file: Readable) -> str:
    with file.open("rb") if isinstance(file, Path) else file.open_input() as stream:
        digest = hashlib.sha256()
        while block := stream.read(HASH_BYTES):
            digest.update(block)
        return digest.hexdigest()
