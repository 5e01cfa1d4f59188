"""MANN against a reference that reads one episode after another, one row of the memory at a time, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import experiment as experiments
from pipeline import keys, workflow
from pipeline.algorithms.mann import MANN, MANNConfig, by_instance, perplexity
from pipeline.errors import ConfigError
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.training.evaluate import TEST_SEED
from pipeline.types import MetaState, Params, TaskBatch

TASKS, N_WAY, K_SHOT, N_QUERY, INPUTS, HIDDEN = 2, 3, 2, 2, 4, 5
UNITS, ROWS, WIDTH, READS, DECAY = 4, 6, 3, 2, 0.9


def learner(**settings: Any) -> MANN:
    sizes = {"controller_units": UNITS, "memory_rows": ROWS, "memory_width": WIDTH, "reads": READS}
    config = MANNConfig(name="mann", usage_decay=DECAY, **{**sizes, **settings})
    model = MLPConfig(name="mlp", hidden=[HIDDEN]).build(input_shape=(INPUTS,), num_outputs=N_WAY, dtype=torch.float64)
    return MANN(config, model=model, objective=Classification())


def random_state(algorithm: MANN) -> MetaState:
    generator = torch.Generator().manual_seed(5)
    params = algorithm.init(0).params
    noise = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in params.items()}
    return MetaState({k: v + 0.5 * noise[k] for k, v in params.items()}, {})


def batch(*, with_keys: bool = False) -> TaskBatch:
    """Labels by class, as the families give them."""
    generator = torch.Generator().manual_seed(4)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, N_WAY * per_class, INPUTS, generator=generator, dtype=torch.float64)
        return x, torch.arange(N_WAY).repeat_interleave(per_class).expand(TASKS, -1)

    drawn = keys.of_episodes(0, 0, 0, torch.arange(TASKS)) if with_keys else None
    return TaskBatch(*part(K_SHOT), *part(N_QUERY), keys=drawn)


class Reference:
    """One episode's network, by the numbers of the paper's equations."""

    def __init__(self, params: Params, *, strength: bool = False, add_vector: bool = False) -> None:
        self.p = params
        self.strength, self.add_vector = strength, add_vector
        zeros = torch.zeros(WIDTH, dtype=torch.float64)
        self.h = self.c = torch.zeros(UNITS, dtype=torch.float64)
        self.memory = [zeros] * ROWS
        self.read = [zeros] * READS
        self.read_weights = [[zeros[0]] * ROWS for _ in range(READS)]
        self.usage = [zeros[0]] * ROWS
        self.gates: list[Tensor] = []

    def step(self, x: Tensor, previous: int | None) -> Tensor:
        """Logits for an image [INPUTS] after the label of the one before."""
        p = self.p
        features = (p["layer1.weight"] @ x + p["layer1.bias"]).clamp_min(0)
        label = torch.zeros(N_WAY, dtype=torch.float64)
        if previous is not None:
            label[previous] = 1
        inputs, before = torch.cat([features, label]), torch.cat([self.h, *self.read])
        total = p["mann/input.weight"] @ inputs + p["mann/input.bias"]
        total = total + p["mann/recurrent.weight"] @ before + p["mann/recurrent.bias"]
        enter, forget, leave, new = total.view(4, UNITS)
        self.c = torch.sigmoid(forget) * self.c + torch.sigmoid(enter) * torch.tanh(new)
        self.h = torch.sigmoid(leave) * torch.tanh(self.c)

        heads = p["mann/heads.weight"] @ self.h + p["mann/heads.bias"]
        read_keys = torch.tanh(heads[: READS * WIDTH]).view(READS, WIDTH)
        gates = torch.sigmoid(heads[READS * WIDTH : READS * WIDTH + READS])
        rest = heads[READS * WIDTH + READS :]
        strengths = torch.log1p(rest[:READS].exp()) if self.strength else torch.ones(READS, dtype=torch.float64)
        added = torch.tanh(rest[-READS * WIDTH :]).view(READS, WIDTH) if self.add_vector else read_keys
        self.gates.append(gates)
        least = sorted(range(ROWS), key=lambda row: float(self.usage[row].detach()))[:READS]  # eq. 6
        memory = [torch.zeros_like(row) if i in least else row for i, row in enumerate(self.memory)]
        usage = [DECAY * used for used in self.usage]
        for head in range(READS):
            for i in range(ROWS):
                free = 1.0 if least[head] == i else 0.0
                weight = gates[head] * self.read_weights[head][i] + (1 - gates[head]) * free  # eq. 7
                memory[i] = memory[i] + weight * added[head]  # eq. 8
                usage[i] = usage[i] + weight
        self.memory = memory
        for head in range(READS):
            length = (read_keys[head].square().sum() + 1e-8).sqrt()
            cosines = [read_keys[head] @ row / length / (row.square().sum() + 1e-8).sqrt() for row in memory]  # eq. 2
            weights = (strengths[head] * torch.stack(cosines)).softmax(0)  # eq. 3
            self.read_weights[head] = list(weights)
            self.read[head] = sum(
                (w * row for w, row in zip(weights, memory, strict=True)), torch.zeros_like(memory[0])
            )
            usage = [used + w for used, w in zip(usage, weights, strict=True)]  # eq. 5
        self.usage = usage
        return p["mann/answer.weight"] @ torch.cat([self.h, *self.read]) + p["mann/answer.bias"]


def interleaved_by_hand(per_class: list[int]) -> list[int]:
    """Positions of examples that lie class by class, in blocks of so many per class: first ones, second ones, …"""
    starts = [N_WAY * sum(per_class[:block]) for block in range(len(per_class))]
    return [
        starts[block] + label * count + number
        for block, count in enumerate(per_class)
        for number in range(count)
        for label in range(N_WAY)
    ]


@pytest.mark.parametrize("add_vector", [False, True])
@pytest.mark.parametrize("strength", [False, True])
def test_the_meta_gradient_agrees_with_the_reference(strength: bool, add_vector: bool) -> None:
    written = {"key_strength": "learned" if strength else "one", "written": "add_vector" if add_vector else "key"}
    algorithm, tasks = learner(**written), batch()
    state = random_state(algorithm)
    gradient = algorithm.meta_grad(state, tasks, step=0)
    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    total, hits, gates, used = torch.zeros((), dtype=torch.float64), torch.zeros(4), 0.0, 0.0
    order = interleaved_by_hand([K_SHOT, N_QUERY])
    for task in range(TASKS):
        x = torch.cat([tasks.support_x[task], tasks.query_x[task]])[order]
        y = torch.cat([tasks.support_y[task], tasks.query_y[task]])[order].tolist()
        reference, losses = Reference(leaves, strength=strength, add_vector=add_vector), []
        for t, label in enumerate(y):
            logits = reference.step(x[t], y[t - 1] if t else None)
            losses.append(F.cross_entropy(logits, torch.tensor(label)))
            hits[t // N_WAY] += float(logits.argmax() == label) / N_WAY
        total = total + torch.stack(losses).mean()
        gates += float(torch.stack(reference.gates).detach().mean())
        shares = torch.stack(reference.usage).detach()
        shares = shares / shares.sum()
        used += float((-shares * shares.log()).sum().exp())
    assert float(gradient.metrics["meta_loss"] - total.detach()) == pytest.approx(0, abs=1e-12)
    assert float(gradient.metrics["train_accuracy_instance_1"]) == pytest.approx(float(hits[0]))
    assert float(gradient.metrics["train_accuracy_instance_2"]) == pytest.approx(float(hits[1]))
    assert "train_accuracy_instance_5" not in gradient.metrics, "a class has four examples here"
    assert float(gradient.metrics["memory_write_gate"]) == pytest.approx(gates)
    assert float(gradient.metrics["memory_rows_used"]) == pytest.approx(used)
    expected = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, got), want in zip(gradient.grads.items(), expected, strict=True):
        if name.startswith("head."):
            assert want is None, "the encoder's own head"
            assert not got.any()
        else:
            assert float((got - want).norm() / want.norm()) < 1e-9, name


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_each_query_is_asked_alone_after_the_support_set(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.algorithms.mann.ELEMENTS_AT_ONCE", at_once)
    algorithm, tasks = learner(), batch()
    state = random_state(algorithm)
    path = list(algorithm.adaptation_path(state, tasks.support_x, tasks.support_y, steps=1, inductive=True))
    assert len(path) == 2, "one more step changes nothing"
    outputs = [algorithm.predict(adapted, tasks.query_x, "inductive") for adapted in path]
    assert torch.equal(*outputs)
    assert all(len(value) == TASKS for value in path[0].params.values())
    order = interleaved_by_hand([K_SHOT])
    for task in range(TASKS):
        x, y = tasks.support_x[task][order], tasks.support_y[task][order].tolist()
        for query in range(N_WAY * N_QUERY):
            reference = Reference(state.params)
            for t in range(len(y)):
                reference.step(x[t], y[t - 1] if t else None)
            expected = reference.step(tasks.query_x[task, query], y[-1])
            torch.testing.assert_close(outputs[0][task, query], expected, rtol=1e-10, atol=1e-12)


def test_the_order_in_which_classes_are_given_does_not_matter() -> None:
    algorithm, tasks = learner(), batch()
    state = random_state(algorithm)

    def answers(order: list[int]) -> Tensor:
        x, y = tasks.support_x[:, order], tasks.support_y[:, order]
        (adapted,) = algorithm.adaptation_path(state, x, y, steps=0, inductive=True)
        return algorithm.predict(adapted, tasks.query_x, "inductive")

    assert torch.equal(answers([0, 1, 2, 3, 4, 5]), answers([4, 2, 0, 5, 1, 3]))
    assert not torch.equal(answers([0, 1, 2, 3, 4, 5]), answers([1, 0, 2, 3, 4, 5])), "of one class's examples it does"


def test_an_episodes_key_draws_the_order_of_its_sequence() -> None:
    algorithm, drawn = learner(), batch(with_keys=True)
    state = random_state(algorithm)

    def loss(tasks: TaskBatch) -> float:
        return float(algorithm.meta_grad(state, tasks, step=0).metrics["meta_loss"])

    assert loss(drawn) == loss(drawn)
    assert drawn.keys is not None
    others = [drawn._replace(keys=drawn.keys + 1), drawn._replace(keys=None)]
    assert len({loss(drawn), *map(loss, others)}) == 3
    features, labels, _ = algorithm._sequence(state.params, drawn, training=True)
    plain, in_turn, _ = algorithm._sequence(state.params, drawn._replace(keys=None), training=True)
    assert torch.equal(labels.sort(1).values, in_turn.sort(1).values)
    for task in range(TASKS):
        position = [int((plain[task] == row).all(-1).nonzero()) for row in features[task]]
        assert sorted(position) == list(range(len(position)))
        assert torch.equal(in_turn[task, position], labels[task])


def test_an_answer_knows_nothing_of_later_images_and_no_label_before_its_time() -> None:
    algorithm, tasks = learner(), batch()
    state = random_state(algorithm)
    features, labels, _ = algorithm._sequence(state.params, tasks, training=True)
    outputs = algorithm._read_sequence(state.params, features, labels)[1].outputs
    for t in (0, 3, 7):
        other_features, other_labels = features.clone(), labels.clone()
        other_features[:, t + 1 :] += 1
        other_labels[:, t:] = (labels[:, t:] + 1) % N_WAY
        other = algorithm._read_sequence(state.params, other_features, other_labels)[1].outputs
        assert torch.equal(other[:, : t + 1], outputs[:, : t + 1])
        assert not torch.equal(other[:, t + 1 :], outputs[:, t + 1 :])


def test_curves_are_the_accuracy_of_whole_episodes_by_instance() -> None:
    algorithm, tasks = learner(), batch(with_keys=True)
    state = random_state(algorithm)
    curve = algorithm.curves(state, tasks)["accuracy_by_instance"]
    assert curve.shape == (TASKS, K_SHOT + N_QUERY)
    metrics = algorithm.meta_grad(state, tasks, step=0).metrics
    assert float(curve[:, 1].sum()) == pytest.approx(float(metrics["train_accuracy_instance_2"]))
    long = tasks._replace(query_x=tasks.query_x.repeat(1, 6, 1), query_y=tasks.query_y.repeat(1, 6))
    assert algorithm.curves(state, long)["accuracy_by_instance"].shape == (TASKS, 10), "as many as the paper reports"


def test_accuracy_by_instance() -> None:
    labels = torch.tensor([[0, 1, 0, 0, 1, 1]])
    answers = torch.tensor([[0, 0, 0, 1, 1, 1]])  # right, wrong, right, wrong, right, right
    outputs = F.one_hot(answers, 2).double()
    assert by_instance(outputs, labels, 2).tolist() == [[0.5, 1.0, 0.5]]


def test_perplexity_counts_rows() -> None:
    weights = torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [3, 3, 3, 3]], dtype=torch.float64)
    torch.testing.assert_close(perplexity(weights), torch.tensor([1.0, 2, 4], dtype=torch.float64))


def test_the_curve_of_the_test_episodes_is_written_as_numbers_and_as_a_picture(tiny_data: Path, tmp_path: Path) -> None:
    content = {
        "name": "curves",
        "task": {"family": "images", "data": str(tiny_data), "split": "random", "n_query": 3, "eval_n_query": 3},
        "model": {"name": "mlp", "hidden": [HIDDEN]},
        "algorithm": {"name": "mann", "controller_units": UNITS, "memory_rows": ROWS, "memory_width": WIDTH},
        "training": {"steps": 1, "backend": "local", "dtype": "float64", "meta_batch_size": 2, "task_chunk": 2},
        "evaluation": {"test_episodes": 5},
    }
    experiment = experiments.from_dict(content, source="test")
    parts = experiments.build(experiment, device=torch.device("cpu"))
    state = parts.algorithm.init(0)
    metrics = workflow._curves(experiment, parts, state, tmp_path)
    written = json.loads((tmp_path / "accuracy_by_instance.json").read_text())
    points = written["accuracy_by_instance"]
    assert [point["number"] for point in points] == [1, 2, 3, 4]
    assert written["episodes"] == 5
    assert metrics == {f"test_accuracy_by_instance_{point['number']}": point["mean"] for point in points}
    assert (tmp_path / "accuracy_by_instance.png").stat().st_size > 1000
    whole = parts.family.sample("meta_test", 0, torch.arange(5), seed=TEST_SEED)
    expected = parts.algorithm.curves(state, whole)["accuracy_by_instance"]
    assert [point["mean"] for point in points] == pytest.approx(expected.mean(0).tolist())
    assert [point["ci95"] for point in points] == pytest.approx((1.96 * expected.std(0) / 5**0.5).tolist(), rel=1e-4)

    content["algorithm"] = {"name": "maml", "inner_lr": 0.1}
    experiment = experiments.from_dict(content, source="test")
    parts = experiments.build(experiment, device=torch.device("cpu"))
    assert workflow._curves(experiment, parts, parts.algorithm.init(0), tmp_path / "none") == {}


def test_what_it_cannot_do_is_refused() -> None:
    model = MLPConfig(name="mlp").build(input_shape=(INPUTS,), num_outputs=1, dtype=torch.float64)
    with pytest.raises(ConfigError, match="mann classifies"):
        MANNConfig(name="mann").build(model=model, objective=Regression())
    with pytest.raises(ValueError, match="memory_rows"):
        MANNConfig(name="mann", memory_rows=2, reads=3)
