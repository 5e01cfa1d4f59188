"""How an arbitrary nn.Module's tasks are batched: by a loop or by vmap, and how many at once.

Which is faster depends on the network, the machine and the number of inner steps: vmap turns the tasks' convolutions
into grouped ones, several times slower on a CPU, and makes one large product of many small ones. So rank 0 tries both
on the first batch. And vmap is not taken on trust: an operation whose batching rule or whose derivative is wrong would
change the meta-gradient without a word. Its meta-gradient of two tasks must be the loop's in float64, and its answers
too; where it is not, or where vmap cannot batch the network at all, the loop goes on, and the user is told why.

What was chosen is part of the run's plan (`plan.py`): a run that is gone on with uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import psutil
import torch
from torch import Tensor

from pipeline.models.module import ModuleModel
from pipeline.training.evaluate import MODES
from pipeline.types import Algorithm, MetaGradient, MetaState, TaskBatch

VERIFIED_TASKS = 2
TOLERANCE = 1e-8  # relative, in float64; a wrong derivative differs by 1e-3 and more, rounding by 1e-13
LEAST_PART = 1e-3  # a parameter's gradient below this part of the whole counts as one of this size: it may be all noise
REPEATS = 3
SLOWER = 1.1  # than the best chunk so far: no larger one is tried
BUDGET_SECONDS = 30.0  # for all measurements: none is begun after it
MEMORY_PART = 0.5  # of what is free, for the largest chunk tried


class Choice(NamedTuple):
    """How tasks are batched, and the line that tells the user."""

    batching: str  # "loop" or "vmap"
    chunk: int | None  # tasks at once; None: all of the rank's share
    line: str


def choose(
    algorithm: Algorithm, model: ModuleModel, state: MetaState, batch: TaskBatch, *, step: int, chunk: int | None
) -> Choice:
    """The fastest way that is right. chunk: the number of tasks at once, where it is given.

    Leaves the model as it was. Takes a few meta-gradients: of two tasks to verify, of up to the whole batch to measure.
    """
    candidates = model.candidates()
    alone = chunk or (1 if batch.support_x.device.type == "cpu" else None)
    reason = why_not_vmap(algorithm, model, state, batch, step=step) if "vmap" in candidates else "as configured"
    if reason:
        return Choice("loop", alone, f"tasks go through the network in a loop: {reason}")
    if candidates == ("vmap",):
        return Choice("vmap", chunk, "tasks go through the network by vmap, as configured")
    seconds = measure(algorithm, model, state, batch, step=step, chunk=chunk)
    loop = seconds.pop(("loop", alone))
    if not seconds or min(seconds.values()) >= loop:
        slower = (
            f"{1000 * min(seconds.values()):.3g} by vmap" if seconds else "vmap was not measured: no memory or time"
        )
        return Choice("loop", alone, f"tasks go through the network in a loop: {1000 * loop:.3g} ms a task, {slower}")
    fastest = min(seconds, key=lambda way: seconds[way])
    at_once = f"{fastest[1]} at once" if fastest[1] else "all at once"
    times = f"{1000 * seconds[fastest]:.3g} ms a task, {1000 * loop:.3g} in a loop"
    return Choice("vmap", fastest[1], f"tasks go through the network by vmap, {at_once}: {times}")


def why_not_vmap(algorithm: Algorithm, model: ModuleModel, state: MetaState, batch: TaskBatch, *, step: int) -> str:
    """Empty where vmap's meta-gradient and answers on a few tasks are the loop's, in float64; else what is wrong."""
    few = _in_float64(batch.tasks(slice(0, VERIFIED_TASKS)))
    state = MetaState(*(_as_float64(part) for part in state))
    with model.in_dtype(torch.float64):
        try:
            with _batched(model, "loop"):
                expected = _results(algorithm, state, few, step)
        except Exception as error:
            return f"vmap could not be verified, as the network does not compute in float64 ({_first_line(error)})"
        try:
            with _batched(model, "vmap"):
                results = _results(algorithm, state, few, step)
        except Exception as error:
            return f"vmap cannot batch this network ({_first_line(error)})"
    for what, ours in results.items():
        difference = disagreement(ours, expected[what])
        if not difference <= TOLERANCE:  # a NaN is no agreement
            return f"vmap's {what} would be wrong by {difference:.0e}"
    return ""


def disagreement(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative distance ‖a − b‖ / ‖b‖ over the named tensors.

    A tensor that is small beside all of them together is measured by a part of their norm: the gradient of a
    convolution's bias before a batch normalization is zero, and what is computed of it is rounding.
    """
    norms = {name: value.norm() for name, value in reference.items()}
    least = LEAST_PART * torch.stack(list(norms.values())).norm()
    distances = [(ours[k] - v).norm() / torch.maximum(norms[k], least) for k, v in reference.items()]
    return float(torch.stack(distances).max())


