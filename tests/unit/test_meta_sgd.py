"""Meta-SGD against the closed form of a quadratic and against a loop over tasks and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.algorithms.meta_sgd import MetaSGD, MetaSGDConfig
from pipeline.tasks.objectives import Classification
from pipeline.types import MetaState
from tests.references import (
    DIMENSION,
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

RATE = "meta_sgd/rate/"
pytestmark = pytest.mark.usefixtures("one_thread")


def learner(**settings: Any) -> MetaSGD:
    config = MetaSGDConfig(name="meta_sgd", **settings)
    return MetaSGD(config, model=network(), objective=Classification())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_closed_form_of_the_quadratic(steps: int, first_order: bool) -> None:
    """θ_k − c = (1 − α)^k (θ − c), number by number, and ½‖θ_k − c‖² derived by hand."""
    config = MetaSGDConfig(name="meta_sgd", adaptation_steps=steps, first_order=first_order)
    algorithm = MetaSGD(config, model=Point(), objective=Quadratic())  # type: ignore[arg-type]
    rates = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)  # forwards, backwards, not at all
    assert len(rates) == DIMENSION
    theta, batch = algorithm.init(0).params["theta"], quadratic_batch(4)
    gradient = algorithm.meta_grad(MetaState({"theta": theta, RATE + "theta": rates}, {}), batch, step=0)
    away = theta - batch.support_y[:, 0]  # [T, D]
    kept = 1 - rates
    if first_order:  # θ_k = θ − α ∘ Σ_j g_j with g_j = (1 − α)^j (θ − c) taken as constants
        of_theta = kept**steps * away
        of_rates = -(kept**steps) * away * sum(kept**j for j in range(steps)) * away
    else:
        of_theta = kept ** (2 * steps) * away
        of_rates = -steps * kept ** (2 * steps - 1) * away.square()
    torch.testing.assert_close(gradient.grads["theta"], of_theta.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.grads[RATE + "theta"], of_rates.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_network_by_hand(first_order: bool) -> None:
    algorithm = learner(adaptation_steps=2, first_order=first_order, freeze=["norm1.bias"])
    state, batch = shaken(algorithm.init(0)), episodes()
    rates = {name.removeprefix(RATE): v for name, v in state.params.items() if name.startswith(RATE)}
    assert any(bool((rate < 0).any()) for rate in rates.values())
    assert "norm1.bias" not in rates
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        adapted = {k: v for k, v in params.items() if "/" not in k}
        for _ in range(2):
            support_loss = loss(adapted, support_x, support_y)
            grads = torch.autograd.grad(support_loss, [adapted[k] for k in rates], create_graph=not first_order)
            adapted |= {k: adapted[k] - params[RATE + k] * g for k, g in zip(rates, grads, strict=True)}
        total = total + loss(adapted, query_x, query_y)
    assert_gradients(gradient.grads, total, params)


def test_rates_begin_between_the_two_numbers_whatever_the_global_generator() -> None:
    algorithm = learner(initial_rates=[0.005, 0.1])
    state = algorithm.init(3)
    torch.manual_seed(99)
    again, other = algorithm.init(3), algorithm.init(4)
    rates = {name: value for name, value in state.params.items() if name.startswith(RATE)}
    assert set(rates) == {RATE + name for name in algorithm.model.parameter_names}
    for name, value in rates.items():
        assert value.shape == state.params[name.removeprefix(RATE)].shape
        assert torch.equal(value, again.params[name])
        assert not torch.equal(value, other.params[name])
        assert float(value.min()) >= 0.005
        assert float(value.max()) <= 0.1
    together = torch.cat([value.flatten() for value in rates.values()])
    assert float(together.max() - together.min()) > 0.08
    assert len(together.unique()) == len(together), "drawn for each number of each tensor"
    same = learner(initial_rates=[0.4, 0.4]).init(0).params[RATE + "head.weight"]
    assert bool((same == 0.4).all())


def test_what_it_describes() -> None:
    algorithm = learner()
    state = algorithm.init(0)
    state.params[RATE + "head.bias"] = torch.tensor([0.5, -0.1, -0.7], dtype=torch.float64)
    described = algorithm.describe(state)
    assert described["rate/head.bias"] == pytest.approx(-0.1)
    assert described["negative_rates/head.bias"] == pytest.approx(2 / 3)
    assert described["negative_rates/head.weight"] == 0
    assert len(described) == 2 * len(algorithm.model.parameter_names)


@pytest.mark.parametrize("rates", [[0.1, 0.005], [0.0, 0.1], [-0.1, 0.1], [0.1]])
def test_refused_ranges(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="initial_rates"):
        learner(initial_rates=rates)
