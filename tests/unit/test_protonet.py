"""Prototypical networks against a loop over tasks in plain PyTorch, and as learners of any number of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import experiment as experiments
from pipeline import initial
from pipeline.algorithms.protonet import ProtoNet, ProtoNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.learner import Learner, card_of, write_model
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.training.evaluate import evaluate
from pipeline.types import MetaState, Params, TaskBatch

TASKS, INPUTS, FEATURES = 3, 4, 5
COUNTS = (3, 1, 2)  # support examples of each class
OUTPUTS = 7  # of the model's head, which nobody uses

pytestmark = pytest.mark.usefixtures("one_thread")


def protonet(**settings: Any) -> ProtoNet:
    model = MLPConfig(name="mlp", hidden=[FEATURES], normalization="batch").build(
        input_shape=(INPUTS,), num_outputs=OUTPUTS, dtype=torch.float64
    )
    config = ProtoNetConfig(name="protonet", **settings)
    return config.build(model=model, objective=Classification())


def episodes() -> TaskBatch:
    """Unbalanced support sets, in another order for each task."""
    generator = torch.Generator().manual_seed(4)
    classes = len(COUNTS)
    labels = torch.arange(classes).repeat_interleave(torch.tensor(COUNTS))
    support_y = torch.stack([labels[torch.randperm(len(labels), generator=generator)] for _ in range(TASKS)])
    query_y = torch.arange(classes).repeat(2).expand(TASKS, -1)
    support_x = torch.randn(TASKS, len(labels), INPUTS, generator=generator, dtype=torch.float64)
    query_x = torch.randn(TASKS, 2 * classes, INPUTS, generator=generator, dtype=torch.float64)
    return TaskBatch(support_x, support_y, query_x, query_y, classes=torch.zeros(TASKS, classes, dtype=torch.int64))


def moments(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x @ params["layer1.weight"].T + params["layer1.bias"]
    return x.mean(0), x.var(0, unbiased=False)


def embed(params: Params, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    x = x @ params["layer1.weight"].T + params["layer1.bias"]
    return ((x - mean) / (var + 1e-5).sqrt() * params["norm1.weight"] + params["norm1.bias"]).clamp_min(0)


def classify(support: Tensor, labels: Tensor, query: Tensor, distance: str, scale: Tensor | float) -> Tensor:
    """Log probabilities of one task's queries, each distance on its own."""
    rows = []
    for q in query:
        similar = []
        for label in range(len(COUNTS)):
            prototype = support[labels == label].mean(0)
            if distance == "euclidean":
                similar.append(-((q - prototype) ** 2).sum())
            else:
                similar.append((q @ prototype) / (q.norm() * prototype.norm()))
        rows.append(torch.stack(similar) * scale)
    return torch.stack(rows).log_softmax(1)


@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_meta_gradient_agrees_with_a_sequential_reference(distance: str, normalization: str) -> None:
    """Gradients of everything, a learned scale too; support sets are unbalanced."""
    algorithm = protonet(distance=distance, normalization=normalization, learn_scale=True, scale=3.0)
    batch, state = episodes(), algorithm.init(2)
    state.params["norm1.bias"] += 3  # no query may have only zeros for features
    gradient = algorithm.meta_grad(state, batch, step=0)

    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    total, correct = torch.zeros((), dtype=torch.float64), 0.0
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        seen = torch.cat([support_x, query_x]) if normalization == "transductive" else support_x
        statistics = moments(leaves, seen)
        support, query = embed(leaves, support_x, *statistics), embed(leaves, query_x, *statistics)
        log_p = classify(support, support_y, query, distance, leaves["protonet/log_scale"].exp())
        total = total + F.nll_loss(log_p, query_y)
        correct += float((log_p.argmax(1) == query_y).double().mean())
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(float(total.detach()), rel=1e-12)
    assert float(gradient.metrics["train_accuracy"]) == pytest.approx(correct, rel=1e-12)
    assert gradient.grads.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(gradient.grads[name], want, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("statistics", ["support", "running"])
def test_what_predictions_are_normalized_by(statistics: str) -> None:
    algorithm = protonet(inductive_statistics=statistics)
    batch, state = episodes(), algorithm.init(2)
    observed = algorithm.meta_grad(state, batch, step=0).statistics
    assert bool(observed) == (statistics == "running")
    if observed:  # of support and query set together, summed over tasks
        expected = sum(moments(state.params, torch.cat(both))[1] for both in zip(batch[0], batch[2], strict=True))
        torch.testing.assert_close(observed["norm1.var"], expected, rtol=1e-12, atol=1e-12)
    state = MetaState(state.params, algorithm.update_buffers({}, {k: v / TASKS + 0.1 for k, v in observed.items()}))
    path = algorithm.adaptation_path(state, *batch[:2], steps=0, inductive=True, num_classes=len(COUNTS))
    (adapted,) = path
    for mode in ("inductive", "transductive"):
        outputs = algorithm.predict(adapted, batch.query_x, mode)
        for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch[:4], strict=True)):
            used = moments(state.params, torch.cat([support_x, query_x]) if mode == "transductive" else support_x)
            if mode == "inductive" and statistics == "running":
                used = state.buffers["norm1.mean"], state.buffers["norm1.var"]
            support, query = embed(state.params, support_x, *used), embed(state.params, query_x, *used)
            log_p = classify(support, support_y, query, "euclidean", 1.0)
            torch.testing.assert_close(outputs[task].log_softmax(1), log_p, rtol=1e-10, atol=1e-10)


