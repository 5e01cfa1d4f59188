"""What waits for a disk, done by a thread while what it gave before is used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


def results(
    calls: Iterable[Callable[[], ResultT]], *, ahead: bool, waited: Callable[[float], object] = lambda seconds: None
) -> Generator[ResultT, None, None]:
    """What the calls return, in order. ahead: while one result is used, a thread makes the next call.

    A call is taken from `calls` in the caller's own thread, at the latest when its result is asked for; ahead: when the
    result before it is. waited: is told for how many seconds a result was waited for. Raises what a call does when its
    result is asked for.
    """

    def timed(call: Callable[[], ResultT]) -> ResultT:
        asked = time.perf_counter()
        result = call()
        waited(time.perf_counter() - asked)
        return result

    if not ahead:
        yield from map(timed, calls)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        coming: deque[Future[ResultT]] = deque()
        for call in calls:
            # before the next call begins, which would take the interpreter's lock from whoever has no need to wait
            there = [timed(coming.popleft().result)] if coming else []
            coming.append(pool.submit(call))
            yield from there
        while coming:
            yield timed(coming.popleft().result)
