"""From which number of workers on a resource sets the pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cost_model import Cost, Setting, cost, feed_seconds, mean_worker

LIMIT = 1 << 14  # workers; beyond, "not reached"


def saturation(make: Callable[[int], Setting], *, growing: bool) -> dict[str, int | None]:
    """For settings as a function of workers: what happens first at how many; None: not up to LIMIT."""
    conditions: dict[str, Callable[[Setting, Cost], bool]] = {
        "all-reduce latency above computing": lambda s, c: c.latency > mean_worker(s),
        "all-reduce bytes above computing": lambda s, c: c.bandwidth > mean_worker(s),
        "a node's reads above computing": lambda s, c: _node(s) > mean_worker(s),
        "the store's reads above computing": lambda s, c: _store(s) > mean_worker(s),
        "overhead above the tasks themselves": lambda s, c: c.compute < 2 * s.compute.overhead_seconds,
        "half of the step is not computing": lambda s, c: c.compute < c.step / 2,
    }
    found: dict[str, int | None] = dict.fromkeys(conditions)
    workers, last = 8, LIMIT
    if not growing:
        last = make(8).meta_batch_size
        found["one task per worker (no more can be used)"] = last
    while workers <= last and None in found.values():
        setting = make(workers)
        now = cost(setting)
        for name, holds in conditions.items():
            if found[name] is None and holds(setting, now):
                found[name] = workers
        workers += max(8, workers // 64 * 8)  # whole nodes, about 1/8 apart
    return found


def _node(setting: Setting) -> float:
    """Seconds to read a step's episodes if only the nodes' own bandwidth counted."""
    return feed_seconds(setting.with_(feed=replace(setting.feed, store_bandwidth=math.inf)))


def _store(setting: Setting) -> float:
    """The same if only the store's did."""
    return feed_seconds(setting.with_(feed=replace(setting.feed, node_bandwidth=math.inf)))