def test_the_head_is_left_out_and_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, batch = protonet(), episodes()
    monkeypatch.setattr(algorithm.model, "apply", lambda *_, **__: pytest.fail("there is no head to apply"))
    state = algorithm.init(0)
    assert set(state.params) == set(algorithm.model.parameter_names) - {"head.weight", "head.bias"}
    algorithm.meta_grad(state, batch, step=0)
    path = list(algorithm.adaptation_path(state, *batch[:2], steps=3, inductive=True, num_classes=len(COUNTS)))
    assert len(path) == 4  # as many as were asked for, of the one learner there is
    assert all(adapted is path[0] for adapted in path)
    for mode in ("inductive", "transductive"):
        assert algorithm.predict(path[0], batch.query_x, mode).shape == (*batch.query_y.shape, len(COUNTS))


def test_a_learned_scale_is_described() -> None:
    assert protonet().describe(protonet().init(0)) == {}
    learned = protonet(learn_scale=True, distance="cosine")
    assert learned.describe(learned.init(0)) == {"protonet/scale": pytest.approx(10.0)}


def content(data: Path, **task: Any) -> dict[str, Any]:
    return {
        "name": "ways",
        "task": {"family": "images", "data": str(data), "split": "random", "n_query": 2, "eval_n_query": 3, **task},
        "model": {"name": "conv4", "hidden": 16, "downsample": "stride"},
        "algorithm": {"name": "protonet"},
        "training": {"steps": 1, "meta_batch_size": 2, "backend": "local", "dtype": "float64"},
    }


@pytest.mark.parametrize(("n_way", "eval_n_way"), [(5, 3), (3, 5)])
def test_training_with_another_n_way_than_test(n_way: int, eval_n_way: int, tiny_data: Path) -> None:
    experiment = experiments.from_dict(
        content(tiny_data, n_way=n_way, eval_n_way=eval_n_way, k_shot=2, eval_k_shot=1), source="test"
    )
    parts = experiments.build(experiment, device=torch.device("cpu"))
    state = parts.algorithm.init(0)
    batch = parts.family.sample("meta_train", 0, torch.arange(2), seed=0)
    assert batch.num_classes == n_way
    gradient = parts.algorithm.meta_grad(state, batch, step=0)
    assert np.isfinite(float(gradient.metrics["meta_loss"]))
    for steps in (None, 2):
        evaluation = evaluate(
            parts.algorithm,
            parts.family,
            state,
            split="meta_val",
            seed=0,
            episodes=4,
            data_digest="x",
            chunk=None,
            steps=steps,
        )
        assert evaluation.adaptation_steps == (steps or 0)
        assert bool((evaluation.scores == evaluation.scores[..., :1]).all())
        assert evaluation.score("transductive").mean > 1.5 / eval_n_way  # classes are patterns under noise


