"""The same outer step, simulated: every worker's noisy compute time, every message of the ring, one by one.

It takes only the parameters from `cost_model`, none of its formulas, so that the two can disagree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from cost_model import Setting

CHUNK = 2_000_000  # workers · steps that are held in memory at once


class Simulated(NamedTuple):
    """Mean seconds per step, and the half-width of its 95 % interval over simulated steps."""

    mean: float
    half_width: float
    all_reduce: float  # of it, from the slowest worker's start to the last message


def simulate(setting: Setting, *, steps: int, seed: int = 0, link_cv: float = 0.0) -> Simulated:
    """`steps` independent outer steps (the all-reduce leaves all workers level), validation and checkpoints left out.

    link_cv: noise of every single message's time, which the closed form leaves out.
    """
    random = np.random.default_rng(seed)
    at_once = max(1, CHUNK // setting.workers)
    chunks = [min(at_once, steps - start) for start in range(0, steps, at_once)]
    parts = [_steps(setting, count, random, link_cv) for count in chunks]
    ends, ready = (np.concatenate(column) for column in zip(*parts, strict=True))
    half_width = 1.96 * float(ends.std(ddof=1)) / math.sqrt(steps) if steps > 1 else math.inf
    return Simulated(float(ends.mean()), half_width, float((ends - ready).mean()))


def _steps(setting: Setting, steps: int, random: np.random.Generator, link_cv: float) -> tuple[np.ndarray, np.ndarray]:
    """When each step's last worker is through, and when its slowest one had computed: [steps] each."""
    workers, compute, feed = setting.workers, setting.compute, setting.feed
    slots = np.arange(setting.meta_batch_size) % workers  # slot i belongs to worker i mod W
    tasks = np.bincount(slots, minlength=workers)
    busy = (
        (compute.overhead_seconds + tasks * compute.task_seconds)
        * setting.sharing
        * _noise((steps, workers), compute.cv, random)
    )
    node = np.arange(workers) // feed.workers_per_node
    read = np.bincount(node, weights=tasks * feed.bytes_per_task) / feed.node_bandwidth  # a node's workers share it
    stored = tasks.sum() * feed.bytes_per_task / feed.store_bandwidth
    ready = np.maximum(busy, np.maximum(read[node], stored))  # the next episodes are read while these are computed

    now = ready.copy()
    if workers > 1:
        message = setting.gradient_bytes / workers / setting.network.bandwidth + setting.network.latency
        for _ in range(2 * (workers - 1)):  # reduce-scatter, then all-gather
            sent = now + message * _noise((steps, workers), link_cv, random)
            now = np.maximum(sent, np.roll(sent, 1, axis=1))  # has sent its own, has its left neighbour's
    return now.max(axis=1), ready.max(axis=1)


def _noise(shape: tuple[int, int], cv: float, random: np.random.Generator) -> np.ndarray | float:
    """Factors with mean 1."""
    if cv == 0:
        return 1.0 if shape[0] == 0 else np.ones(shape)
    sigma = math.sqrt(math.log(1 + cv**2))
    return random.lognormal(-(sigma**2) / 2, sigma, shape)
