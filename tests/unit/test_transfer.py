"""Transfer learning against formulas written out here: one task at a time, float64, plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.transfer import Transfer, TransferConfig
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.types import MetaState, Params, TaskBatch

TASKS, WAYS, SHOTS, QUERIES, INPUTS, UNITS, CLASSES = 3, 3, 2, 4, 6, 5, 11
RATE, STEPS, SCALE = 0.7, 4, 10.0
pytestmark = pytest.mark.usefixtures("one_thread")


def learner(train_classes: int | None = CLASSES, **keys: object) -> Transfer:
    model = MLPConfig(name="mlp", hidden=[UNITS], normalization="batch").build(
        input_shape=(INPUTS,), num_outputs=WAYS, dtype=torch.float64
    )
    config = TransferConfig(name="transfer", **{"inner_lr": RATE, "adaptation_steps": STEPS, **keys})
    return config.build(model=model, objective=Classification(), train_classes=train_classes)


def batch(ways: int = WAYS) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, ways * per_class, INPUTS, generator=generator, dtype=torch.float64)
        return x, torch.arange(ways).repeat(per_class).expand(TASKS, -1)

    classes = torch.stack([torch.randperm(CLASSES, generator=generator)[:ways] for _ in range(TASKS)])
    return TaskBatch(*part(SHOTS), *part(QUERIES), keys=torch.arange(TASKS), classes=classes)


def statistics_of(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x @ params["layer1.weight"].T + params["layer1.bias"]
    return x.mean(0), x.var(0, unbiased=False)


def body(params: Params, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """One task: [N, INPUTS] -> [N, UNITS], normalized by its own statistics or by given ones."""
    mean, var = statistics or statistics_of(params, x)
    x = x @ params["layer1.weight"].T + params["layer1.bias"]
    x = (x - mean) / (var + 1e-5).sqrt() * params["norm1.weight"] + params["norm1.bias"]
    return x.clamp_min(0)


def cosine(features: Tensor, weight: Tensor) -> Tensor:
    lengths = features.norm(dim=1)[:, None] * weight.norm(dim=1)[None]
    return SCALE * (features @ weight.T) / lengths.clamp_min(1e-30)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_pretraining_is_cross_entropy_over_all_training_classes(classifier: str) -> None:
    transfer, tasks = learner(classifier=classifier), batch()
    state = transfer.init(3)
    weight_name, bias_name = "transfer/classifier.weight", "transfer/classifier.bias"
    assert state.params[weight_name].shape == (CLASSES, UNITS)
    assert (bias_name in state.params) == (classifier == "linear")
    gradient = transfer.meta_grad(state, tasks, step=0)

    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    total, right = torch.zeros((), dtype=torch.float64), 0.0
    for task in range(TASKS):
        x = torch.cat([tasks.support_x[task], tasks.query_x[task]])
        labels = torch.cat([tasks.support_y[task], tasks.query_y[task]])
        y = torch.tensor([int(tasks.classes[task][label]) for label in labels])  # type: ignore[index]
        features = body(leaves, x)
        if classifier == "linear":
            logits = features @ leaves[weight_name].T + leaves[bias_name]
        else:
            logits = cosine(features, leaves[weight_name])
        total = total + F.cross_entropy(logits, y)
        right += float((logits.argmax(1) == y).double().mean())
    expected = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    assert abs(float(gradient.metrics["meta_loss"] - total.detach())) < 1e-10
    assert abs(float(gradient.metrics["train_accuracy"]) - right) < 1e-12
    for (name, got), want in zip(gradient.grads.items(), expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=name)
    assert not gradient.grads["head.weight"].any(), "the episodes' head is no part of pretraining"


def test_a_linear_head_is_softmax_regression_from_zero() -> None:
    """The steps by the closed form of the gradient: (softmax − one-hot)ᵀ f / S."""
    transfer, tasks = learner(), batch()
    state = transfer.init(3)
    path = list(transfer.adaptation_path(state, tasks.support_x, tasks.support_y, steps=STEPS, inductive=True))
    assert len(path) == STEPS + 1
    for task in range(TASKS):
        features = body(state.params, tasks.support_x[task])
        wanted = F.one_hot(tasks.support_y[task], WAYS).double()
        weight, bias = torch.zeros(WAYS, UNITS, dtype=torch.float64), torch.zeros(WAYS, dtype=torch.float64)
        for adapted in path:
            torch.testing.assert_close(adapted.params["head.weight"][task], weight, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(adapted.params["head.bias"][task], bias, rtol=1e-9, atol=1e-12)
            error = ((features @ weight.T + bias).softmax(1) - wanted) / len(wanted)
            weight, bias = weight - RATE * error.T @ features, bias - RATE * error.sum(0)
        statistics = statistics_of(state.params, tasks.support_x[task])
        final = path[-1]
        logits = body(state.params, tasks.query_x[task], statistics) @ final.params["head.weight"][task].T
        answers = transfer.predict(final, tasks.query_x, "inductive")[task]
        torch.testing.assert_close(answers, logits + final.params["head.bias"][task], rtol=1e-9, atol=1e-9)
    for name, value in state.params.items():  # the backbone is frozen
        if name in final.params and not name.startswith("head"):
            assert torch.equal(final.params[name], value.expand_as(final.params[name])), name


@pytest.mark.parametrize("fine_tune", ["head", "all"])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
@pytest.mark.parametrize("running", [False, True])
def test_adaptation_agrees_with_a_sequential_reference(classifier: str, fine_tune: str, running: bool) -> None:
    transfer = learner(
        classifier=classifier, fine_tune=fine_tune, inductive_statistics="running" if running else "support"
    )
    tasks = batch()
    state = transfer.init(3)
    buffers = {}
    if running:
        generator = torch.Generator().manual_seed(9)
        mean, var = torch.rand(2, UNITS, generator=generator, dtype=torch.float64)
        buffers = {"norm1.mean": mean, "norm1.var": var + 0.5}
    given = tuple(buffers.values()) or None
    path = list(
        transfer.adaptation_path(
            MetaState(state.params, buffers), tasks.support_x, tasks.support_y, steps=STEPS, inductive=True
        )
    )
    body_names = [name for name in transfer.model.parameter_names if not name.startswith("head")]
    for task in range(TASKS):
        params = {name: value[task].clone() for name, value in path[0].params.items()}
        for _ in range(STEPS):
            moving = [*(body_names if fine_tune == "all" else []), "head.weight", "head.bias"]
            leaves = {k: v.detach().requires_grad_(k in moving) for k, v in params.items()}
            features = body(leaves, tasks.support_x[task], given)
            if classifier == "linear":
                logits = features @ leaves["head.weight"].T + leaves["head.bias"]
            else:
                logits = cosine(features, leaves["head.weight"])
            loss = F.cross_entropy(logits, tasks.support_y[task])
            grads = torch.autograd.grad(loss, [leaves[k] for k in moving], allow_unused=True)
            params = {k: v.detach() for k, v in leaves.items()}
            for name, g in zip(moving, grads, strict=True):
                params[name] = params[name] if g is None else params[name] - RATE * g
        for name, value in params.items():
            torch.testing.assert_close(path[-1].params[name][task], value, rtol=1e-7, atol=1e-9, msg=name)
        answers = transfer.predict(path[-1], tasks.query_x, "inductive")[task]
        statistics = given or statistics_of(params, tasks.support_x[task])
        features = body(params, tasks.query_x[task], statistics)
        logits = features @ params["head.weight"].T + params["head.bias"]
        expected = logits if classifier == "linear" else cosine(features, params["head.weight"])
        torch.testing.assert_close(answers, expected, rtol=1e-7, atol=1e-8)


def test_a_head_for_as_many_classes_as_an_episode_has() -> None:
    """More and fewer than the model has outputs, and without any classifier of the pretraining."""
    trained, serving = learner(), learner(train_classes=None)
    state = trained.init(3)
    assert "transfer/classifier.weight" not in serving.init(3).params
    for ways in (2, 5):
        tasks = batch(ways)
        *_, adapted = serving.adaptation_path(
            state, tasks.support_x, tasks.support_y, steps=20, inductive=False, num_classes=ways
        )
        outputs = serving.predict(adapted, tasks.support_x, "transductive")
        assert outputs.shape == (TASKS, ways * SHOTS, ways)
        assert Classification().score(outputs, tasks.support_y).mean() > 1.5 / ways


def test_running_statistics_are_observed_in_pretraining() -> None:
    transfer, tasks = learner(inductive_statistics="running"), batch()
    state = transfer.init(3)
    observed = transfer.meta_grad(state, tasks, step=0).statistics
    images = [torch.cat([tasks.support_x[t], tasks.query_x[t]]) for t in range(TASKS)]
    expected = sum(statistics_of(state.params, x)[1] for x in images)
    torch.testing.assert_close(observed["norm1.var"], expected, rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    model = learner().model
    with pytest.raises(ConfigError, match="transfer classifies"):
        TransferConfig(name="transfer", inner_lr=0.1).build(model=model, objective=Regression())
    with pytest.raises(ConfigError, match="normalization"):
        validate(TransferConfig, {"name": "transfer", "inner_lr": 0.1, "normalization": "inductive"}, source="a")
    transfer, tasks = learner(), batch()
    with pytest.raises(ConfigError, match="trains on classes"):
        transfer.meta_grad(transfer.init(0), tasks._replace(classes=None), step=0)
