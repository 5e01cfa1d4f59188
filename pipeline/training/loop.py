"""What every worker runs. Knows neither Ray nor MLflow: only its context and the run's folder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline.errors import DataError, StopRequested, TrainingStopped
from pipeline.experiment import Components, Experiment
from pipeline.runs import RunFolder
from pipeline.training import hardware, outer
from pipeline.training import plan as plans
from pipeline.training.ahead import results
from pipeline.training.checkpoint import TrainState
from pipeline.training.compiled import Compiled
from pipeline.training.context import Context
from pipeline.training.evaluate import SELECTION_SEED, evaluate, summarize
from pipeline.training.journal import JournalWriter
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import Plan
from pipeline.training.queue import Fetched, seconds_between
from pipeline.training.step import QueuedGradient, Told, queue_gradient, slots_of_rank
from pipeline.types import MetaState, TaskBatch


def train(context: Context, experiment: Experiment, run: RunFolder) -> None:
    """Train from the run's latest checkpoint, or from the start, to the last step.

    Raises TrainingStopped: too many outer steps in a row were not finite, or the run's folder cannot be written; the
    last good checkpoint is kept. StopRequested: a rank was asked to end; there is a checkpoint of the step it reached.
    """
    keep_freed_memory()
    torch.set_num_threads(experiment.training.cpus_per_worker)
    parts = experiments.build(experiment, device=context.device)
    state = _initial_state(experiment, parts, run, context.device)
    latest = run.checkpoints.latest()
    if latest is not None:
        run.checkpoints.restore(state, latest, context.device)
    total = experiment.training.steps
    state.plan = _plan(context, experiment, parts, state, run)
    if experiment.training.compile:  # after planning, which measures and compares what a program would hide
        parts = parts._replace(algorithm=Compiled(parts.algorithm))
    if context.rank == 0:
        _note_start(context, experiment, state, run)
    steps_late = _steps_late(context.device)
    queued: deque[_QueuedStep] = deque()
    clock = _Clock()
    with _written(run, state), _journal(context, run, state) as journal:
        if total == 0 and latest is None:
            metrics = _validate(context, experiment, parts, state, run)
            if journal:
                run.checkpoints.save(state, data_digest=run.read()["data_digest"])
            context.report({"step": 0, **metrics})
        for batch in _training_batches(context, experiment, parts, state, clock):
            queued.append(_queue_outer_step(context, experiment, parts, state, batch, clock, late=steps_late > 0))
            validating = state.step % experiment.training.validate_every == 0 or state.step == total
            stop, not_finite = False, ""
            while len(queued) > (0 if validating or stop or not_finite else steps_late):
                step = queued.popleft()
                metrics, asked = _finish_outer_step(context, experiment, state, step, clock)
                stop = stop or asked
                newest = step.number == state.step
                if newest and validating and state.skipped_in_a_row < experiment.training.max_nonfinite_steps:
                    metrics |= _validate(context, experiment, parts, state, run)
                    if parts.family.weighting and state.classes:
                        metrics |= parts.family.weighting.describe(state.classes)
                context.observe({"step": step.number, **metrics})
                if journal:
                    journal.append(step.number, metrics)
                check_params = newest and (validating or stop)
                not_finite = not_finite or _reason_to_give_up(experiment, state, check_params=check_params)
            if journal and (validating or stop or not_finite):
                journal.flush()  # before the checkpoint: a resumed run keeps the lines up to its step
            if journal and (validating or stop) and not not_finite:
                run.checkpoints.save(state, data_digest=run.read()["data_digest"])
            if not_finite or (stop and state.step < total):
                context.all_reduce(torch.zeros(1, device=context.device))  # nobody leaves before rank 0 has written
            if not_finite:
                raise TrainingStopped(not_finite)
            if validating:
                context.report({"step": state.step, **metrics})
            if stop and state.step < total:
                raise StopRequested(
                    f"{run.path}: stopped on request at outer step {state.step} of {total}, with a checkpoint. Run the "
                    "same command again to go on from there."
                )


@contextmanager
def _written(run: RunFolder, state: TrainState) -> Iterator[None]:
    """A full disk, or an object store that refuses, ends the training with what to do."""
    try:
        yield
    except OSError as error:
        try:
            kept = run.checkpoints.latest()
        except OSError:
            kept = None
        raise TrainingStopped(
            f"{run.path}: cannot be written at outer step {state.step} ({error.strerror or error}). "
            + (f"The checkpoint of step {kept} is whole. " if kept is not None else "")
            + "Make room or restore the storage, then run the same command again to go on."
        ) from error


@contextmanager
def _journal(context: Context, run: RunFolder, state: TrainState) -> Iterator[JournalWriter | None]:
    """Rank 0's journal; the other ranks write none."""
    if context.rank != 0:
        yield None
        return
    with JournalWriter(run.journal, resume_step=state.step) as journal:
        yield journal


