"""Chunks of items -> examples, by tasks on a Ray cluster, in order: the same bytes as by processes of this machine.

Every node must see the raw data under the same path; a task that finds other files than this process is an error, or a
node without them would leave its share out as unreadable. Rows of tables, which this process alone has in order, go to
the nodes through Ray's object store, an item at a time; they need not see the table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from pipeline.datasets import reading
from pipeline.datasets.reading import AHEAD, Chunk, Read, mark_of, read_chunk
from pipeline.datasets.source import Source
from pipeline.errors import DataError, Unfinished, UserError

STORED_BYTES = 512 << 20  # of rows that wait in the object store, about
RETRIES = 3  # of a task whose process or node is lost
SHARED = "Put the raw data under a path that every node of the cluster sees, or prepare it without --address"


def read_chunks(source: Source, chunks: Iterator[Chunk], *, workers: int | None = None) -> Iterator[tuple[Chunk, Read]]:
    """As `reading.read_chunks`, on the Ray cluster that this process is connected to.

    workers: tasks at once; None: one per CPU of the cluster. Raises DataError as there, or a node does not see the raw
    data. Unfinished: a node or a task was lost more often than Ray tries again.
    """
    import ray

    if source.copies:  # the bytes would go to the nodes and back
        yield from reading.read_chunks(source, chunks, workers=1)
        return
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    read = ray.remote(_read).options(num_cpus=1, max_retries=RETRIES)
    placed = ray.put(source)
    waiting: deque[tuple[Chunk, Any, int]] = deque()
    held = 0  # bytes in the object store that chunks which are waiting have put there
    try:
        for chunk in chunks:
            sent, size = _sent(source, chunk)
            waiting.append((chunk, read.remote(placed, sent, mark_of(sent)), size))
            held += size
            while len(waiting) >= at_once * AHEAD or (held > STORED_BYTES and len(waiting) > 1):
                first, result, size = waiting.popleft()
                held -= size
                yield first, ray.get(result)
        while waiting:
            first, result, _ = waiting.popleft()
            yield first, ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, OSError):
            raise DataError(f"a node of the cluster cannot read the raw data ({error.cause}). {SHARED}.") from error
        raise
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unfinished(f"the Ray cluster lost a task ({reason}). Run the same command again to go on.") from error
    finally:
        for _, result, _ in waiting:
            ray.cancel(result, force=True)


def _sent(source: Source, chunk: Chunk) -> tuple[Chunk, int]:
    """A chunk as any node can read it, and how many bytes of it lie in the object store."""
    stored: list[_Stored] = []

    def put(value: list[bytes]) -> _Stored:
        stored.append(_Stored(value))
        return stored[-1]

    sent = [part._replace(items=list(source.elsewhere(part.items, put))) for part in chunk]
    return sent, sum(each.bytes for each in stored)


class _Stored:
    """A value in the object store, for as long as this process needs it; called, it gives the value anywhere."""

    def __init__(self, value: list[bytes]) -> None:
        import ray

        self.bytes = sum(map(len, value))
        self._ref = ray.put(value)

    def __call__(self) -> Any:
        import ray

        return ray.get(self._ref)

    def __repr__(self) -> str:  # which `mark_of` looks at
        return f"{self.bytes} bytes"


def _read(source: Source, chunk: Chunk, mark: str) -> Read:
    """The work of one task."""
    import platform

    if mark_of(chunk) != mark:
        raise DataError(
            f"node {platform.node()} finds other files of class {chunk[0].name} than this machine, or none. {SHARED}."
        )
    return read_chunk(source, chunk)
