"""Chunks of items -> examples, in other processes and in order."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeAlias

from pipeline.datasets.source import Examples, Problem, Source
from pipeline.errors import DataError

AHEAD = 3  # chunks per process that are being read or wait to be written


class ClassPart(NamedTuple):
    """Some items of one class."""

    name: str
    group: str
    items: list[Any]
    first: bool = True  # whether the class begins, and ends, with it
    last: bool = True


Chunk: TypeAlias = list[ClassPart]
Read: TypeAlias = list[tuple[Examples, list[Problem]]]  # of each part of a chunk


def read_chunk(source: Source, chunk: Chunk) -> Read:
    return [source.read(part.items) for part in chunk]


def read_chunks(
    source: Source, chunks: Iterator[Chunk], *, workers: int | None = None
) -> Iterator[tuple[ClassPart, Examples, list[Problem]]]:
    """Every part of the chunks with its examples and problems, in order.

    workers: processes; None: one per CPU; 1: this one. What one or two chunks hold is read here, since processes take
    seconds to start. Raises DataError: what `source.read` raises, or a process was killed.
    """
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    if count < 1:
        raise DataError(f"workers {count}: at least one process must read.")
    ahead = list(itertools.islice(chunks, 3))
    if count == 1 or len(ahead) < 3:
        for chunk in _chained(ahead, chunks):
            yield from _parts(chunk, read_chunk(source, chunk))
        return
    # not fork, since this process may have threads; a forkserver imports what the source needs once for all
    context = get_context("forkserver")
    context.set_forkserver_preload([type(source).__module__])
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(source,))
    waiting: deque[tuple[Chunk, Future[Read]]] = deque()
    try:
        for chunk in _chained(ahead, chunks):
            waiting.append((chunk, pool.submit(_read, chunk)))
            if len(waiting) >= count * AHEAD:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chained(ahead: list[Chunk], chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    yield from ahead
    yield from chunks


def _finished(chunk: Chunk, future: Future[Read]) -> Iterator[tuple[ClassPart, Examples, list[Problem]]]:
    try:
        read = future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that reads was killed, at class {chunk[0].name} or near it; mostly because there was not "
            "enough memory. Use fewer --workers."
        ) from error
    yield from _parts(chunk, read)


def _parts(chunk: Chunk, read: Read) -> Iterator[tuple[ClassPart, Examples, list[Problem]]]:
    for part, (examples, problems) in zip(chunk, read, strict=True):
        yield part, examples, problems


_source: Source | None = None  # of this process, which reads


def _start(source: Source) -> None:
    """In a process that reads: it ends with the one that asked, however that ends, and leaves Ctrl-C to it."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _read(chunk: Chunk) -> Read:
    assert _source is not None
    return read_chunk(_source, chunk)
