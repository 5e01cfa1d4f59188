"""Whole classes in memory, at most so many bytes of them, read by threads before they are needed.

What is expected stays; of the rest what was not used for longest goes first, and then what is only read to spare. A
class that has no room is read for who asks for it, and forgotten. What could not be read ahead of time is tried again
when it is needed, and only then the error is somebody's: the step's that needs it.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

READERS = 4  # threads: a store far away answers late, and takes several questions at once


@dataclass
class CacheCounts:
    """What happened so far."""

    hits: int = 0  # classes that were there when they were asked for
    late: int = 0  # that were being read
    misses: int = 0  # that had to be read by who asked
    read: int = 0  # by whomever
    waited: float = 0.0  # seconds, for those that were not there


class ClassCache:
    """Arrays by class number.

    load: reads a class; called by several threads. nbytes: how large a class is, known before it is read.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray],
        nbytes: Callable[[int], int],
        *,
        capacity: int,
        readers: int = READERS,
    ) -> None:
        self.counts = CacheCounts()
        self.capacity = capacity
        self._load = load
        self._nbytes = nbytes
        self._readers = readers
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Future[np.ndarray]] = OrderedDict()  # read or being read, longest unused first
        self._bytes = 0  # of all of them
        self._expected: frozenset[int] = frozenset()
        self._needed: frozenset[int] = frozenset()
        self._spare: dict[int, None] = {}  # the one needed last is the last
        self._queue: deque[int] = deque()
        self._reading = 0  # threads at it

    @property
    def nbytes(self) -> int:
        """Held, or being read."""
        return self._bytes

    def expect(self, classes: Iterable[int], spare: Iterable[int] = ()) -> None:
        """These, and no others that were expected before, are read in the background in this order, and stay.

        spare: after them so many of these as there is room for. They give way to what is needed.
        """
        wanted = dict.fromkeys(classes)
        room = self.capacity - sum(map(self._nbytes, wanted))
        more: dict[int, None] = {}
        for number in spare:
            if number not in wanted and number not in more:
                room -= self._nbytes(number)
                if room < 0:
                    break
                more[number] = None
        with self._lock:
            self._expected, self._spare = frozenset(wanted), more
            self._queue = deque(c for c in (*wanted, *more) if c not in self._held)
        self._start_readers()

    def need(self, classes: Iterable[int]) -> None:
        """These are going to be asked for now: they are read before all others, as far as there is room."""
        wanted = dict.fromkeys(classes)
        with self._lock:
            self._needed = frozenset(wanted)
            self._queue.extendleft(c for c in reversed(wanted) if c not in self._held)
        self._start_readers()

    def get(self, number: int) -> np.ndarray:
        """A class. Waits until it is there. Raises what `load` does."""
        with self._lock:
            future = self._held.get(number)
            if future is not None and future.done():
                self._held.move_to_end(number)
                self.counts.hits += 1
                return future.result()
            self.counts.late += future is not None
            self.counts.misses += future is None
        began = time.perf_counter()
        try:
            return self._read_or_wait(number)
        finally:
            self.counts.waited += time.perf_counter() - began

    def _read_or_wait(self, number: int) -> np.ndarray:
        while True:
            with self._lock:
                future = self._held.get(number)
                promised = self._claim(number) if future is None else None
            if promised is not None:
                return self._fill(number, promised)
            if future is None:
                return self._load(number)
            try:
                return future.result()
            except Exception:
                continue  # whoever was reading it has forgotten it: now it is read here

    def close(self) -> None:
        """Read no more ahead. Threads that are reading end with the class they are at."""
        with self._lock:
            self._queue.clear()

    def _claim(self, number: int) -> Future[np.ndarray] | None:
        """Make room for a class that is not held, and promise it. None: there is no room. Under the lock."""
        size = self._nbytes(number)
        missing, victims = self._bytes + size - self.capacity, []
        for other in self._in_the_order_they_go(for_spare=number in self._spare and number not in self._needed):
            if missing <= 0:
                break
            missing -= self._nbytes(other)
            victims.append(other)
        if missing > 0:
            return None
        for other in victims:
            self._forget(other)
        future: Future[np.ndarray] = Future()
        self._held[number] = future
        self._bytes += size
        return future

    def _in_the_order_they_go(self, *, for_spare: bool) -> Iterator[int]:
        """What may be forgotten for the sake of another class. Under the lock."""
        stay = self._expected | self._needed
        yield from (c for c, each in self._held.items() if each.done() and c not in stay and c not in self._spare)
        if not for_spare:
            held = (c for c in reversed(self._spare) if c in self._held and c not in stay)
            yield from (c for c in held if self._held[c].done())

    def _forget(self, number: int) -> None:
        del self._held[number]
        self._bytes -= self._nbytes(number)

    def _fill(self, number: int, promised: Future[np.ndarray]) -> np.ndarray:
        try:
            array = self._load(number)
        except BaseException as error:
            with self._lock:
                self._forget(number)
            promised.set_exception(error)
            raise
        with self._lock:
            self.counts.read += 1
        promised.set_result(array)
        return array

    def _start_readers(self) -> None:
        with self._lock:
            more = min(self._readers - self._reading, len(self._queue))
            self._reading += max(more, 0)
        for _ in range(more):
            try:
                threading.Thread(target=self._read_ahead, name="read-ahead").start()
            except RuntimeError:  # there is no room for a thread: who needs a class reads it
                with self._lock:
                    self._reading -= 1

    def _read_ahead(self) -> None:
        """Until nothing is expected that is not there, or the program ends."""
        while (following := self._next()) is not None:
            with suppress(Exception):  # who needs the class tries again, and gets the error
                self._fill(*following)

    def _next(self) -> tuple[int, Future[np.ndarray]] | None:
        with self._lock:
            while self._queue and threading.main_thread().is_alive():
                number = self._queue.popleft()
                if number not in self._held:
                    claimed = self._claim(number)
                    if claimed is not None:
                        return number, claimed
            self._reading -= 1
            return None


def private_array(shape: tuple[int, ...], dtype: np.typing.DTypeLike = np.uint8) -> np.ndarray:
    """In pages of its own: they go back to the system with the array, so that no heap is left in pieces."""
    count = math.prod(shape)
    pages = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=dtype, count=count).reshape(shape)
