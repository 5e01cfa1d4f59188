"""Meta-Curvature's mode products against loops over indices, its meta-gradient against a loop over tasks and steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.algorithms.meta_curvature import MetaCurvature, MetaCurvatureConfig, transformed
from pipeline.errors import ConfigError
from pipeline.models.conv4 import Conv4Config
from pipeline.models.text import TextConfig
from pipeline.tasks.objectives import Classification
from tests.references import (
    Point,
    Quadratic,
    assert_gradients,
    episodes,
    leaves,
    loss,
    network,
    quadratic_batch,
    shaken,
)

RATE = 0.2
pytestmark = pytest.mark.usefixtures("one_thread")


def learner(model: Any = None, **settings: Any) -> MetaCurvature:
    config = MetaCurvatureConfig(name="meta_curvature", **({"inner_lr": RATE, "adaptation_steps": 2} | settings))
    return MetaCurvature(config, model=model or network(), objective=Classification())


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (3, 2, 2, 3), (2, 2, 1, 2, 2)])
def test_mode_products_by_index(shape: tuple[int, ...]) -> None:
    """MC(G)[o, i, f] = Σ M_o[o, o'] M_i[i, i'] M_f[f, f'] G[o', i', f'], for each task its own matrices."""
    generator = torch.Generator().manual_seed(0)
    tasks, sizes = 2, list(shape[:2]) + ([torch.Size(shape[2:]).numel()] if len(shape) > 2 else [])
    grad = torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)
    matrices = [torch.randn(tasks, size, size, generator=generator, dtype=torch.float64) for size in sizes]
    got = transformed(grad, matrices)
    assert got.shape == grad.shape
    for task in range(tasks):
        flat, expected = grad[task].reshape(sizes), torch.zeros(sizes, dtype=torch.float64)
        for to, of in itertools.product(*[list(itertools.product(*map(range, sizes)))] * 2):
            factor = torch.ones((), dtype=torch.float64)
            for matrix, row, column in zip(matrices, to, of, strict=True):
                factor = factor * matrix[task, row, column]
            expected[to] += factor * flat[of]
        torch.testing.assert_close(got[task].reshape(sizes), expected, rtol=1e-12, atol=1e-12)


def test_closed_form_of_the_quadratic() -> None:
    """One step from θ to θ − αM(θ − c): A = I − αM, and the derivatives AᵀA(θ − c) and −α A(θ − c)(θ − c)ᵀ."""
    config = MetaCurvatureConfig(name="meta_curvature", inner_lr=RATE)
    algorithm = MetaCurvature(config, model=Point(), objective=Quadratic())  # type: ignore[arg-type]
    state, batch = shaken(algorithm.init(0)), quadratic_batch(4)
    gradient = algorithm.meta_grad(state, batch, step=0)
    step = torch.eye(3, dtype=torch.float64) - RATE * state.params["meta_curvature/out/theta"]
    of_theta, of_matrix = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for centre in batch.support_y[:, 0]:
        away = state.params["theta"] - centre
        of_theta += step.T @ step @ away
        of_matrix += -RATE * torch.outer(step @ away, away)
    torch.testing.assert_close(gradient.grads["theta"], of_theta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.grads["meta_curvature/out/theta"], of_matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_network_by_hand(first_order: bool) -> None:
    algorithm = learner(first_order=first_order, freeze=["norm1.weight"])
    state, batch = shaken(algorithm.init(0)), episodes()
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)

    def curved(name: str, grad: Tensor) -> Tensor:
        out = params[f"meta_curvature/out/{name}"]
        return out @ grad if grad.ndim == 1 else out @ grad @ params[f"meta_curvature/in/{name}"].T

    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        adapted = {k: v for k, v in params.items() if "/" not in k}
        moving = [name for name in adapted if name != "norm1.weight"]
        for _ in range(2):
            support_loss = loss(adapted, support_x, support_y)
            grads = torch.autograd.grad(support_loss, [adapted[k] for k in moving], create_graph=not first_order)
            adapted |= {k: adapted[k] - RATE * curved(k, g) for k, g in zip(moving, grads, strict=True)}
        total = total + loss(adapted, query_x, query_y)
    assert_gradients(gradient.grads, total, params)


def test_at_the_identity_it_is_maml() -> None:
    """On convolutions too, whose filters have all three modes."""
    model = Conv4Config(name="conv4", hidden=4, downsample="stride").build(
        input_shape=(1, 16, 16), num_outputs=3, dtype=torch.float64
    )
    algorithm, batch = learner(model), episodes()
    batch = batch._replace(
        support_x=batch.support_x.repeat(1, 1, 64).unflatten(2, (1, 16, 16)),
        query_x=batch.query_x.repeat(1, 1, 64).unflatten(2, (1, 16, 16)),
    )
    maml = MAML(MAMLConfig(name="maml", inner_lr=RATE, adaptation_steps=2), model=model, objective=Classification())
    state = algorithm.init(0)
    shapes = {name: tuple(v.shape) for name, v in state.params.items() if name.endswith("block2.conv.weight")}
    assert shapes == {
        "block2.conv.weight": (4, 4, 3, 3),
        "meta_curvature/out/block2.conv.weight": (4, 4),
        "meta_curvature/in/block2.conv.weight": (4, 4),
        "meta_curvature/filter/block2.conv.weight": (9, 9),
    }
    got, expected = algorithm.meta_grad(state, batch, step=0).grads, maml.meta_grad(maml.init(0), batch, step=0).grads
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert all(float(got[name].abs().max()) > 0 for name in shapes), "and every matrix has a gradient"


def test_what_it_describes() -> None:
    algorithm = learner()
    state = algorithm.init(0)
    assert set(algorithm.describe(state).values()) == {0.0}
    state.params["meta_curvature/in/head.weight"] *= 3
    described = algorithm.describe(state)
    assert described["curvature_in/head.weight"] == pytest.approx(2)
    assert described["curvature_out/head.weight"] == 0
    assert len(described) == sum(name.startswith("meta_curvature/") for name in state.params)


def test_a_table_of_embeddings_is_too_large_to_adapt_and_may_be_left_alone() -> None:
    model = TextConfig(name="text", buckets=5000, embedding=4).build(
        input_shape=(8,), num_outputs=3, dtype=torch.float64
    )
    content = {"name": "meta_curvature", "inner_lr": 0.1}
    with pytest.raises(ConfigError, match=r"5001×5001 for embedding\.weight"):
        MetaCurvatureConfig.model_validate(content).build(model=model, objective=Classification())
    frozen = MetaCurvatureConfig.model_validate({**content, "freeze": ["embedding.weight"]})
    state = frozen.build(model=model, objective=Classification()).init(0)
    assert "meta_curvature/in/head.weight" in state.params
    assert "meta_curvature/out/embedding.weight" not in state.params
