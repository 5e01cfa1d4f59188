"""What every algorithm of the registry must do, on tiny networks and in process. The table of them: `entries.py`."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline import movement
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment
from pipeline.learner import Learner, write_model
from pipeline.runs import RunFolder
from pipeline.training import outer
from pipeline.training.checkpoint import CheckpointStore, TrainState
from pipeline.training.context import LocalContext
from pipeline.training.loop import train
from pipeline.training.step import GlobalGradient, global_gradient, slots_of_rank, split_tasks
from pipeline.types import MetaGradient, MetaState, TaskBatch
from tests.contract.entries import ENTRIES, TASKS, Case, build, card, cases, observed, plain, registered, sample
from tests.faults import assert_same_end, open_run

FEW_STEPS = 12
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest, tiny_data: Path, one_thread: None) -> Case:
    return Case(*request.param, tiny_data)


@pytest.fixture(scope="module", params=plain())
def plain_case(request: pytest.FixtureRequest, tiny_data: Path, one_thread: None) -> Case:
    return Case(*request.param, tiny_data)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def assert_same_gradient(ours: Any, theirs: Any, **tolerance: float) -> None:
    for field in MetaGradient._fields:
        assert_same(getattr(ours, field), getattr(theirs, field), **tolerance)


def last(case: Case, batch: TaskBatch, state: MetaState | None = None) -> Tensor:
    steps, state = case.algorithm.eval_steps, state or case.state
    path = case.algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=steps, inductive=True)
    *_, adapted = path
    return case.algorithm.predict(adapted, batch.query_x, "inductive")


def test_every_algorithm_is_covered() -> None:
    assert set(registered()) == set(ENTRIES)


def test_shapes(case: Case) -> None:
    state, gradient = case.state, case.gradient
    assert gradient.grads.keys() == state.params.keys()
    assert all(gradient.grads[k].shape == v.shape for k, v in state.params.items())
    assert all(value.ndim == 0 for value in gradient.metrics.values())
    assert any(float(g.abs().max()) > 0 for g in gradient.grads.values())
    head = set() if case.entry.has_head else set(case.parts.model.head)
    assert {name for name in state.params if "/" not in name} == set(case.parts.model.parameter_names) - head
    assert all(name.startswith(f"{case.name}/") for name in state.params if "/" in name)
    answers = last(case, case.batch)
    assert answers.shape == (*case.batch.query_y.shape[:2], case.parts.family.num_outputs)


def test_determinism_without_global_random_numbers_or_changed_inputs(case: Case) -> None:
    random_state = torch.random.get_rng_state()
    torch.manual_seed(1)  # other global random numbers than those the case was made with
    of_others = random.getstate(), np.random.mtrand._rand.get_state(legacy=False)["state"]["key"].tolist()
    try:
        state, batch = case.algorithm.init(3), sample(case.parts)
        before = [v.clone() for v in [*state.params.values(), *batch[:4]]]
        seeded = torch.random.get_rng_state()
        assert_same(state.params, case.state.params)
        assert_same_gradient(case.algorithm.meta_grad(state, batch, step=0), case.gradient)
        assert torch.equal(torch.random.get_rng_state(), seeded)
        assert (random.getstate(), np.random.mtrand._rand.get_state(legacy=False)["state"]["key"].tolist()) == of_others
    finally:
        torch.random.set_rng_state(random_state)
    assert all(torch.equal(a, b) for a, b in zip(before, [*state.params.values(), *batch[:4]], strict=True))
    assert all(v.grad is None for v in state.params.values())


def test_order_and_chunks_of_tasks_do_not_matter(case: Case) -> None:
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    state, gradient = case.later
    pieces = [case.algorithm.meta_grad(state, piece, step=1) for piece in split_tasks(case.batch.tasks(order), 4)]
    for field in MetaGradient._fields:
        whole = getattr(gradient, field)
        summed = {name: torch.stack([getattr(piece, field)[name] for piece in pieces]).sum(0) for name in whole}
        assert_same(summed, whole, **ROUNDING)


def test_the_losses_of_classes_are_told_or_refused(plain_case: Case) -> None:
    """For a sampler that weights classes by them: their sums over tasks, and nothing else changes."""
    content = plain_case.experiment.to_dict()
    content["task"]["difficulty"] = {}
    experiment = experiments.from_dict(content, source="contract")
    if not getattr(plain_case.algorithm, "tells_class_losses", False):
        with pytest.raises(ConfigError, match=r"task\.difficulty"):
            build(experiment)
        return
    told = build(experiment).algorithm.meta_grad(plain_case.state, plain_case.batch, step=0)
    assert plain_case.gradient.classes == {}
    assert_same_gradient(told._replace(classes={}), plain_case.gradient)
    assert plain_case.batch.classes is not None
    met = plain_case.batch.classes.flatten().bincount(minlength=plain_case.parts.family.train_classes or 0)
    assert torch.equal(told.classes["count"].long(), met)
    assert bool((told.classes["loss"] >= 0).all())
    assert torch.equal(told.classes["loss"] > 0, met > 0)


class OneAfterAnother(LocalContext):
    """A rank of several that run one after another in this process: the last one gets the sum over all."""

    def __init__(self, rank: int, world_size: int, sums: list[Tensor]) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self._sums, self._calls = sums, 0

    def all_reduce(self, flat: Tensor) -> None:
        if self._calls < len(self._sums):
            flat += self._sums[self._calls]
            self._sums[self._calls] = flat.clone()
        else:
            self._sums.append(flat.clone())
        self._calls += 1


def test_any_number_of_workers_gives_the_same_gradient(case: Case) -> None:
    """W = 1, 2, 4 with shares as unequal as 2, 2, 1, 1, through the step of the training loop."""
    state, whole = case.later

    def of_workers(world_size: int) -> GlobalGradient:
        sums: list[Tensor] = []
        for rank in range(world_size):
            context = OneAfterAnother(rank, world_size, sums)
            share = case.batch.tasks(slots_of_rank(context, TASKS))
            gradient = global_gradient(context, case.algorithm, state, share, step=1, chunk=None)
        assert gradient.finite
        return gradient

    mean = MetaGradient(*({name: value / TASKS for name, value in part.items()} for part in whole))
    assert_same_gradient(of_workers(1), mean)
    for world_size in (2, 4):
        assert_same_gradient(of_workers(world_size), mean, **ROUNDING)


@pytest.mark.parametrize("name", [name for name in registered() if "images" in ENTRIES[name].problems])
def test_resnet12_with_dropblock(name: str, tiny_data_set: Callable[..., Path], one_thread: None) -> None:
    """The few-shot standard under every algorithm: its masks come from keys, and it can be evaluated."""
    case = Case(name, ENTRIES[name].variants[0], "resnet12", tiny_data_set(size=16))
    assert case.parts.model.stochastic
    assert_same_gradient(case.algorithm.meta_grad(case.state, sample(case.parts), step=0), case.gradient)
    assert all(bool(value.isfinite().all()) for value in case.gradient.grads.values())
    assert all(bool((case.gradient.grads[f"block{number}.conv1.weight"] != 0).any()) for number in (1, 4))
    answers = last(case, case.batch, observed(case))
    assert bool(answers.isfinite().all())
    assert torch.equal(last(case, case.batch, observed(case)), answers)  # nothing is dropped at test


def test_tasks_do_not_see_each_other(case: Case) -> None:
    """A task's answers are the same alone and among others: nothing leaks between tasks."""
    together, alone = last(case, case.batch), last(case, case.batch.tasks(slice(2, 3)))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-10)


