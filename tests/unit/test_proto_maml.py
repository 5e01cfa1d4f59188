"""Proto-MAML against a loop over tasks and inner steps, and with other numbers of classes than it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import experiment as experiments
from pipeline.algorithms.proto_maml import ProtoMAML, ProtoMAMLConfig
from pipeline.errors import ConfigError
from pipeline.learner import Learner, card_of
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.types import Params, TaskBatch

TASKS, CLASSES, INPUTS, RATE = 2, 3, 4, 0.05
LABELS = torch.tensor([[0, 2, 1, 1, 0, 0], [2, 2, 2, 0, 1, 2]])

pytestmark = pytest.mark.usefixtures("one_thread")


def proto_maml(**settings: Any) -> ProtoMAML:
    model = MLPConfig(name="mlp", hidden=[5]).build(input_shape=(INPUTS,), num_outputs=8, dtype=torch.float64)
    config = ProtoMAMLConfig(name="proto_maml", inner_lr=RATE, **settings)
    return config.build(model=model, objective=Classification())


def episodes() -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def x(examples: int) -> Tensor:
        return torch.randn(TASKS, examples, INPUTS, generator=generator, dtype=torch.float64)

    query_y = torch.tensor([[0, 1, 2, 1], [1, 0, 0, 2]])
    return TaskBatch(x(6), LABELS, x(4), query_y, classes=torch.zeros(TASKS, CLASSES, dtype=torch.int64))


def features(params: Params, x: Tensor) -> Tensor:
    return (x @ params["layer1.weight"].T + params["layer1.bias"]).clamp_min(0)


def logits(params: Params, x: Tensor) -> Tensor:
    return features(params, x) @ params["head.weight"].T + params["head.bias"]


def reference(
    leaves: Params, batch: TaskBatch, steps: int, adapted: set[str], first_order: bool, through: bool
) -> Tensor:
    """The sum of the tasks' query losses."""
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        prototypes = torch.stack([features(leaves, support_x)[support_y == c].mean(0) for c in range(CLASSES)])
        prototypes = prototypes if through else prototypes.detach()
        params = {k: v * 1 for k, v in leaves.items()}  # the inner gradient of the body does not go through the head
        params["head.weight"], params["head.bias"] = 2 * prototypes, -(prototypes**2).sum(1)
        if not through:
            params |= {k: params[k].requires_grad_() for k in ("head.weight", "head.bias")}
        for _ in range(steps):
            loss = F.cross_entropy(logits(params, support_x), support_y)
            names = sorted(adapted)
            grads = torch.autograd.grad(loss, [params[k] for k in names], create_graph=True)
            for name, grad in zip(names, grads, strict=True):
                params[name] = params[name] - RATE * (grad.detach() if first_order else grad)
        total = total + F.cross_entropy(logits(params, query_x), query_y)
    return total


ALL = {"layer1.weight", "layer1.bias", "head.weight", "head.bias"}
HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({}, ALL),
        ({"recompute_inner_steps": True}, ALL),
        ({"first_order": True}, ALL),
        ({"through_initialization": False}, ALL),
        ({"freeze": ["layer1.*"]}, HEAD),
        ({"freeze": ["head.*"]}, ALL - HEAD),
    ],
)
def test_meta_gradient_agrees_with_a_sequential_reference(settings: dict[str, Any], adapted: set[str]) -> None:
    algorithm, batch = proto_maml(adaptation_steps=2, **settings), episodes()
    state = algorithm.init(0)
    assert set(state.params) == ALL - HEAD
    gradient = algorithm.meta_grad(state, batch, step=0)
    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    first_order, through = settings.get("first_order", False), settings.get("through_initialization", True)
    total = reference(leaves, batch, 2, adapted, first_order=first_order, through=through)
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(float(total.detach()), rel=1e-12)
    for name, want in expected.items():
        torch.testing.assert_close(gradient.grads[name], want, rtol=1e-10, atol=1e-12, msg=name)


def test_it_starts_as_the_classifier_by_nearest_prototype() -> None:
    algorithm, batch = proto_maml(), episodes()
    state = algorithm.init(0)
    first, *_ = algorithm.adaptation_path(state, *batch[:2], steps=1, inductive=False, num_classes=CLASSES)
    outputs = algorithm.predict(first, batch.query_x, "transductive")
    for task in range(TASKS):
        support, query = features(state.params, batch.support_x[task]), features(state.params, batch.query_x[task])
        prototypes = torch.stack([support[LABELS[task] == c].mean(0) for c in range(CLASSES)])
        distances = ((query[:, None] - prototypes) ** 2).sum(-1)
        torch.testing.assert_close(outputs[task].softmax(1), (-distances).softmax(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_learner_of_fewer_and_more_classes(classes: int, tiny_data: Path) -> None:
    """For a network trained with three; the support sets are unbalanced."""
    experiment = experiments.from_dict(
        {
            "name": "ways",
            "task": {
                "family": "images",
                "data": str(tiny_data),
                "split": "random",
                "n_way": 3,
                "eval_n_way": 5,
                "eval_n_query": 3,
            },
            "model": {"name": "conv4", "hidden": 16, "downsample": "stride"},
            "algorithm": {"name": "proto_maml", "inner_lr": 0.01, "adaptation_steps": 2},
            "training": {"steps": 1, "meta_batch_size": 2, "backend": "local", "dtype": "float64"},
        },
        source="test",
    )
    parts = experiments.build(experiment, device=torch.device("cpu"))
    card = card_of(
        experiment,
        objective="classification",
        input_shape=parts.family.input_shape,
        num_outputs=parts.family.num_outputs,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    learner = Learner(card, parts.algorithm.init(0))
    random = np.random.default_rng(0)
    patterns = random.random((classes, *parts.family.input_shape))
    labels = np.repeat(np.arange(classes), np.arange(classes) % 3 + 1)
    support = patterns[labels] + 0.02 * random.random((len(labels), *parts.family.input_shape))
    adapted = learner.adapt(support, labels)
    for normalization in ("inductive", "transductive"):
        answers = adapted.predict(patterns, normalization=normalization)
        assert answers.shape == (classes, classes)
        np.testing.assert_allclose(answers.sum(1), 1)
    assert list(adapted.predict(patterns).argmax(1)) == list(range(classes))


def test_regression_is_refused() -> None:
    with pytest.raises(ConfigError, match="proto_maml classifies"):
        ProtoMAMLConfig(name="proto_maml", inner_lr=0.1).build(model=proto_maml().model, objective=Regression())


def test_a_model_that_is_a_head_alone_is_refused() -> None:
    model = MLPConfig(name="mlp", hidden=[]).build(input_shape=(4,), num_outputs=3, dtype=torch.float64)
    with pytest.raises(ConfigError, match="proto_maml learns what lies before the head"):
        ProtoMAMLConfig(name="proto_maml", inner_lr=0.1).build(model=model, objective=Classification())
