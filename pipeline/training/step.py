"""The meta-gradient of one outer step: this rank's slots, chunk by chunk, then one all-reduce and one division."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.training.collectives import all_reduce_sums
from pipeline.training.context import Context
from pipeline.training.queue import Mark, mark, seconds_between, to_device
from pipeline.types import Algorithm, MetaGradient, MetaState, Params, TaskBatch


class QueuedGradient(NamedTuple):
    """Means over the tasks of the whole meta-batch, the same on every rank; on a GPU perhaps not computed yet."""

    grads: Params
    metrics: dict[str, Tensor]
    statistics: Params
    classes: Params
    finite: Tensor  # bool: every number above, on every rank
    told: Tensor  # [2·world_size + 2]: compute seconds and chunk of each rank, tasks, ranks that were asked to end
    started: Mark
    computed: Mark
    reduced: Mark


class Told(NamedTuple):
    """What the ranks tell each other beside the gradient."""

    compute_seconds: list[float]  # of each rank, up to the all-reduce
    chunk: int | None  # tasks at once from now on: less than was asked for where a GPU ran out of memory
    stop: bool  # a rank was asked to end

    @classmethod
    def of(cls, numbers: list[float]) -> Told:
        *each, _, stop = numbers
        seconds, chunks = each[: len(each) // 2], each[len(each) // 2 :]
        return cls(seconds, int(min((c for c in chunks if c), default=0)) or None, stop > 0)


class GlobalGradient(NamedTuple):
    """The same, waited for."""

    grads: Params
    metrics: dict[str, Tensor]
    statistics: Params
    classes: Params
    finite: bool
    told: Told
    all_reduce_seconds: float  # of this rank, waiting for the slowest included


def slots_of_rank(context: Context, meta_batch_size: int) -> Tensor:
    """Rank r of W takes slots r, r + W, …: int64 [its share]."""
    return torch.arange(context.rank, meta_batch_size, context.world_size)


def split_tasks(batch: TaskBatch, chunk: int | None) -> Iterator[TaskBatch]:
    """The batch in pieces of at most `chunk` tasks (None: in one)."""
    tasks = len(batch.support_x)
    for start in range(0, tasks, chunk or tasks):
        yield batch.tasks(slice(start, start + (chunk or tasks)))


def queue_gradient(
    context: Context,
    algorithm: Algorithm,
    state: MetaState,
    batch: TaskBatch,
    *,
    step: int,
    chunk: int | None,
    previous_seconds: float = 0.0,
) -> QueuedGradient:
    """Sums over this rank's tasks and their count, summed over ranks, then divided by the global count.

    So unequal shares and chunks of any size give the mean over the whole meta-batch. A NaN on one rank reaches
    every rank through the sum, so all of them agree on `finite` without another collective; what the ranks tell each
    other besides (a request to stop, how long each took) travels in the same one.

    Nothing here waits for a GPU. So a rank on one cannot know how long this gradient takes: it tells the others
    `previous_seconds`, of an earlier one.
    """
    device = next(iter(state.params.values())).device
    started = mark(device)
    sums, fitting = _sums(algorithm, state, batch, step=step, chunk=chunk)
    reference = next(iter(state.params.values()))
    computed = mark(device)
    seconds, chunks = [0.0] * context.world_size, [0.0] * context.world_size
    seconds[context.rank] = previous_seconds if device.type == "cuda" else seconds_between(started, computed)
    chunks[context.rank] = float(fitting or 0)
    told = [*seconds, *chunks, float(len(batch.support_x)), float(context.stop_requested())]
    sums["told"] = to_device(told, reference)
    sums = all_reduce_sums(context, sums)
    told_by_all = sums.pop("told")
    reduced = mark(device)
    means = {name: value / told_by_all[-2] for name, value in sums.items()}
    finite = torch.stack([value.isfinite().all() for value in means.values()]).all()

    def part(prefix: str) -> Params:
        return {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}

    return QueuedGradient(
        part("grads/"),
        part("metrics/"),
        part("statistics/"),
        part("classes/"),
        finite,
        told_by_all,
        started,
        computed,
        reduced,
    )


def global_gradient(
    context: Context,
    algorithm: Algorithm,
    state: MetaState,
    batch: TaskBatch,
    *,
    step: int,
    chunk: int | None,
) -> GlobalGradient:
    """As `queue_gradient`, and waits for it."""
    queued = queue_gradient(context, algorithm, state, batch, step=step, chunk=chunk)
    told = Told.of(queued.told.tolist())
    return GlobalGradient(
        queued.grads,
        queued.metrics,
        queued.statistics,
        queued.classes,
        finite=bool(queued.finite),
        told=told,
        all_reduce_seconds=seconds_between(queued.computed, queued.reduced),
    )


def _sums(
    algorithm: Algorithm, state: MetaState, batch: TaskBatch, *, step: int, chunk: int | None
) -> tuple[Params, int | None]:
    """Sums over the batch, and the chunk that fitted: halved, and all of it computed anew, while memory runs out."""
    while True:
        sums: Params = {}
        try:
            for tasks in split_tasks(batch, chunk):
                gradient = algorithm.meta_grad(state, tasks, step=step)
                for name, value in _named(gradient).items():
                    sums[name] = sums[name] + value if name in sums else value
        except torch.OutOfMemoryError:
            if min(chunk or len(batch.support_x), len(batch.support_x)) == 1:
                raise
        else:
            return sums, chunk
        chunk = min(chunk or len(batch.support_x), len(batch.support_x)) // 2
        torch.cuda.empty_cache()  # here, and not in the handler, whose error holds the failed step's tensors


def _named(gradient: MetaGradient) -> Params:
    """The parts as one flat dict, so that they travel in one all-reduce."""
    return {
        f"{field}/{name}": value
        for field, values in zip(gradient._fields, gradient, strict=True)
        for name, value in values.items()
    }