def test_queries_do_not_reach_the_adapted_learner(case: Case) -> None:
    """Inductive answers do not depend on which other queries are asked, nor does adaptation see any query."""
    everything = last(case, case.batch)
    first = last(case, case.batch._replace(query_x=case.batch.query_x[:, :1]))
    torch.testing.assert_close(everything[:, :1], first, rtol=1e-10, atol=1e-10)
    other = case.batch._replace(query_x=case.batch.query_x.flip(1) + 1, query_y=case.batch.query_y.roll(1, 1))
    case.algorithm.meta_grad(case.state, other, step=0)  # an algorithm keeps nothing from one call for the next
    assert torch.equal(last(case, case.batch), everything)


def test_in_training_adaptation_sees_no_query(plain_case: Case) -> None:
    """The meta-loss is the mean of what single queries give. A query that adapted the learner would break the sum."""
    if not plain_case.entry.queries_apart:
        pytest.skip("its training takes queries for more than a loss: see its entry")
    keys = {"normalization": "inductive"} if plain_case.has("normalization") else {}
    algorithm = build(plain_case.with_keys(**keys)).algorithm

    def meta_loss(queries: slice) -> Tensor:
        batch = plain_case.batch._replace(
            query_x=plain_case.batch.query_x[:, queries], query_y=plain_case.batch.query_y[:, queries]
        )
        return algorithm.meta_grad(plain_case.state, batch, step=0).metrics["meta_loss"]

    queries = plain_case.batch.query_y.shape[1]
    each = torch.stack([meta_loss(slice(i, i + 1)) for i in range(queries)])
    torch.testing.assert_close(each.mean(), meta_loss(slice(None)), rtol=1e-10, atol=1e-10)