def _initial_state(experiment: Experiment, parts: Components, run: RunFolder, device: torch.device) -> TrainState:
    """The same on every rank, without a broadcast. Raises DataError: the weights to start from are not in the run."""
    meta, given = parts.algorithm.init(experiment.seed), run.initial()
    if given is None and experiments.initial_weights(experiment) is not None:
        raise DataError(f"{run.path}: has no weights to start from; it was not made by this package. Start anew.")
    params, buffers = meta
    if given is not None:
        params, buffers = params | given.params, buffers | given.buffers
    frozen = experiments.frozen_names(experiment, parts, params)
    params = {name: value.to(device).requires_grad_() for name, value in params.items()}
    buffers = {name: value.to(device) for name, value in buffers.items()}
    learned = {name: value for name, value in params.items() if name not in frozen}
    optimizer = outer.make_optimizer(experiment.training.outer, learned)
    classes = parts.family.weighting.start() if parts.family.weighting else None
    return TrainState(
        step=0, meta=MetaState(params, buffers), optimizer=optimizer, classes=classes, frozen=frozenset(frozen)
    )


def _plan(context: Context, experiment: Experiment, parts: Components, state: TrainState, run: RunFolder) -> Plan:
    """The checkpoint's plan, or that of an attempt that ended before its first checkpoint, or a new one."""
    earlier = run.read().get("plan")
    known = state.plan or (Plan(**earlier) if earlier else None)
    if known is not None:
        return plans.resumed(context, known, parts.model)

    def draw(tasks: int) -> TaskBatch:
        return parts.family.largest(tasks, seed=experiment.seed)

    return plans.choose(
        context,
        parts.algorithm,
        parts.model,
        state.meta,
        draw,
        share=len(slots_of_rank(context, experiment.training.meta_batch_size)),
        chunk=experiments.task_chunk(experiment, parts, context.device),
        memory=experiment.training.memory_bytes,
        steps=(0, max(experiment.training.steps - 1, 0)),
    )


def _note_start(context: Context, experiment: Experiment, state: TrainState, run: RunFolder) -> None:
    """Leave the run's folder how it is computed, and on what; a run that goes on elsewhere has several machines."""
    assert state.plan is not None
    here = hardware.of_worker(context, threads=experiment.training.cpus_per_worker)
    earlier = run.read().get("hardware", [])
    run.update(plan=state.plan._asdict(), hardware=[*earlier, *([] if here in earlier else [here])])


