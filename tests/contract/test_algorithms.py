"""What every algorithm of the registry must do, on tiny networks and in process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import experiment as experiments
from pipeline.algorithms import ALGORITHMS
from pipeline.experiment import Components
from pipeline.kernels import native
from pipeline.learner import Learner, card_of, write_model
from pipeline.training import outer
from pipeline.training.checkpoint import CheckpointStore, TrainState
from pipeline.training.step import split_tasks
from pipeline.types import MetaGradient, MetaState, TaskBatch

TASKS = 6
REQUIRED = {name: {"inner_lr": 0.1} for name in ("maml", "anil", "boil")}  # keys without a default
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "maml": [
        {},
        {"first_order": True},
        {"adaptation_steps": 3},
        {"normalization": "inductive"},
        {"inductive_statistics": "running"},
        {"inner_optimizer": "adam", "inner_lr": 0.01, "adaptation_steps": 2, "inner_gradient_clip": 1.0},
        {"inner_momentum": 0.9, "inner_weight_decay": 0.01, "adaptation_steps": 2, "recompute_inner_steps": True},
    ],
    "anil": [{}, {"adaptation_steps": 3, "recompute_inner_steps": True}],
    "boil": [{}],
}
IMAGES = {"family": "images", "split": "random", "n_query": 3, "eval_n_query": 3}
MODULE = {"name": "module", "factory": f"{__name__}:network", "dropout": True}
CONV4 = {"name": "conv4", "hidden": 16, "downsample": "stride"}
KERNELS = ("pure", "closed", "native")
# name: task, model, kernel
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "images": (IMAGES, {"name": "mlp", "hidden": [16], "normalization": "batch"}, "auto"),
    "sinusoid": ({"family": "sinusoid"}, {"name": "mlp", "hidden": [16]}, "auto"),
    "module by loop": (IMAGES, {**MODULE, "batching": "loop"}, "auto"),
    "module by vmap": (IMAGES, {**MODULE, "batching": "vmap"}, "auto"),
    **{f"conv4 {kernel}": (IMAGES, CONV4, kernel) for kernel in KERNELS},
}
pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL_VARIANTS = [{}, {"inductive_statistics": "running"}]  # the others are MAML's, whatever the kernel


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 5)
    )


def algorithm_names() -> list[str]:
    return [config.model_fields["name"].annotation.__args__[0] for config in ALGORITHMS]


def cases() -> list:
    return [
        pytest.param((name, variant, problem), id="-".join([name, problem, *(f"{k}={v}" for k, v in variant.items())]))
        for name in algorithm_names()
        for problem in PROBLEMS
        for variant in VARIANTS.get(name, [{}])
        if variant in KERNEL_VARIANTS or not problem.startswith("conv4")
    ]


def experiment_of(name: str, variant: dict, problem: str, data: Path) -> experiments.Experiment:
    task, model, kernel = PROBLEMS[problem]
    if task["family"] == "images":
        task = {**task, "data": str(data)}
    content = {
        "name": "contract",
        "task": task,
        "model": model,
        "algorithm": {"name": name, **REQUIRED.get(name, {}), **variant},
        "training": {
            "steps": 1,
            "backend": "local",
            "dtype": "float64",
            "meta_batch_size": TASKS,
            "kernel": kernel,
        },
    }
    return experiments.from_dict(content, source="contract")


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest, tiny_data: Path) -> tuple[experiments.Experiment, Components]:
    if request.param[2] == "conv4 native" and native.why_not():
        pytest.skip(f"no native kernels here: {native.why_not()}")
    experiment = experiment_of(*request.param, tiny_data)
    return experiment, experiments.build(experiment, device=torch.device("cpu"))


def sample(parts: Components, tasks: int = TASKS) -> TaskBatch:
    return parts.family.sample("meta_train", 0, torch.arange(tasks), seed=1)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def last(parts: Components, state: MetaState, batch: TaskBatch) -> Tensor:
    steps = parts.algorithm.eval_steps
    path = parts.algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=steps, inductive=True)
    *_, adapted = path
    return parts.algorithm.predict(adapted, batch.query_x, "inductive")


def test_every_algorithm_is_covered() -> None:
    assert set(algorithm_names()) == set(VARIANTS)


def test_shapes_and_determinism_without_global_random_numbers(case: tuple) -> None:
    _, parts = case
    random_state = torch.random.get_rng_state()
    state = parts.algorithm.init(3)
    gradient = parts.algorithm.meta_grad(state, sample(parts), step=0)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert gradient.grads.keys() == state.params.keys()
    assert all(gradient.grads[k].shape == v.shape for k, v in state.params.items())
    assert all(value.ndim == 0 for value in gradient.metrics.values())
    assert any(float(g.abs().max()) > 0 for g in gradient.grads.values())
    again = parts.algorithm.meta_grad(parts.algorithm.init(3), sample(parts), step=0)
    for ours, theirs in zip(again, gradient, strict=True):
        assert_same(ours, theirs)


def test_meta_grad_leaves_its_inputs_alone(case: tuple) -> None:
    _, parts = case
    state, batch = parts.algorithm.init(3), sample(parts)
    before = [v.clone() for v in [*state.params.values(), *batch[:4]]]
    parts.algorithm.meta_grad(state, batch, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, [*state.params.values(), *batch[:4]], strict=True))
    assert all(v.grad is None for v in state.params.values())


def test_order_and_chunks_of_tasks_do_not_matter(case: tuple) -> None:
    _, parts = case
    state, batch = parts.algorithm.init(3), sample(parts)
    whole = parts.algorithm.meta_grad(state, batch, step=0)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    pieces = split_tasks(batch.tasks(order), 4)
    parts_of_it = [parts.algorithm.meta_grad(state, piece, step=0) for piece in pieces]
    for field in MetaGradient._fields:
        add = functools.partial(_sum, [getattr(piece, field) for piece in parts_of_it])
        assert_same({k: add(k) for k in getattr(whole, field)}, getattr(whole, field), rtol=1e-10, atol=1e-12)


def _sum(pieces: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([piece[name] for piece in pieces]).sum(0)


def test_tasks_do_not_see_each_other(case: tuple) -> None:
    """A task's answers are the same alone and among others: nothing leaks between tasks."""
    _, parts = case
    state, batch = parts.algorithm.init(3), sample(parts)
    together = last(parts, state, batch)
    alone = last(parts, state, batch.tasks(slice(2, 3)))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-10)


