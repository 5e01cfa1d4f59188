"""What an outer step costs, in seconds, in closed form.

    step = max(slowest worker's compute, its feed) + ring all-reduce + (validation + checkpoint) / validate_every

Slowest worker. M tasks over W workers: M mod W of them have ceil(M / W), the others floor. A worker with n tasks needs
(overhead + n · task) · sharing, times noise that is lognormal with mean 1 and coefficient of variation `cv`, drawn
anew by every worker in every step. Its expected maximum over workers is an integral over the product of the
distribution functions.

Ring. 2 (W − 1) rounds; in each, every worker sends 1/W of the gradient to its neighbour:
2 (W − 1) / W · bytes / bandwidth + 2 (W − 1) · latency. It begins, for all of them, with the slowest worker: in
2 (W − 1) rounds its delay has gone all the way round.

Feed. Shards in an object store are read by row group, a class at a time, one step ahead of the computation. A node's
workers share its network, all nodes share the store. A data set below `task.memory_limit_mb` is read once instead.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr


@dataclass(frozen=True)
class Compute:
    """One worker's own time in a step."""

    task_seconds: float  # one task's meta-gradient, on a device of its own
    overhead_seconds: float  # per step, whatever the number of tasks: sampling, outer update, metrics
    cv: float = 0.0  # standard deviation of the noise / mean


@dataclass(frozen=True)
class Network:
    """The links of the ring; the slowest one sets its pace."""

    bandwidth: float  # bytes/s, of one worker to its neighbour
    latency: float  # seconds of one round besides the bytes


@dataclass(frozen=True)
class Feed:
    """Reading episodes from an object store. A set that is held in memory has `bytes_per_task` 0."""

    bytes_per_task: float = 0.0  # row groups that one episode touches
    node_bandwidth: float = math.inf  # bytes/s
    store_bandwidth: float = math.inf  # bytes/s, of the whole store
    workers_per_node: int = 1
    set_bytes: float = 0.0  # read once by every worker, before the first step


@dataclass(frozen=True)
class Occasional:
    """What rank 0 or all ranks do every `validate_every` steps."""

    validate_every: int = 100
    validation_tasks: int = 0  # shared by the workers like a step's tasks
    validation_task_seconds: float = 0.0
    checkpoint_seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    workers: int
    meta_batch_size: int  # tasks per step, over all workers
    gradient_bytes: float
    compute: Compute
    network: Network
    feed: Feed = Feed()
    occasional: Occasional = Occasional()
    sharing: float = 1.0  # how many times longer a worker computes because others use the same cores

    def with_(self, **changes: object) -> Setting:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cost:
    """Seconds per outer step, by cause. They add up to `step`."""

    compute: float  # the mean worker's
    waiting: float  # for the slowest worker: uneven shares and noise
    feed: float  # beyond what computing hides
    bandwidth: float  # of the all-reduce
    latency: float  # of the all-reduce
    occasional: float  # validation and checkpoints, spread over the steps between
    meta_batch_size: int

    @property
    def all_reduce(self) -> float:
        return self.bandwidth + self.latency

    @property
    def step(self) -> float:
        return self.compute + self.waiting + self.feed + self.all_reduce + self.occasional

    @property
    def tasks_per_second(self) -> float:
        return self.meta_batch_size / self.step


def cost(setting: Setting) -> Cost:
    """The expected cost of a step."""
    slowest, mean = expected_slowest(setting), mean_worker(setting)
    feed = feed_seconds(setting)
    bandwidth, latency = ring(setting.workers, setting.gradient_bytes, setting.network)
    occasional = setting.occasional
    share = math.ceil(occasional.validation_tasks / setting.workers) * setting.sharing
    validation = share * occasional.validation_task_seconds
    return Cost(
        compute=mean,
        waiting=slowest - mean,
        feed=max(0.0, feed - slowest),
        bandwidth=bandwidth,
        latency=latency,
        occasional=(validation + occasional.checkpoint_seconds) / occasional.validate_every,
        meta_batch_size=setting.meta_batch_size,
    )


def shares(meta_batch_size: int, workers: int) -> list[tuple[int, int]]:
    """(number of workers, tasks each): as `slots_of_rank` deals them."""
    few, more = divmod(meta_batch_size, workers)
    return [(count, tasks) for count, tasks in ((more, few + 1), (workers - more, few)) if count]


def worker_seconds(setting: Setting, tasks: int) -> float:
    """A worker's mean compute time."""
    compute = setting.compute
    return (compute.overhead_seconds + tasks * compute.task_seconds) * setting.sharing


def mean_worker(setting: Setting) -> float:
    groups = shares(setting.meta_batch_size, setting.workers)
    return sum(count * worker_seconds(setting, tasks) for count, tasks in groups) / setting.workers


def expected_slowest(setting: Setting) -> float:
    """E[max over workers] of their compute times."""
    groups = [(n, worker_seconds(setting, tasks)) for n, tasks in shares(setting.meta_batch_size, setting.workers)]
    longest = max(seconds for _, seconds in groups)
    if setting.compute.cv == 0 or longest == 0:
        return longest
    sigma = log_sigma(setting.compute.cv)
    low, high = (longest * math.exp(edge * sigma - sigma**2 / 2) for edge in (-9.0, 9.0))
    t = np.linspace(low, high, 20_001)
    none_later = np.ones_like(t)
    for count, seconds in groups:
        if seconds > 0:
            none_later *= ndtr(np.log(t / seconds) / sigma + sigma / 2) ** count
    return float(low + np.trapezoid(1 - none_later, t))


def log_sigma(cv: float) -> float:
    """The sigma of a lognormal distribution with this coefficient of variation."""
    return math.sqrt(math.log1p(cv**2))


def ring(workers: int, gradient_bytes: float, network: Network) -> tuple[float, float]:
    """Seconds of a ring all-reduce for bytes and for latency."""
    if workers == 1:
        return 0.0, 0.0
    rounds = 2 * (workers - 1)
    return rounds / workers * gradient_bytes / network.bandwidth, rounds * network.latency


def feed_seconds(setting: Setting) -> float:
    """Seconds to read one step's episodes: by the busiest node, or by all nodes from the store."""
    feed = setting.feed
    on_a_node = min(feed.workers_per_node, setting.workers)
    busiest = math.ceil(setting.meta_batch_size / setting.workers) * on_a_node
    at_the_store = setting.meta_batch_size * feed.bytes_per_task / feed.store_bandwidth
    return max(busiest * feed.bytes_per_task / feed.node_bandwidth, at_the_store)


def first_read_seconds(setting: Setting) -> float:
    """Seconds until every worker holds a copy of the data set, once."""
    feed = setting.feed
    on_a_node = min(feed.workers_per_node, setting.workers)
    return feed.set_bytes * max(on_a_node / feed.node_bandwidth, setting.workers / feed.store_bandwidth)
