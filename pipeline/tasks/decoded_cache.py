"""Decoded classes on this machine's disk, at most so many bytes of them, for later windows, workers and runs.

    FOLDER/KEY.decoded      sha256 of the pixels (32 bytes), then the pixels

A key is of what is decoded and of how. A file appears whole or not at all; one that is damaged counts as absent. What
was not used for longest goes first. Several processes may share a folder. It only saves time: where it cannot be
written, nothing is kept, and a warning says so once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pipeline.tasks.class_cache import private_array

SUFFIX, PARTIAL = ".decoded", ".partial"
DIGEST_BYTES = 32
ABANDONED_SECONDS = 3600  # a file that is being written is younger

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`metapipe/decoded` in the user's cache folder: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metapipe" / "decoded"


class DecodedCache:
    """Arrays of uint8 by key (hexadecimal). limit: bytes of files."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.hits = 0
        self._warned = False

    def get(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """What was put under a key; None: nothing, or nothing whole."""
        file = self.folder / (key + SUFFIX)
        pixels = private_array(shape)
        digest = bytearray(DIGEST_BYTES)
        try:
            with file.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                whole = size == DIGEST_BYTES + pixels.nbytes
                whole = whole and stream.readinto(digest) == DIGEST_BYTES and _filled(stream, pixels)
            if not whole or hashlib.sha256(pixels.data).digest() != digest:
                file.unlink()
                return None
            os.utime(file)  # when it was used last
        except OSError:
            return None
        self.hits += 1
        return pixels

    def put(self, key: str, pixels: np.ndarray) -> None:
        """Keep an array, in the place of those that were not used for longest."""
        size = DIGEST_BYTES + pixels.nbytes
        if size > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._make_room(size)
                descriptor, name = tempfile.mkstemp(suffix=PARTIAL, dir=self.folder)
                try:
                    with os.fdopen(descriptor, "wb") as stream:
                        stream.write(hashlib.sha256(pixels.data).digest())
                        stream.write(pixels.data)
                    os.replace(name, self.folder / (key + SUFFIX))
                except BaseException:
                    os.unlink(name)
                    raise
        except OSError as error:
            if not self._warned:
                log.warning("%s: decoded images cannot be kept (%s); they are decoded again.", self.folder, error)
            self._warned = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, or two of them would make room for one."""
        with (self.folder / "lock").open("a") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(SUFFIX):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(PARTIAL) and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    os.unlink(entry.path)
        total = sum(each for _, each, _ in files)
        for _, each, path in sorted(files):
            if total + size <= self.limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= each


def _filled(stream: object, pixels: np.ndarray) -> bool:
    """Read until the array is full: one call reads 2 GiB at most."""
    rest = pixels.data.cast("B")
    while len(rest):
        read = stream.readinto(rest)  # type: ignore[attr-defined]
        if not read:
            return False
        rest = rest[read:]
    return True
