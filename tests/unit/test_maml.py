"""MAML's meta-gradient against the closed form of a quadratic and against a sequential float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification
from pipeline.training.step import split_tasks
from pipeline.types import MetaState, Params, TaskBatch
from tests.references import DIMENSION, Point, Quadratic


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_closed_form_of_the_quadratic(steps: int, first_order: bool) -> None:
    """(1−α)^{2k}(θ−c) for MAML and (1−α)^k(θ−c) for first-order MAML, summed over tasks."""
    rate, tasks = 0.3, 4
    config = MAMLConfig(name="maml", inner_lr=rate, adaptation_steps=steps, first_order=first_order)
    maml = MAML(config, model=Point(), objective=Quadratic())
    state = maml.init(0)
    centres = torch.randn(tasks, 1, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.zeros(tasks, 1, 1, dtype=torch.float64)
    gradient = maml.meta_grad(state, TaskBatch(x, centres, x, centres), step=0)
    power = steps if first_order else 2 * steps
    expected = ((1 - rate) ** power * (state.params["theta"] - centres[:, 0])).sum(0)
    torch.testing.assert_close(gradient.grads["theta"], expected, rtol=1e-12, atol=1e-12)


def classification_batch(tasks: int, n_way: int, k_shot: int, n_query: int, shape: tuple[int, ...]) -> TaskBatch:
    generator = torch.Generator().manual_seed(5)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, n_way * per_class, *shape, generator=generator, dtype=torch.float64)
        return x, torch.arange(n_way).repeat_interleave(per_class).expand(tasks, -1)

    return TaskBatch(*part(k_shot), *part(n_query))


def reference_conv4(params: Params, x: Tensor, downsample: str, statistics: list[Tensor] | None) -> tuple:
    """One task, written independently: plain convolutions, normalization by hand."""
    means_and_vars: list[Tensor] = []
    for block in range(1, 5):
        x = F.conv2d(x, params[f"block{block}.conv.weight"], padding=1, stride=2 if downsample == "stride" else 1)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        means_and_vars += [mean, var]
        if statistics is not None:
            mean, var = statistics[2 * block - 2], statistics[2 * block - 1]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * params[f"block{block}.norm.weight"][:, None, None] + params[f"block{block}.norm.bias"][:, None, None]
        x = x.clamp_min(0)
        if downsample == "max_pool":
            x = F.max_pool2d(x, 2)
    features = x.mean((2, 3)) if downsample == "stride" else x.flatten(1)
    return features @ params["head.weight"].T + params["head.bias"], means_and_vars


@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("downsample", ["stride", "max_pool"])
def test_conv4_meta_gradient_agrees_with_a_sequential_reference(
    downsample: str, first_order: bool, normalization: str
) -> None:
    """Task by task, step by step, in float64: 1e-10 relative."""
    batch = classification_batch(tasks=3, n_way=3, k_shot=2, n_query=2, shape=(1, 16, 16))
    model = Conv4Config(name="conv4", hidden=4, downsample=downsample).build(
        input_shape=(1, 16, 16), num_outputs=3, dtype=torch.float64
    )
    config = MAMLConfig(
        name="maml", inner_lr=0.1, adaptation_steps=2, first_order=first_order, normalization=normalization
    )
    maml = MAML(config, model=model, objective=Classification())
    state = maml.init(3)
    gradient = maml.meta_grad(state, batch, step=0)

    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(3):
        support_x, support_y, query_x, query_y = (part[task] for part in batch[:4])
        params = leaves
        for _ in range(2):
            loss = F.cross_entropy(reference_conv4(params, support_x, downsample, None)[0], support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
            params = {k: v - 0.1 * g for (k, v), g in zip(params.items(), grads, strict=True)}
        statistics = None
        if normalization == "inductive":
            statistics = reference_conv4(params, support_x, downsample, None)[1]
        total = total + F.cross_entropy(reference_conv4(params, query_x, downsample, statistics)[0], query_y)
    expected = torch.autograd.grad(total, list(leaves.values()))
    assert abs(float(gradient.metrics["meta_loss"] - total.detach())) < 1e-10
    for (name, got), want in zip(gradient.grads.items(), expected, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-10, name


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_chunks_add_up(chunk: int | None) -> None:
    batch = classification_batch(tasks=5, n_way=3, k_shot=1, n_query=2, shape=(6,))
    model = MLPConfig(name="mlp", hidden=[8], normalization="batch").build(
        input_shape=(6,), num_outputs=3, dtype=torch.float64
    )
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.1), model=model, objective=Classification())
    state = maml.init(0)
    whole = maml.meta_grad(state, batch, step=0).grads
    pieces = [maml.meta_grad(state, piece, step=0).grads for piece in split_tasks(batch, chunk)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(piece[name] for piece in pieces), value, rtol=1e-12, atol=1e-14)


def test_adaptation_reduces_the_support_loss_and_starts_at_the_initialization() -> None:
    batch = classification_batch(tasks=2, n_way=3, k_shot=4, n_query=2, shape=(6,))
    model = MLPConfig(name="mlp").build(input_shape=(6,), num_outputs=3, dtype=torch.float64)
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.1), model=model, objective=Classification())
    state = maml.init(0)
    path = list(maml.adaptation_path(state, batch.support_x, batch.support_y, steps=5, inductive=False))
    assert len(path) == 6
    for name, value in path[0].params.items():
        assert torch.equal(value, state.params[name].expand_as(value))
    losses = [
        maml.objective.loss(maml.predict(adapted, batch.support_x, "transductive"), batch.support_y).sum()
        for adapted in path
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("statistics", ["support", "running"])
def test_inductive_answers_do_not_depend_on_other_queries(statistics: str) -> None:
    batch = classification_batch(tasks=2, n_way=3, k_shot=2, n_query=4, shape=(1, 16, 16))
    model = Conv4Config(name="conv4", hidden=4, downsample="stride").build(
        input_shape=(1, 16, 16), num_outputs=3, dtype=torch.float64
    )
    config = MAMLConfig(name="maml", inner_lr=0.1, inductive_statistics=statistics)
    maml = MAML(config, model=model, objective=Classification())
    state = maml.init(0)
    observed = maml.meta_grad(state, batch, step=0).statistics
    assert bool(observed) == (statistics == "running")
    state = MetaState(state.params, maml.update_buffers(state.buffers, {k: v / 2 for k, v in observed.items()}))
    *_, adapted = maml.adaptation_path(state, batch.support_x, batch.support_y, steps=1, inductive=True)
    everything = maml.predict(adapted, batch.query_x, "inductive")
    alone = maml.predict(adapted, batch.query_x[:, :1], "inductive")
    torch.testing.assert_close(everything[:, :1], alone, rtol=1e-12, atol=1e-12)
    transductive = maml.predict(adapted, batch.query_x, "transductive")
    assert not torch.allclose(transductive[:, :1], maml.predict(adapted, batch.query_x[:, :2], "transductive")[:, :1])
    if statistics == "running":
        assert float((everything - transductive).detach().abs().max()) > 1e-6


def test_running_statistics_are_refused_with_inductive_training() -> None:
    with pytest.raises(ValueError, match="transductive in training"):
        MAMLConfig(name="maml", inner_lr=0.1, normalization="inductive", inductive_statistics="running")