def _training_batches(
    context: Context, experiment: Experiment, parts: Components, state: TrainState, clock: _Clock
) -> Iterator[TaskBatch]:
    """This rank's share of every outer step's meta-batch; drawn one step ahead where drawing waits for a disk.

    Takes the next step after `state.step`, which whoever asks for the batches counts up. Tells the clock how long each
    one was waited for.
    """
    slots = slots_of_rank(context, experiment.training.meta_batch_size)
    on_device = slots.to(context.device)

    def weights(step: int) -> Tensor | None:
        """As they are when this is asked; by the time it is drawn in a thread the state may be a step further."""
        if parts.family.weighting is None or state.classes is None:
            return None
        return parts.family.weighting.weights(state.classes, step, completed=state.step)

    def draw(step: int, weights: Tensor | None) -> TaskBatch:
        if weights is None:
            return parts.family.sample("meta_train", step, slots, seed=experiment.seed)
        return parts.family.sample("meta_train", step, on_device, seed=experiment.seed, weights=weights)

    def waited(seconds: float) -> None:
        clock.data_seconds = seconds

    draws = (partial(draw, step, weights(step)) for step in range(state.step, experiment.training.steps))
    with closing(results(draws, ahead=parts.family.prefetch, waited=waited)) as batches:
        yield from batches


@dataclass
class _Clock:
    """What the next outer step needs to know of the ones before it."""

    finished: float = 0.0  # host seconds when the last one's numbers were there
    compute_seconds: float = 0.0  # that this rank took for the last one it knows of
    data_seconds: float = 0.0  # that this rank waited for the episodes it has now


class _QueuedStep(NamedTuple):
    """An outer step that has been computed, or on a GPU will be."""

    number: int  # outer steps completed with it
    chunk: int | None  # tasks at once that were asked for
    lr: float
    data_seconds: float  # that this rank waited for its episodes
    gradient: QueuedGradient
    metric_names: list[str]
    numbers: Fetched  # finite, the metrics, the gradient's norm, then what the ranks told
    started: float  # host seconds


def _steps_late(device: torch.device) -> int:
    """Outer steps whose numbers the host leaves for later: on a GPU one, so that it always has the next one queued."""
    return 1 if device.type == "cuda" else 0


def _queue_outer_step(
    context: Context,
    experiment: Experiment,
    parts: Components,
    state: TrainState,
    batch: TaskBatch,
    clock: _Clock,
    *,
    late: bool,
) -> _QueuedStep:
    """One outer step, in place on `state`; with anything not finite it changes neither parameters nor optimizer.

    `late`: the host does not look whether it is finite, the device decides. What else is to be done about the step
    `_finish_outer_step` does when its numbers are there.
    """
    config = experiment.training
    assert state.plan is not None
    started = time.perf_counter()
    gradient = queue_gradient(
        context,
        parts.algorithm,
        state.meta,
        batch,
        step=state.step,
        chunk=state.plan.chunk,
        previous_seconds=clock.compute_seconds,
    )
    lr = outer.outer_lr(config.outer, state.step, config.steps, state.plateau)
    params, buffers = state.meta
    norm = torch.zeros_like(gradient.told[0])
    grads = {name: gradient.grads[name] for name in state.learned}
    # the first statistics make the buffers, and whether there are any is the host's to know
    if late and gradient.statistics.keys() <= buffers.keys():
        finite = gradient.finite
        norm = outer.update_where(finite, config.outer, state.optimizer, state.learned, grads, lr=lr)
        new = parts.algorithm.update_buffers(buffers, gradient.statistics)
        buffers = buffers | {name: torch.where(finite, value, buffers[name]) for name, value in new.items()}
    elif gradient.finite:
        norm = outer.update(config.outer, state.optimizer, state.learned, grads, lr=lr)
        buffers = parts.algorithm.update_buffers(buffers, gradient.statistics)
    state.meta = MetaState(params, buffers)
    if parts.family.weighting and state.classes:
        state.classes = parts.family.weighting.after_step(state.classes, gradient.classes, gradient.finite)
    state.step += 1
    first = torch.stack([gradient.finite.to(norm.dtype), *gradient.metrics.values(), norm])
    numbers = Fetched(torch.cat([first, gradient.told]))
    return _QueuedStep(
        state.step, state.plan.chunk, lr, clock.data_seconds, gradient, list(gradient.metrics), numbers, started
    )


