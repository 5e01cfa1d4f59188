"""Chunks of items -> examples, in other processes and in order."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from pipeline.datasets.labels import shown
from pipeline.datasets.source import Examples, Problem, Source
from pipeline.errors import DataError, Unfinished

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


class Reader(Protocol):
    """What `read_chunks` does, here or elsewhere."""

    def __call__(
        self, source: Source, chunks: Iterator[Chunk], *, workers: int | None = None
    ) -> Iterator[tuple[Chunk, Read]]: ...


def mark_of(chunk: Chunk) -> str:
    """Tells whether a chunk is what it was: its classes, its items as they print, and their files' sizes and times."""

    def described(item: Any) -> str:
        if isinstance(item, Path):
            if item not in files:
                try:
                    status = item.stat()
                    files[item] = f"{item.absolute()} {status.st_size} {status.st_mtime_ns}"
                except OSError:
                    files[item] = f"{item.absolute()} unreadable"
            return files[item]
        return f"({', '.join(map(described, item))})" if isinstance(item, tuple) else repr(item)

    files: dict[Path, str] = {}
    content = [[*part[:2], [described(item) for item in part.items], part.first, part.last] for part in chunk]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_chunk(source: Source, chunk: Chunk) -> Read:
    return [_read_items(source, part.items) for part in chunk]


def _read_items(source: Source, items: list[Any]) -> tuple[Examples, list[Problem]]:
    """What the source reads of its items, and the problems that there were or stand among them, as plain text."""
    told = [item for item in items if isinstance(item, Problem)]
    examples, problems = source.read([item for item in items if not isinstance(item, Problem)])
    return examples, [Problem(shown(item), shown(reason)) for item, reason in (*told, *problems)]


def read_chunks(source: Source, chunks: Iterator[Chunk], *, workers: int | None = None) -> Iterator[tuple[Chunk, Read]]:
    """Every chunk with what was read of its parts, in order.

    workers: processes; None: one per CPU; 1: this one. What one or two chunks hold is read here, since processes take
    seconds to start, and so is what reading only copies. Raises DataError: what `source.read` raises. Unfinished: a
    process was killed.
    """
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    if count < 1:
        raise DataError(f"workers {count}: at least one process must read.")
    ahead = list(itertools.islice(chunks, 3))
    chunks = itertools.chain(ahead, chunks)
    if count == 1 or source.copies or len(ahead) < 3:
        for chunk in chunks:
            yield chunk, read_chunk(source, chunk)
        return
    # not fork, since this process may have threads; a forkserver imports what the source needs once for all
    context = get_context("forkserver")
    context.set_forkserver_preload(sorted({type(part).__module__ for part in (source, *vars(source).values())}))
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(source,))
    waiting: deque[tuple[Chunk, Future[Read]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_read, chunk)))
            if len(waiting) >= count * AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool as error:
        raise Unfinished(
            "a process that reads was killed, mostly because there was not enough memory. Run the same command again "
            "to go on, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(chunk: Chunk, future: Future[Read]) -> tuple[Chunk, Read]:
    return chunk, future.result()


_source: Source | None = None  # of this process, which reads


def _start(source: Source) -> None:
    """In a process that reads: it ends with the one that asked, however that ends, and leaves Ctrl-C to it."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about odd files, would tear the display
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _read(chunk: Chunk) -> Read:
    assert _source is not None
    return read_chunk(_source, chunk)