def test_a_learner_of_more_classes_with_unbalanced_support(tiny_data: Path, tmp_path: Path) -> None:
    """Eight classes for a network trained with three, from one to four examples each, labels in any order."""
    experiment = experiments.from_dict(content(tiny_data, n_way=3), source="test")
    parts = experiments.build(experiment, device=torch.device("cpu"))
    state = parts.algorithm.init(0)
    observed = parts.algorithm.meta_grad(
        state, parts.family.sample("meta_train", 0, torch.arange(2), seed=0), step=0
    ).statistics
    state = MetaState(state.params, {k: v / 2 for k, v in observed.items()})
    card = card_of(
        experiment,
        objective="classification",
        input_shape=parts.family.input_shape,
        num_outputs=parts.family.num_outputs,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    write_model(tmp_path, card, state)
    learner = Learner.from_folder(tmp_path)
    random = np.random.default_rng(0)
    patterns = random.random((8, *parts.family.input_shape))
    labels = np.repeat([f"class{i}" for i in range(8)], [1, 2, 3, 4, 1, 2, 3, 4])
    labels = labels[random.permutation(len(labels))]
    support = patterns[[int(label[-1]) for label in labels]] + 0.02 * random.random((20, *parts.family.input_shape))
    adapted = learner.adapt(support, labels)
    assert adapted.labels == [f"class{i}" for i in range(8)]
    answers = adapted.predict(patterns)
    assert answers.shape == (8, 8)
    assert list(answers.argmax(1)) == list(range(8))

    params = {k: v.unsqueeze(0) for k, v in state.params.items()}
    statistics = {k: v.unsqueeze(0) for k, v in state.buffers.items()}
    support_f, query_f = (
        parts.model.features(params, torch.from_numpy(x).unsqueeze(0), statistics=statistics)[0][0]
        for x in (support, patterns)
    )
    prototypes = torch.stack([support_f[torch.from_numpy(labels == label)].mean(0) for label in adapted.labels])
    expected = (-((query_f[:, None] - prototypes) ** 2).sum(-1)).softmax(1)
    np.testing.assert_allclose(answers, expected, rtol=1e-9, atol=1e-12)
    assert adapted.predict(patterns, normalization="transductive").shape == (8, 8)
    np.testing.assert_array_equal(learner.adapt(support, labels, adaptation_steps=4).predict(patterns), answers)
    with pytest.raises(DataError, match="one class only"):
        learner.adapt(support, ["a"] * len(support))


def test_it_starts_from_weights_with_a_head(tiny_data: Path) -> None:
    """Of supervised pretraining, say, whatever its number of classes; a head that nobody uses is left out."""
    experiment = experiments.from_dict(content(tiny_data, n_way=3), source="test")
    parts = experiments.build(experiment, device=torch.device("cpu"))
    given = {k: v + 1 for k, v in parts.algorithm.init(0).params.items()}
    head = {"head.weight": torch.zeros(64, 16), "head.bias": torch.zeros(64)}
    params = initial.fitted(MetaState(given | head, {}), experiment, parts, source="test").params
    assert params.keys() == given.keys()
    assert all(torch.equal(params[name], given[name]) for name in given)


def no_head() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3, bias=False))


def test_what_does_not_fit_is_refused(tiny_data: Path) -> None:
    def refusal(**changes: Any) -> str:
        try:
            experiment = experiments.from_dict(content(tiny_data, n_way=3) | changes, source="test")
            experiments.build(experiment, device=torch.device("cpu"))
        except ConfigError as error:
            return str(error)
        return "accepted"

    running = {"name": "protonet", "normalization": "inductive", "inductive_statistics": "running"}
    assert "needs normalization: transductive" in refusal(algorithm=running)
    assert "needs the features" in refusal(model={"name": "module", "factory": f"{__name__}:no_head"})
    assert "learns what lies before the head" in refusal(model={"name": "mlp", "hidden": []})
    assert "algorithm.name: protonet classifies" in refusal(task={"family": "sinusoid"}, model={"name": "mlp"})
    with pytest.raises(ConfigError, match="classifies"):
        ProtoNetConfig(name="protonet").build(model=protonet().model, objective=Regression())