def _finish_outer_step(
    context: Context, experiment: Experiment, state: TrainState, step: _QueuedStep, clock: _Clock
) -> tuple[dict[str, float], bool]:
    """Wait for a step's numbers and count it. Returns its metrics, and whether a rank was asked to end."""
    finite, *values = step.numbers.wait()
    names = [*step.metric_names, "meta_grad_norm"]
    told = Told.of(values[len(names) :])
    metrics = {"outer_lr": step.lr}
    if finite:
        state.skipped_in_a_row = 0
        metrics |= dict(zip(names, values, strict=False))
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    if told.chunk != step.chunk:
        assert state.plan is not None
        state.plan = state.plan._replace(chunk=told.chunk)
        metrics["task_chunk"] = float(told.chunk or 0)
    clock.compute_seconds = seconds_between(step.gradient.started, step.gradient.computed)
    began, clock.finished = max(step.started, clock.finished), time.perf_counter()
    seconds = clock.finished - began
    metrics["tasks_per_second"] = experiment.training.meta_batch_size / seconds
    metrics["skipped_steps"] = state.skipped
    metrics["step_seconds"] = seconds
    metrics["data_seconds"] = step.data_seconds
    metrics["all_reduce_seconds"] = seconds_between(step.gradient.computed, step.gradient.reduced)
    metrics["compute_seconds_mean"] = sum(told.compute_seconds) / len(told.compute_seconds)
    metrics["compute_seconds_max"] = max(told.compute_seconds)
    metrics["num_workers"] = context.world_size
    metrics["slowest_rank"] = told.compute_seconds.index(max(told.compute_seconds))
    return metrics, told.stop


def _reason_to_give_up(experiment: Experiment, state: TrainState, *, check_params: bool) -> str:
    """Every rank has the same state, so all of them stop, or none. Empty where training goes on."""
    reason = ""
    if state.skipped_in_a_row >= experiment.training.max_nonfinite_steps:
        reason = f"the meta-gradient was not finite {state.skipped_in_a_row} times in a row"
    elif check_params and not all(bool(value.isfinite().all()) for value in state.meta.params.values()):
        reason = "the meta-parameters are not finite any more"
    return reason and (
        f"training stopped at outer step {state.step}: {reason}. The last good checkpoint is kept. Lower "
        "algorithm.inner_lr or training.outer.outer_lr, or set training.outer.gradient_clip, and start anew with "
        "--fresh."
    )


def _validate(
    context: Context, experiment: Experiment, parts: Components, state: TrainState, run: RunFolder
) -> dict[str, float]:
    """Score the fixed selection episodes; updates `state.best` and the plateau."""
    evaluation = evaluate(
        parts.algorithm,
        parts.family,
        state.meta,
        split="meta_val",
        seed=SELECTION_SEED,
        episodes=experiment.evaluation.validation_episodes,
        data_digest=run.read()["data_digest"],
        chunk=state.plan.chunk if state.plan else None,
        last_only=True,
        context=context,
    )
    score = evaluation.score(experiment.evaluation.selection_mode).mean
    finite = bool(evaluation.losses.isfinite().all())  # an accuracy is a number even where the outputs are not
    improved = finite and state.best.improves(score, higher_is_better=parts.family.objective.higher_is_better)
    if improved:
        state.best.step, state.best.score = state.step, score
    state.plateau.after_validation(experiment.training.outer, improved=improved)
    learned = parts.algorithm.describe(state.meta)
    return summarize(evaluation, "val") | {f"learned/{name}": value for name, value in learned.items()}


def train_worker(context: Context, content: dict[str, Any], run_path: str) -> None:
    """`train` with plain arguments, which travel to other processes."""
    train(context, experiments.from_dict(content, source=run_path, stored=True), RunFolder(run_path))
