"""What every worker runs. Knows neither Ray nor MLflow: only its context and the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline import experiment as experiments
from pipeline.errors import TrainingStopped
from pipeline.experiment import Components, Experiment
from pipeline.runs import JOURNAL_FILE, RunFolder
from pipeline.training import outer
from pipeline.training.checkpoint import TrainState
from pipeline.training.context import Context
from pipeline.training.evaluate import SELECTION_SEED, evaluate, summarize
from pipeline.training.journal import JournalWriter
from pipeline.training.memory import keep_freed_memory
from pipeline.training.step import global_gradient, slots_of_rank
from pipeline.types import MetaState, TaskBatch


def train(context: Context, experiment: Experiment, run: RunFolder) -> None:
    """Train from the run's latest checkpoint, or from the start, to the last step.

    Raises TrainingStopped: too many outer steps in a row were not finite; the last good checkpoint is kept.
    """
    keep_freed_memory()
    torch.set_num_threads(experiment.training.cpus_per_worker)
    parts = experiments.build(experiment, device=context.device)
    state = _initial_state(experiment, parts, context.device)
    latest = run.checkpoints.latest()
    if latest is not None:
        run.checkpoints.restore(state, latest, context.device)
    journal = JournalWriter(run.path / JOURNAL_FILE, resume_step=state.step) if context.rank == 0 else None

    total = experiment.training.steps
    with journal or nullcontext():
        for batch in _training_batches(context, experiment, parts, first_step=state.step):
            metrics = _outer_step(context, experiment, parts, state, batch)
            validating = state.step % experiment.training.validate_every == 0 or state.step == total
            if validating and state.skipped_in_a_row < experiment.training.max_nonfinite_steps:
                metrics |= _validate(context, experiment, parts, state, run)
            if journal:
                journal.append(state.step, metrics)
            _stop_if_not_finite(experiment, state, check_params=validating)
            if validating:
                if journal:
                    journal.flush()  # before the checkpoint: a resumed run keeps the lines up to its step
                    run.checkpoints.save(state, data_digest=run.read()["data_digest"])
                context.report({"step": state.step, **metrics})


def _initial_state(experiment: Experiment, parts: Components, device: torch.device) -> TrainState:
    meta = parts.algorithm.init(experiment.seed)  # the same on every rank: no broadcast needed
    params = {name: value.to(device).requires_grad_() for name, value in meta.params.items()}
    optimizer = outer.make_optimizer(experiment.training.outer, params)
    return TrainState(step=0, meta=MetaState(params, meta.buffers), optimizer=optimizer)


def _training_batches(
    context: Context, experiment: Experiment, parts: Components, *, first_step: int
) -> Iterator[TaskBatch]:
    """This rank's share of every outer step's meta-batch; drawn one step ahead where drawing waits for a disk."""
    slots = slots_of_rank(context, experiment.training.meta_batch_size)

    def draw(step: int) -> TaskBatch:
        return parts.family.sample("meta_train", step, slots, seed=experiment.seed)

    steps = range(first_step, experiment.training.steps)
    if not parts.family.prefetch:
        yield from map(draw, steps)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(draw, first_step)
        for step in steps:
            batch = ahead.result()
            if step + 1 in steps:
                ahead = pool.submit(draw, step + 1)
            yield batch


def _outer_step(
    context: Context, experiment: Experiment, parts: Components, state: TrainState, batch: TaskBatch
) -> dict[str, float]:
    """One outer step, in place on `state`; a step with anything not finite is counted and changes nothing else."""
    config = experiment.training
    started = time.perf_counter()
    gradient = global_gradient(
        context,
        parts.algorithm,
        state.meta,
        batch,
        step=state.step,
        chunk=experiments.task_chunk(experiment, parts, context.device),
    )
    lr = outer.outer_lr(config.outer, state.step, config.steps, state.plateau)
    metrics = {"outer_lr": lr}
    if gradient.finite:
        norm = outer.update(config.outer, state.optimizer, state.meta.params, gradient.grads, lr=lr)
        buffers = parts.algorithm.update_buffers(state.meta.buffers, gradient.statistics)
        state.meta = MetaState(state.meta.params, buffers)
        state.skipped_in_a_row = 0
        metrics |= {name: float(value) for name, value in gradient.metrics.items()}
        metrics["meta_grad_norm"] = float(norm)
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.step += 1
    seconds = time.perf_counter() - started
    metrics["tasks_per_second"] = config.meta_batch_size / seconds
    metrics["skipped_steps"] = state.skipped
    return metrics


def _stop_if_not_finite(experiment: Experiment, state: TrainState, *, check_params: bool) -> None:
    """Every rank has the same state, so all of them stop, or none. Raises TrainingStopped."""
    reason = ""
    if state.skipped_in_a_row >= experiment.training.max_nonfinite_steps:
        reason = f"the meta-gradient was not finite {state.skipped_in_a_row} times in a row"
    elif check_params and not all(bool(value.isfinite().all()) for value in state.meta.params.values()):
        reason = "the meta-parameters are not finite any more"
    if reason:
        raise TrainingStopped(
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
        chunk=experiments.task_chunk(experiment, parts, context.device),
        context=context,
    )
    score = evaluation.score(experiment.evaluation.selection_mode).mean
    finite = bool(evaluation.losses.isfinite().all())  # an accuracy is a number even where the outputs are not
    improved = finite and state.best.improves(score, higher_is_better=parts.family.objective.higher_is_better)
    if improved:
        state.best.step, state.best.score = state.step, score
    state.plateau.after_validation(experiment.training.outer, improved=improved)
    return summarize(evaluation, "val")


def train_worker(context: Context, content: dict[str, Any], run_path: str) -> None:
    """`train` with plain arguments, which travel to other processes."""
    train(context, experiments.from_dict(content, source=run_path), RunFolder(Path(run_path)))
