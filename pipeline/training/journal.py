"""The metrics journal: rank 0 appends every step's metrics to it; the driver follows it.

So no metric is lost to a reporting interval, a slow or absent tracking server holds nothing up, and what a killed run
had measured is still there. A resumed run drops the records after its checkpoint and writes them again.

On a file system the journal is one file of JSON lines. An object store has no appending, so there it is a folder of
objects, each with the lines of a few seconds and named after its first step.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.storage import Location, ObjectPath

FLUSH_SECONDS = 0.5
OBJECT_SECONDS = 5.0  # an object store is written less often: each time is a request of its own

# Metrics that tell of the machine and not of the training: a repeated step has others.
CLOCK_METRICS = (
    "tasks_per_second",
    "step_seconds",
    "data_seconds",
    "all_reduce_seconds",
    "compute_seconds_mean",
    "compute_seconds_max",
    "slowest_rank",
    "num_workers",
)

Record = dict[str, Any]


class JournalWriter:
    """Rank 0's end: one record per outer step, readable within about half a second (five in an object store).

    A record is {"step": …, "time": milliseconds since 1970, metric: value, …}.
    """

    def __init__(self, path: Location, *, resume_step: int) -> None:
        """Keeps the records up to `resume_step` and drops the rest (and a line cut short by a kill)."""
        self._log = _ObjectLog(path) if isinstance(path, ObjectPath) else _FileLog(path)
        self._log.keep(resume_step)
        self._flushed = time.monotonic()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, step: int, metrics: dict[str, float]) -> None:
        self._log.append({"step": step, "time": time.time_ns() // 1_000_000, **metrics})
        if time.monotonic() - self._flushed > self._log.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Have everything where a resumed run finds it; call it with every checkpoint and at the end."""
        self._log.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._log.close()


class _FileLog:
    flush_seconds = FLUSH_SECONDS

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, last_step: int) -> None:
        storage.write(self._path, _lines(record for record in read(self._path) if record["step"] <= last_step))
        self._stream = self._path.open("a")

    def append(self, record: Record) -> None:
        self._stream.write(_lines([record]))

    def flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


class _ObjectLog:
    flush_seconds = OBJECT_SECONDS

    def __init__(self, folder: ObjectPath) -> None:
        self._folder = folder
        self._pending: list[Record] = []

    def keep(self, last_step: int) -> None:
        for place in self._folder.iterdir():
            records = _records(place.read_bytes())
            kept = [record for record in records if record["step"] <= last_step]
            if kept and len(kept) < len(records):
                self._write(kept)
            if len(kept) < len(records):
                place.unlink()

    def append(self, record: Record) -> None:
        self._pending.append(record)

    def flush(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = []

    def close(self) -> None:
        pass

    def _write(self, records: list[Record]) -> None:
        # a name of its own, so that a reader knows the object of an attempt before a kill from the one after it
        name = f"{records[0]['step']:010d}-{secrets.token_hex(4)}.jsonl"
        (self._folder / name).write_bytes(_lines(records).encode())


class JournalReader:
    """The driver's end: `new_records()` returns what has come since the last call, each step's record once."""

    def __init__(self, path: Location, *, after_step: int = -1) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None
        self._seen_objects: set[str] = set()
        self._seen_step = after_step  # up to here everything has been delivered

    def new_records(self) -> list[Record]:
        content = self._new_objects() if isinstance(self._path, ObjectPath) else self._new_lines(self._path)
        records = [record for record in _records(content) if record["step"] > self._seen_step]
        if records:
            self._seen_step = max(record["step"] for record in records)
        return records

    def _new_lines(self, path: Path) -> bytes:
        try:
            with path.open("rb") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                if inode != self._inode:  # replaced by a resumed run: read again, pass over what was seen
                    self._inode, self._offset = inode, 0
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._offset = 0  # the same, where the file system gave the new file the old number
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            return b""
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole

    def _new_objects(self) -> bytes:
        assert isinstance(self._path, ObjectPath)
        content = b""
        for place in self._path.iterdir():
            if place.name in self._seen_objects:
                continue
            try:
                content += place.read_bytes()
            except FileNotFoundError:
                continue  # removed by a resumed run since the folder was listed
            self._seen_objects.add(place.name)
        return content


def read(path: Location) -> list[Record]:
    """Every whole record of a journal (none if there is none)."""
    if isinstance(path, ObjectPath):
        return [record for place in path.iterdir() for record in _records(place.read_bytes())]
    return _records(path.read_bytes()) if path.exists() else []


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _records(content: bytes) -> list[Record]:
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
