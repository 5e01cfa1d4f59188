"""ANIL and BOIL against MAML with frozen names and against loops by hand; ANIL's features are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.anil import ANIL, BOIL, ANILConfig, BOILConfig
from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.models.conv4 import Conv4Config
from pipeline.tasks.objectives import Classification
from pipeline.types import Params, Statistics, TaskBatch
from tests.references import N_WAY, assert_gradients, episodes, features, leaves, loss, network, shaken

RATE, STEPS = 0.4, 3
KEYS: dict[str, Any] = {"inner_lr": RATE, "adaptation_steps": STEPS}
BODY, HEAD = ["layer1.*", "norm1.*", "block*"], ["head.*"]
pytestmark = pytest.mark.usefixtures("one_thread")


def anil(model: Any = None, **settings: Any) -> ANIL:
    config = ANILConfig(name="anil", **(KEYS | settings))
    return ANIL(config, model=model or network(), objective=Classification())


def boil(model: Any = None, **settings: Any) -> BOIL:
    config = BOILConfig(name="boil", **(KEYS | settings))
    return BOIL(config, model=model or network(), objective=Classification())


def maml(model: Any, freeze: list[str], **settings: Any) -> MAML:
    freeze = [pattern for pattern in freeze if any(n.startswith(pattern.strip(".*")) for n in model.parameter_names)]
    config = MAMLConfig(name="maml", freeze=freeze, **(KEYS | settings))
    return MAML(config, model=model, objective=Classification())


def conv4() -> Any:
    config = Conv4Config(name="conv4", hidden=4, downsample="stride")
    return config.build(input_shape=(1, 16, 16), num_outputs=N_WAY, dtype=torch.float64)


def images() -> TaskBatch:
    generator = torch.Generator().manual_seed(2)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(2, N_WAY * per_class, 1, 16, 16, generator=generator, dtype=torch.float64)
        return x, torch.arange(N_WAY).repeat_interleave(per_class).expand(2, -1)

    return TaskBatch(*part(1), *part(2))


class Whole(MAML):
    """MAML that passes the whole network at every step, whatever is frozen."""

    def _features_stay(self) -> bool:
        return False


@pytest.mark.parametrize("settings", [{}, {"first_order": True}, {"inner_momentum": 0.5, "normalization": "inductive"}])
@pytest.mark.parametrize("model", [network, conv4])
@pytest.mark.parametrize(("ours", "frozen"), [(anil, BODY), (boil, HEAD)], ids=["anil", "boil"])
def test_maml_with_the_rest_frozen(ours: Any, frozen: list[str], model: Any, settings: dict[str, Any]) -> None:
    algorithm = ours(model(), **settings)
    theirs = maml(model(), frozen, **settings)
    theirs.__class__ = Whole
    state, batch = shaken(algorithm.init(0)), images() if model is conv4 else episodes()
    got, expected = algorithm.meta_grad(state, batch, step=0), theirs.meta_grad(state, batch, step=0)
    assert got.grads.keys() == expected.grads.keys()
    scale = max(float(value.norm()) for value in expected.grads.values())
    for name, value in expected.grads.items():
        torch.testing.assert_close(got.grads[name], value, rtol=1e-10, atol=1e-10 * scale, msg=name)
    torch.testing.assert_close(got.metrics["meta_loss"], expected.metrics["meta_loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("first_order", [False, True])
def test_anil_by_hand(first_order: bool) -> None:
    """Logistic regression on fixed features, and the derivative through all of it and through the features."""
    algorithm = anil(first_order=first_order)
    state, batch = shaken(algorithm.init(0)), episodes()
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        of_support = features(params, support_x)
        weight, bias = params["head.weight"], params["head.bias"]
        for _ in range(STEPS):
            support_loss = F.cross_entropy(of_support @ weight.T + bias, support_y)
            steps = torch.autograd.grad(support_loss, [weight, bias], create_graph=not first_order)
            weight, bias = weight - RATE * steps[0], bias - RATE * steps[1]
        total = total + F.cross_entropy(features(params, query_x) @ weight.T + bias, query_y)
    assert_gradients(gradient.grads, total, params)
    assert float(gradient.grads["layer1.weight"].norm()) > 1e-3, "the body is learned"


@pytest.mark.parametrize("first_order", [False, True])
def test_boil_by_hand(first_order: bool) -> None:
    algorithm = boil(first_order=first_order)
    state, batch = shaken(algorithm.init(0)), episodes()
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        adapted = dict(params)
        for _ in range(STEPS):
            body = [name for name in adapted if not name.startswith("head")]
            support_loss = loss(adapted, support_x, support_y)
            grads = torch.autograd.grad(support_loss, [adapted[k] for k in body], create_graph=not first_order)
            adapted |= {k: adapted[k] - RATE * g for k, g in zip(body, grads, strict=True)}
        total = total + loss(adapted, query_x, query_y)
    assert_gradients(gradient.grads, total, params)
    assert float(gradient.grads["head.weight"].norm()) > 1e-3, "the head is learned"


@pytest.mark.parametrize(("algorithm", "moves"), [(anil(), {"head"}), (boil(network("none")), {"layer1"})])
def test_what_moves(algorithm: GradientBased, moves: set[str]) -> None:
    state, batch = shaken(algorithm.init(0)), episodes()
    *_, adapted = algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=STEPS, inductive=False)
    changed = {name for name, value in adapted.params.items() if not torch.equal(value[0], state.params[name])}
    assert changed == {name for name in state.params if name.partition(".")[0] in moves}


class Counted:
    """A model that counts its passes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.passes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, *args: Any, **how: Any) -> tuple[Tensor, Statistics]:
        self.passes.append("whole")
        return self._model.apply(*args, **how)

    def features(self, params: Params, x: Any, **how: Any) -> tuple[Tensor, Statistics]:
        self.passes.append("body")
        return self._model.features(params, x, **how)


@pytest.mark.parametrize("recompute", [False, True])
def test_features_are_computed_once(recompute: bool) -> None:
    model = Counted(network())
    algorithm = anil(model, adaptation_steps=5, recompute_inner_steps=recompute)
    state, batch = algorithm.init(0), episodes()
    algorithm.meta_grad(state, batch, step=0)
    assert model.passes == ["body", "whole"], "the support set's features, and the query set"
    model.passes.clear()
    list(algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=9, inductive=False))
    assert model.passes == ["body"]
    model.passes.clear()
    boil(model, adaptation_steps=5).meta_grad(state, batch, step=0)
    assert model.passes == ["whole"] * 6


def test_a_part_of_what_is_left_may_be_frozen_but_not_all() -> None:
    algorithm = anil(freeze=["head.bias"])
    assert algorithm.adapted_names == ["head.weight"]
    assert boil(freeze=["norm1.*"]).adapted_names == ["layer1.weight", "layer1.bias"]
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        anil(freeze=["head.*"])
