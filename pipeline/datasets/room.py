"""Room on the disk: taken before the work where its size is known, and what to say when there is none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import Unfinished

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, a quota, the largest file of a user or disk


def reserve(descriptor: int, size: int) -> None:
    """Have a file's next `size` bytes on the disk, so that writing them cannot fill it. Raises OSError: no room.

    A file system that knows no reservation is asked how much is free, which may change until it is written.
    """
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        free = os.fstatvfs(descriptor)
        if free.f_bavail * free.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


@contextlib.contextmanager
def told(folder: Path, needed: Callable[[], int | None], *, what: str) -> Iterator[None]:
    """A full disk in the block becomes an Unfinished that says what to do.

    needed: bytes that were wanted in the folder, as far as they are known. what: there was no room for.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        size = needed()
        wanted = f"about {shown(size)} are needed and " if size is not None else ""
        raise Unfinished(
            f"{folder}: no room for {what} ({os.strerror(error.errno)}; {wanted}{shown(_free(folder))} are free). Make "
            "room on that disk and run the same command again to go on, or choose an --out on a larger one (where it "
            "is an object store: set XDG_CACHE_HOME to a folder on a larger one)."
        ) from error


def shown(size: int) -> str:
    """Bytes as people read them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
