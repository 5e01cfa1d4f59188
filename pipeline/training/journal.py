"""The metrics journal: rank 0 appends every step's metrics to a file; the driver follows it.

So no metric is lost to a reporting interval, a slow tracking server holds nothing up, and what a killed run had
measured is still there. A resumed run drops the lines after its checkpoint and writes them again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline.files import write_atomically

FLUSH_SECONDS = 0.5


class JournalWriter:
    """Rank 0's end: one record per outer step, in the file within about half a second.

    A record is {"step": …, "time": milliseconds since 1970, metric: value, …}.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Keeps the records up to `resume_step` and drops the rest (and a line cut short by a kill)."""
        records = [record for record in read(path) if record["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
        self._stream = path.open("a")
        self._flushed = time.monotonic()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, step: int, metrics: dict[str, float]) -> None:
        record = {"step": step, "time": time.time_ns() // 1_000_000, **metrics}
        self._stream.write(json.dumps(record) + "\n")
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system; call it with every checkpoint and at the end."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._stream.close()


class JournalReader:
    """The driver's end: `new_records()` returns what has come since the last call, each step's record once."""

    def __init__(self, path: Path, *, after_step: int = -1) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None
        self._seen_step = after_step  # up to here everything has been delivered

    def new_records(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                if inode != self._inode:  # replaced by a resumed run: read again, pass over what was seen
                    self._inode, self._offset = inode, 0
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._offset = 0  # the same, where the file system gave the new file the old number
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [json.loads(line) for line in whole.splitlines()]
        records = [record for record in records if record["step"] > self._seen_step]
        if records:
            self._seen_step = max(record["step"] for record in records)
        return records


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal (none if there is no file)."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
