"""Zip archives of somebody else's making: an entry is read only if what it says of itself is harmless.

An archive of a few kilobytes can hold entries of gigabytes. Each entry's declared size bounds what is read of it
(`zipfile` stops there and then finds that the checksum differs), so the checks below need no decompression.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from pipeline.errors import DataError

MAX_ENTRIES = 1_000_000
MAX_ENTRY_BYTES = 64 << 20  # decompressed; a picture file
MAX_RATIO = 100  # decompressed / compressed; pictures are compressed already, deflate's limit is about 1000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others, LZMA takes memory by its header's word
FETCH_AGAIN = "Fetch the archive again, or extract it with a tool you trust and give the folder"


class PictureArchive:
    """A zip archive of pictures, for reading."""

    def __init__(self, path: Path) -> None:
        """Raises DataError: not a zip archive, or one with more than MAX_ENTRIES entries."""
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path}: not a readable zip archive ({error}). Fetch it again.") from error
        if len(self._zip.filelist) > MAX_ENTRIES:
            count = len(self._zip.filelist)
            self.close()
            raise DataError(f"{path}: holds {count} entries, more than the {MAX_ENTRIES} that are read. {FETCH_AGAIN}.")

    def __enter__(self) -> PictureArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()

    def names(self) -> list[str]:
        return self._zip.namelist()

    def read(self, name: str) -> bytes:
        """An entry's bytes. Raises DataError: damaged, encrypted, too large, or compressed too well to be a picture."""
        entry = self._zip.getinfo(name)
        refusal = _refusal(entry)
        if refusal:
            raise DataError(f"{self.path}: {name} {refusal}, so it is not read. {FETCH_AGAIN}.")
        try:
            with self._zip.open(entry) as stream:
                # not `read()`: that decompresses whatever is there before it looks at the declared size
                return stream.read(entry.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error}). Fetch the archive again.") from error


def _refusal(entry: zipfile.ZipInfo) -> str | None:
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.compress_type not in METHODS:
        return f"is compressed with method {entry.compress_type}, which is neither stored nor deflated"
    if entry.file_size > MAX_ENTRY_BYTES:
        return f"would be {entry.file_size >> 20} MiB, more than the {MAX_ENTRY_BYTES >> 20} MiB of a picture file"
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        return f"would be {entry.file_size // max(entry.compress_size, 1)} times as large decompressed"
    return None
