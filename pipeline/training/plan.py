"""How a run computes its meta-gradients: chosen at its start, the same on every rank, kept in its checkpoints.

A resumed run takes the plan of its checkpoint, so it goes on bit-identically. A later change (a GPU that ran out of
memory, a machine without the native kernels) is agreed by all ranks and recorded; from there on the run equals an
undisturbed one to rounding, no longer bit for bit.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import ConfigError
from pipeline.models.module import ModuleModel
from pipeline.training import batching
from pipeline.training.context import Context
from pipeline.types import Algorithm, MetaState, TaskBatch, TaskModel

KERNELS = ("pure", "closed", "native")  # what one rank can use, the others can too: up to the least of all ranks
PRECISIONS = ("float32", "mixed")
OF_FREE_MEMORY = 0.9  # of a GPU: the rest is for the all-reduce, the optimizer and fragmentation


class Plan(NamedTuple):
    """The same on every rank."""

    kernel: str
    precision: str
    batching: str | None  # of any nn.Module's tasks, "loop" or "vmap"; None: the model is batched by itself
    chunk: int | None  # tasks adapted at once on a rank; None: all of its share
    reason: str = ""  # of the batching, for the user

    def __str__(self) -> str:
        if self.reason:
            return self.reason if self.chunk is None else f"{self.reason}; {self.chunk} at once"
        tasks = "all tasks of a worker at once" if self.chunk is None else f"{self.chunk} tasks at once"
        return f"{self.kernel} kernels, {self.precision}, {tasks}"

    def use_batching(self, model: TaskModel) -> None:
        """Batch any nn.Module's tasks so."""
        if isinstance(model, ModuleModel) and self.batching is not None:
            model.batching = self.batching  # type: ignore[assignment]
            model.cpu_task_chunk = self.chunk


def choose(
    context: Context,
    algorithm: Algorithm,
    model: TaskModel,
    state: MetaState,
    draw: Callable[[int], TaskBatch],
    *,
    share: int,
    chunk: int | None,
    memory: int | None,
    steps: tuple[int, int] = (0, 0),
) -> Plan:
    """The plan of a new run.

    draw: gives a batch of so many tasks to measure with. share: tasks of a rank. chunk: the most of them that are
    wanted at once (None: all). memory: bytes that a worker's step may take; None: no limit on a CPU, what is free on a
    GPU. steps: the first and the last outer step, which cost differently where an algorithm anneals.

    Raises ConfigError, on every rank: one task needs more than `memory`.
    """
    kernel = _least(context, KERNELS, model.kernel)
    precision = _least(context, PRECISIONS, model.precision)
    model.kernel, model.precision = kernel, precision
    plan = Plan(kernel, precision, None, chunk)
    if isinstance(model, ModuleModel):
        plan = _with_batching(plan, context, algorithm, model, state, draw, share, step=steps[-1])
    budget = memory
    if budget is None and context.device.type == "cuda":
        budget = int(OF_FREE_MEMORY * torch.cuda.mem_get_info(context.device)[0])
    if budget is None:
        return plan
    one = fits = 0
    if context.rank == 0:
        costs = [_cost(algorithm, state, draw, context.device, step=step) for step in sorted(set(steps))]
        one, each = (max(cost) for cost in zip(*costs, strict=True))
        fits = 0 if one > budget else min(1 + (budget - one) // each, plan.chunk or share)
    one, fits = (int(number) for number in _told(context, [one, fits]))
    if fits == 0:
        raise ConfigError(
            f"training.memory_budget: one task takes {_megabytes(one)}, the budget is {_megabytes(budget)}. Raise it, "
            "or set algorithm.recompute_inner_steps: true, or take fewer queries or a smaller model."
        )
    return plan._replace(chunk=fits)


def resumed(context: Context, plan: Plan, model: TaskModel) -> Plan:
    """A checkpoint's plan, with the kernels that every rank of this group still has."""
    kernel = _least(context, KERNELS, min(plan.kernel, model.kernel, key=KERNELS.index))
    precision = _least(context, PRECISIONS, min(plan.precision, model.precision, key=PRECISIONS.index))
    model.kernel, model.precision = kernel, precision
    plan.use_batching(model)
    return plan._replace(kernel=kernel, precision=precision)


def _with_batching(
    plan: Plan,
    context: Context,
    algorithm: Algorithm,
    model: ModuleModel,
    state: MetaState,
    draw: Callable[[int], TaskBatch],
    share: int,
    *,
    step: int,
) -> Plan:
    """Rank 0's choice; its reason is on rank 0 only."""
    told, reason = [0.0, 0.0], ""
    if context.rank == 0:
        choice = batching.choose(algorithm, model, state, draw(share), step=step, chunk=plan.chunk)
        told, reason = [float(choice.batching == "vmap"), float(choice.chunk or 0)], choice.line
    by_vmap, chunk = _told(context, told)
    plan = plan._replace(batching="vmap" if by_vmap else "loop", chunk=int(chunk) or None, reason=reason)
    plan.use_batching(model)
    return plan


def _least(context: Context, names: tuple[str, ...], ours: str) -> str:
    """The first of `names` that is any rank's."""
    counts = _told(context, [float(name == ours) for name in names], rank_0=False)
    return next(name for name, count in zip(names, counts, strict=True) if count)


def _told(context: Context, numbers: list[float], *, rank_0: bool = True) -> list[float]:
    """Rank 0's numbers on every rank, or the sums over ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=context.device)
    if rank_0 and context.rank != 0:
        mine.zero_()
    context.all_reduce(mine)
    return mine.tolist()


def _cost(
    algorithm: Algorithm, state: MetaState, draw: Callable[[int], TaskBatch], device: torch.device, *, step: int
) -> tuple[int, int]:
    """Bytes of a meta-gradient over idle: of one task, and of each further one."""

    def peak(batch: TaskBatch) -> int:
        return peak_bytes(lambda: algorithm.meta_grad(state, batch, step=step), device)

    one_task, two_tasks = draw(1), draw(2)
    algorithm.meta_grad(state, one_task, step=step)  # what is allocated only once
    one = peak(one_task)
    try:
        two = peak(two_tasks)
    except torch.OutOfMemoryError:  # then one at a time
        torch.cuda.empty_cache()
        return one, sys.maxsize
    return one, max(two - one, 1)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that `work` has at any one time, over those that were there before.

    On a CPU the tensors are counted as operations return them, so the number is exact for these, the same on every run,
    and leaves out what an operation needs inside.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Counted() as counted:
        work()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the storages that operations return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and _address(value) not in self._seen | inputs:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        self._seen.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self._now -= size


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