def test_queries_do_not_reach_the_adapted_learner(case: tuple) -> None:
    """Inductive answers do not depend on which other queries are asked, nor does adaptation see any query."""
    _, parts = case
    state, batch = parts.algorithm.init(3), sample(parts)
    everything = last(parts, state, batch)
    first = last(parts, state, batch._replace(query_x=batch.query_x[:, :1]))
    torch.testing.assert_close(everything[:, :1], first, rtol=1e-10, atol=1e-10)


def test_checkpoint_round_trip(case: tuple, tmp_path: Path) -> None:
    experiment, parts = case

    def fresh() -> TrainState:
        meta = parts.algorithm.init(3)
        params = {k: v.clone().requires_grad_() for k, v in meta.params.items()}
        optimizer = outer.make_optimizer(experiment.training.outer, params)
        return TrainState(step=0, meta=MetaState(params, meta.buffers), optimizer=optimizer)

    def advance(state: TrainState) -> None:
        gradient = parts.algorithm.meta_grad(state.meta, sample(parts), step=state.step)
        outer.update(experiment.training.outer, state.optimizer, state.meta.params, gradient.grads, lr=1e-3)
        buffers = parts.algorithm.update_buffers(state.meta.buffers, gradient.statistics)
        state.meta = MetaState(state.meta.params, buffers)
        state.step += 1

    state, store = fresh(), CheckpointStore(tmp_path)
    advance(state)
    store.save(state, data_digest="x")
    restored = fresh()
    store.restore(restored, 1, "cpu")
    advance(state)
    advance(restored)
    assert_same(restored.meta.params, state.meta.params)
    assert_same(restored.meta.buffers, state.meta.buffers)


def test_the_learner_in_a_folder_answers_the_same(case: tuple, tmp_path: Path) -> None:
    experiment, parts = case
    batch = sample(parts).tasks(slice(0, 1))
    state = parts.algorithm.init(3)
    observed = parts.algorithm.meta_grad(state, batch, step=0).statistics
    state = MetaState(state.params, parts.algorithm.update_buffers({}, observed))
    card = card_of(
        experiment,
        objective=parts.family.objective.name,
        input_shape=parts.family.input_shape,
        num_outputs=parts.family.num_outputs,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    write_model(tmp_path / "model", card, state)
    learner = Learner.from_folder(tmp_path / "model")
    answers = learner.adapt(batch.support_x[0], batch.support_y[0]).predict(batch.query_x[0])
    expected = parts.family.objective.answers(last(parts, state, batch)[0])
    torch.testing.assert_close(torch.from_numpy(answers), expected, rtol=1e-10, atol=1e-10)


def test_a_few_outer_steps_reduce_the_meta_loss(case: tuple) -> None:
    experiment, parts = case
    state = parts.algorithm.init(3)
    params = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    config = experiment.training.outer.model_copy(update={"outer_lr": 0.01})
    optimizer = outer.make_optimizer(config, params)
    losses = []
    for step in range(30):
        gradient = parts.algorithm.meta_grad(MetaState(params, {}), sample(parts), step=step)
        losses.append(float(gradient.metrics["meta_loss"]))
        outer.update(config, optimizer, params, gradient.grads, lr=0.01)
    assert losses[-1] < 0.9 * losses[0]