def measure(
    algorithm: Algorithm,
    model: ModuleModel,
    state: MetaState,
    batch: TaskBatch,
    *,
    step: int,
    chunk: int | None,
    clock: Callable[[], float] | None = None,
    wall: Callable[[], float] = time.monotonic,
) -> dict[tuple[str, int | None], float]:
    """Seconds per task of a meta-gradient by (batching, tasks at once): the loop, then vmap.

    Without `chunk`, on a CPU vmap is tried with 2, 4, 8, … tasks at once until more are slower or memory would not hold
    twice as many; on a GPU with all. The loop is always measured, vmap only within BUDGET_SECONDS. One thread
    on a CPU is measured by its own time, which other processes on the machine do not enter.
    """
    share = len(batch.support_x)
    on_cpu = batch.support_x.device.type == "cpu"
    deadline = wall() + BUDGET_SECONDS
    if clock is None:
        clock = time.thread_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter

    def per_task(batching: str, at_once: int) -> float:
        tasks = batch.tasks(slice(0, at_once))
        times = []
        with _batched(model, batching):
            for repeat in range(REPEATS + 1):
                began = clock()
                algorithm.meta_grad(state, tasks, step=step)
                if tasks.support_x.is_cuda:
                    torch.cuda.synchronize(tasks.support_x.device)
                times.append((clock() - began) / len(tasks.support_x))
                if repeat and wall() > deadline:
                    break
        return min(times)

    if chunk or not on_cpu:
        at_once = min(chunk or share, share)
        measured = {("loop", chunk): per_task("loop", at_once)}
        if wall() < deadline:
            try:
                measured["vmap", chunk] = per_task("vmap", at_once)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        return measured
    measured = {("loop", 1): per_task("loop", 1)}
    idle = _resident()
    for at_once in _doubled(share):
        if wall() > deadline:
            break
        measured["vmap", at_once] = per_task("vmap", at_once)
        taken = _resident() - idle  # freed memory stays with the process: see training/memory.py
        best = min(seconds for (batching, _), seconds in measured.items() if batching == "vmap")
        if measured["vmap", at_once] > SLOWER * best or 2 * taken > MEMORY_PART * psutil.virtual_memory().available:
            break
    return measured


def _doubled(share: int) -> Iterator[int]:
    """2, 4, 8, … and last the whole share."""
    at_once = 2
    while at_once < share:
        yield at_once
        at_once *= 2
    yield share


def _resident() -> int:
    return psutil.Process().memory_info().rss


@contextmanager
def _batched(model: ModuleModel, batching: str) -> Iterator[None]:
    before = model.batching
    model.batching = batching  # type: ignore[assignment]
    try:
        yield
    finally:
        model.batching = before


def _results(algorithm: Algorithm, state: MetaState, batch: TaskBatch, step: int) -> dict[str, dict[str, Tensor]]:
    """The meta-gradient, and the answers of adapted learners, which are computed without a graph."""
    gradient: MetaGradient = algorithm.meta_grad(state, batch, step=step)
    (adapted,) = algorithm.adaptation_path(
        state,
        batch.support_x,
        batch.support_y,
        steps=algorithm.eval_steps,
        inductive=True,
        num_classes=batch.num_classes,
        last_only=True,
    )
    with torch.no_grad():
        answers: dict[str, Tensor] = {mode: algorithm.predict(adapted, batch.query_x, mode) for mode in MODES}
    return {"meta-gradient": {**gradient.grads, **gradient.statistics}, "answers": answers}


def _in_float64(batch: TaskBatch) -> TaskBatch:
    support_x, support_y, query_x, query_y = (
        part.double() if part.is_floating_point() else part for part in cast(tuple[Tensor, ...], batch[:4])
    )
    return TaskBatch(support_x, support_y, query_x, query_y, batch.keys, batch.classes)


def _as_float64(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in named.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