def test_classes_may_differ_in_shots_and_be_fewer_than_outputs(plain_case: Case) -> None:
    """Of an outer step with fewer classes than there are at most. A class is its label, not its place in the set."""
    if plain_case.parts.family.train_classes is None:
        pytest.skip("its first problem has no classes")
    content = plain_case.experiment.to_dict()
    content["task"]["variable"] = {"least_n_way": 2, "most_shots": 4}
    parts = build(experiments.from_dict(content, source="contract"))
    batches = (parts.family.sample("meta_train", step, torch.arange(TASKS), seed=1) for step in range(50))
    batch = next(b for b in batches if b.num_classes == 3 and b.support_x.shape[1] > 6)
    shots = (batch.support_y.unsqueeze(-1) == torch.arange(3)).sum(1)
    assert bool((shots.amax(1) > shots.amin(1)).any())
    gradient = parts.algorithm.meta_grad(plain_case.state, batch, step=0)
    assert all(bool(value.isfinite().all()) for part in gradient for value in part.values())
    assert any(float(g.abs().max()) > 0 for g in gradient.grads.values())
    assert 0 <= float(gradient.metrics[f"train_{parts.family.objective.score_name}"]) <= TASKS

    def answers(batch: TaskBatch) -> Tensor:
        path = parts.algorithm.adaptation_path(
            plain_case.state,
            batch.support_x,
            batch.support_y,
            steps=parts.algorithm.eval_steps,
            inductive=True,
            num_classes=3,
        )
        *_, adapted = path
        return parts.algorithm.predict(adapted, batch.query_x, "inductive")[..., :3]

    ours = answers(batch)
    assert ours.shape[-1] == 3
    assert bool(ours.isfinite().all())
    last_first = batch.support_y.argsort(dim=1, descending=True, stable=True)  # classes; examples stay in their order
    x = batch.support_x[torch.arange(TASKS).unsqueeze(1), last_first]
    mixed = batch._replace(support_x=x, support_y=batch.support_y.gather(1, last_first))
    torch.testing.assert_close(answers(mixed), ours, rtol=1e-9, atol=1e-9)


def test_recomputed_inner_steps_give_the_same_gradient(case: Case) -> None:
    if not case.has("recompute_inner_steps"):
        pytest.skip("it has no inner steps to recompute")
    if not case.experiment.algorithm.differentiates_steps:
        for key in ("recompute_inner_steps", "first_order"):
            with pytest.raises(ConfigError, match=f"{key}: true changes nothing here"):
                case.with_keys(**{key: True})
        return
    other = case.with_keys(recompute_inner_steps=not case.experiment.algorithm.recompute_inner_steps)
    assert_same_gradient(build(other).algorithm.meta_grad(case.state, case.batch, step=0), case.gradient, **ROUNDING)


def test_what_it_learned_and_how_far_layers_move_can_be_told(plain_case: Case) -> None:
    algorithm, state = plain_case.algorithm, plain_case.state
    described = algorithm.describe(state)
    assert all(type(value) is float and math.isfinite(value) for value in described.values())
    assert all(re.fullmatch(r"[\w. /-]+", name) for name in described), "names that MLflow takes"
    moved = movement.measure(algorithm, plain_case.parts.family, state, episodes=3)
    assert (moved is None) == (algorithm.eval_steps == 0)
    if moved is not None:
        assert moved.distances.shape == (algorithm.eval_steps + 1, len(moved.layers), 3)
        assert bool(moved.distances.isfinite().all())
        assert bool((moved.distances[0] == 0).all())
        json.dumps(moved.to_dict(), allow_nan=False)


