"""Chunks of items -> examples, by tasks on a Ray cluster, in order: the same bytes as by processes of this machine.

Every node must see the raw data under the same path; a task that finds other files than this process is an error, or a
node without them would leave its share out as unreadable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from pipeline.datasets.reading import AHEAD, Chunk, Read, mark_of, read_chunk
from pipeline.datasets.source import Source
from pipeline.errors import DataError, Unfinished, UserError

RETRIES = 3  # of a task whose process or node is lost
SHARED = "Put the raw data under a path that every node of the cluster sees, or prepare it without --address"


def read_chunks(source: Source, chunks: Iterator[Chunk], *, workers: int | None = None) -> Iterator[tuple[Chunk, Read]]:
    """As `reading.read_chunks`, on the Ray cluster that this process is connected to.

    workers: tasks at once; None: one per CPU of the cluster. Raises DataError as there, or a node does not see the raw
    data. Unfinished: a node or a task was lost more often than Ray tries again.
    """
    import ray

    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    read = ray.remote(_read).options(num_cpus=1, max_retries=RETRIES)
    placed = ray.put(source)
    waiting: deque[tuple[Chunk, Any]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, read.remote(placed, chunk, mark_of(chunk))))
            if len(waiting) >= at_once * AHEAD:
                first, result = waiting.popleft()
                yield first, ray.get(result)
        while waiting:
            first, result = waiting.popleft()
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
        for _, result in waiting:
            ray.cancel(result, force=True)


def _read(source: Source, chunk: Chunk, mark: str) -> Read:
    """The work of one task."""
    import platform

    if mark_of(chunk) != mark:
        raise DataError(
            f"node {platform.node()} finds other files of class {chunk[0].name} than this machine, or none. {SHARED}."
        )
    return read_chunk(source, chunk)
