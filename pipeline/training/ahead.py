"""What waits for a disk, done by a thread while what it gave before is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


def one_ahead(calls: Iterable[Callable[[], ResultT]]) -> Generator[ResultT, None, None]:
    """What the calls return, in order; while one result is used, the next call is made.

    A call is taken from `calls` in the caller's own thread, when the result before it is asked for. Raises what a call
    does when its result is asked for.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ahead: Future[ResultT] | None = None
        for call in calls:
            earlier, ahead = ahead, pool.submit(call)
            if earlier is not None:
                yield earlier.result()
        if ahead is not None:
            yield ahead.result()