def test_checkpoint_round_trip(case: Case, tmp_path: Path) -> None:
    def fresh() -> TrainState:
        meta = case.algorithm.init(3)
        params = {k: v.clone().requires_grad_() for k, v in meta.params.items()}
        optimizer = outer.make_optimizer(case.experiment.training.outer, params)
        return TrainState(step=0, meta=MetaState(params, meta.buffers), optimizer=optimizer)

    state, store = fresh(), CheckpointStore(tmp_path)
    outer.update(case.experiment.training.outer, state.optimizer, state.meta.params, case.gradient.grads, lr=1e-3)
    state.meta = MetaState(state.meta.params, observed(case).buffers)
    state.step = 1
    store.save(state, data_digest="x")
    restored = fresh()
    store.restore(restored, 1, "cpu")
    assert restored.step == 1
    assert_same(restored.meta.params, state.meta.params)
    assert_same(restored.meta.buffers, state.meta.buffers)
    ours, theirs = restored.optimizer.state_dict()["state"], state.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for number, leaf in theirs.items():
        assert_same(ours[number], leaf)


class Killed(BaseException):
    pass


class KilledAfter(LocalContext):
    """A worker that ends in the middle of an outer step, with no word to the run's folder."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def observe(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == self._step:
            raise Killed


def test_killed_and_resumed_is_bit_identical(case: Case, tmp_path: Path) -> None:
    """Killed before the first checkpoint, and after it with a step that none has."""

    def run_of(name: str) -> tuple[Experiment, RunFolder]:
        experiment = case.with_keys(training={"steps": 4, "validate_every": 2}, runs=tmp_path / name)
        return experiment, open_run(experiment)

    experiment, undisturbed = run_of("undisturbed")
    train(LocalContext(), experiment, undisturbed)
    experiment, killed = run_of("killed")
    for step in (1, 3):
        with pytest.raises(Killed):
            train(KilledAfter(step), experiment, killed)
    assert killed.checkpoints.steps() == [2]
    train(LocalContext(), experiment, killed)
    assert_same_end(killed, undisturbed)


def test_the_learner_in_a_folder_answers_the_same(case: Case, tmp_path: Path) -> None:
    state = observed(case)
    write_model(tmp_path / "model", card(case), state)
    learner = Learner.from_folder(tmp_path / "model")
    batch = case.batch.tasks(slice(0, 1))
    answers = learner.adapt(batch.support_x[0], batch.support_y[0]).predict(batch.query_x[0])
    steps = case.algorithm.eval_steps
    *_, adapted = case.algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=steps, inductive=True)
    expected = case.parts.family.objective.answers(case.algorithm.predict(adapted, batch.query_x, "inductive")[0])
    torch.testing.assert_close(torch.from_numpy(answers), expected, rtol=1e-10, atol=1e-10)


def test_a_few_outer_steps_reduce_the_meta_loss(case: Case) -> None:
    """Of always the same tasks."""
    params = {k: v.clone().requires_grad_() for k, v in case.state.params.items()}
    config = case.experiment.training.outer
    optimizer = outer.make_optimizer(config, params)
    losses = []
    for step in range(FEW_STEPS):
        gradient = case.algorithm.meta_grad(MetaState(params, {}), case.batch, step=step)
        losses.append(float(gradient.metrics["meta_loss"]))
        outer.update(config, optimizer, params, gradient.grads, lr=case.entry.outer_lr)
    assert losses[-1] < 0.9 * losses[0]


def test_inductive_prediction_needs_its_statistics(case: Case) -> None:
    path = case.algorithm.adaptation_path(
        case.state, case.batch.support_x, case.batch.support_y, steps=0, inductive=False, last_only=True
    )
    (adapted,) = path
    with pytest.raises(ValueError, match="inductive=True"):
        case.algorithm.predict(adapted, case.batch.query_x, "inductive")
