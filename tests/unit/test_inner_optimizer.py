"""Inner steps by every rule against plain sequential loops, their meta-gradients included, and against torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.tasks.objectives import Classification
from pipeline.types import Params
from tests.references import assert_gradients, episodes, leaves, loss, network, shaken

RATE, STEPS = 0.1, 3
BOUND = 0.1  # to clip gradients by
pytestmark = pytest.mark.usefixtures("one_thread")
Rule = Callable[[int, Params, Params, dict[str, Params]], Params]
# step number, parameters, their gradients, memory that the rule keeps -> how far the parameters go, times −RATE


def maml(**settings: Any) -> MAML:
    config = MAMLConfig(name="maml", **({"inner_lr": RATE, "adaptation_steps": STEPS} | settings))
    # Adam makes a step of any gradient, of rounding too, which a bias before a normalization has
    model = network("none" if config.inner_optimizer == "adam" else "batch")
    return MAML(config, model=model, objective=Classification())


def plain(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
    return grads


def momentum(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
    for name, grad in grads.items():
        kept = memory.setdefault(name, {"v": torch.zeros_like(grad)})
        kept["v"] = 0.8 * kept["v"] + grad
    return {name: memory[name]["v"] for name in grads}


def adam(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
    directions = {}
    for name, grad in grads.items():
        kept = memory.setdefault(name, {"m": torch.zeros_like(grad), "v": torch.zeros_like(grad)})
        kept["m"], kept["v"] = 0.6 * kept["m"] + 0.4 * grad, 0.9 * kept["v"] + 0.1 * grad**2
        m, v = kept["m"] / (1 - 0.6 ** (number + 1)), kept["v"] / (1 - 0.9 ** (number + 1))
        directions[name] = m / (v + 1e-16).sqrt()  # ε under the root, where the derivative stays finite at v = 0
    return directions


def decay(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
    return {name: grad + 0.05 * params[name] for name, grad in grads.items()}


def clip(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
    norm = sum(((grad**2).sum() for grad in grads.values()), torch.zeros((), dtype=torch.float64)).sqrt()
    memory.setdefault("norms", {})[str(len(memory.get("norms", {})))] = norm.detach()
    return {name: grad * BOUND / norm if norm > BOUND else grad for name, grad in grads.items()}


def chained(*rules: Rule) -> Rule:
    def rule(number: int, params: Params, grads: Params, memory: dict[str, Params]) -> Params:
        for one in rules:
            grads = one(number, params, grads, memory)
        return grads

    return rule


# keys of the algorithm, the rule by hand
OPTIONS: dict[str, tuple[dict[str, Any], Rule]] = {
    "sgd": ({}, plain),
    "momentum": ({"inner_momentum": 0.8}, momentum),
    "adam": ({"inner_optimizer": "adam", "inner_betas": (0.6, 0.9)}, adam),
    "weight decay": ({"inner_weight_decay": 0.05}, decay),
    "clipping": ({"inner_gradient_clip": BOUND}, clip),
    "all of it": (
        {"inner_weight_decay": 0.05, "inner_gradient_clip": BOUND, "inner_momentum": 0.8},
        chained(decay, clip, momentum),
    ),
    "adam, decayed": (
        {"inner_optimizer": "adam", "inner_betas": (0.6, 0.9), "inner_weight_decay": 0.05},
        chained(decay, adam),
    ),
}


def by_hand(
    params: Params, x: Tensor, y: Tensor, rule: Rule, *, frozen: tuple[str, ...] = (), create_graph: bool = True
) -> list[Params]:
    """One task's parameters after 0, 1, … steps."""
    path, memory = [params], {}
    for number in range(STEPS):
        moving = {k: v for k, v in path[-1].items() if k not in frozen}
        grads = torch.autograd.grad(loss(path[-1], x, y), list(moving.values()), create_graph=create_graph)
        directions = rule(number, moving, dict(zip(moving, grads, strict=True)), memory)
        path.append(path[-1] | {k: v - RATE * directions[k] for k, v in moving.items()})
    if "norms" in memory:
        norms = torch.stack(list(memory["norms"].values()))
        assert bool((norms > BOUND).any()), "or clipping is not tried"
    return path


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
def test_meta_gradient_of_every_rule(option: str, first_order: bool) -> None:
    keys, rule = OPTIONS[option]
    algorithm = maml(first_order=first_order, **keys)
    state, batch = shaken(algorithm.init(0)), episodes()
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        adapted = by_hand(params, support_x, support_y, rule, create_graph=not first_order)[-1]
        total = total + loss(adapted, query_x, query_y)
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(float(total.detach()), rel=1e-12)
    assert_gradients(gradient.grads, total, params)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_step_of_evaluation(option: str) -> None:
    keys, rule = OPTIONS[option]
    algorithm = maml(**keys)
    state, batch = shaken(algorithm.init(0)), episodes()
    path = list(algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=STEPS, inductive=False))
    for task in range(len(batch.support_x)):
        expected = by_hand(leaves(state.params), batch.support_x[task], batch.support_y[task], rule)
        for ours, theirs in zip(path, expected, strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours.params[name][task], value.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("keys", "optimizer", "tolerance"),
    [
        ({}, lambda leaves: torch.optim.SGD(leaves, lr=RATE), 1e-12),
        (
            {"inner_momentum": 0.8, "inner_weight_decay": 0.05},
            lambda leaves: torch.optim.SGD(leaves, lr=RATE, momentum=0.8, weight_decay=0.05),
            1e-12,
        ),
        (
            {"inner_optimizer": "adam"},
            lambda leaves: torch.optim.Adam(leaves, lr=RATE),
            1e-4,
        ),  # its ε is beside the root
    ],
    ids=["sgd", "momentum and decay", "adam"],
)
def test_the_steps_are_those_of_torch_optim(keys: dict[str, Any], optimizer: Any, tolerance: float) -> None:
    algorithm = maml(**keys)
    state, batch = shaken(algorithm.init(0)), episodes()
    *_, adapted = algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=STEPS, inductive=False)
    for task in range(len(batch.support_x)):
        params = leaves(state.params)
        torch_own = optimizer(list(params.values()))
        for _ in range(STEPS):
            torch_own.zero_grad()
            loss(params, batch.support_x[task], batch.support_y[task]).backward()
            torch_own.step()
        for name, value in params.items():
            torch.testing.assert_close(adapted.params[name][task], value.detach(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("option", ["sgd", "momentum", "adam", "clipping"])
def test_frozen_parameters_stay_and_are_still_learned(option: str) -> None:
    keys, rule = OPTIONS[option]
    frozen = ("layer1.weight", "layer1.bias", "norm1.bias", "head.bias")
    algorithm = maml(freeze=["layer1.*", "*.bias"], **keys)
    state, batch = shaken(algorithm.init(0)), episodes()
    *_, adapted = algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=STEPS, inductive=False)
    for name, value in adapted.params.items():
        moved = float((value - state.params[name]).abs().max())
        assert (moved == 0) == (name in frozen), name
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        adapted_params = by_hand(params, support_x, support_y, rule, frozen=frozen)[-1]
        total = total + loss(adapted_params, query_x, query_y)
    assert float(gradient.grads["layer1.weight"].norm()) > 1e-3
    assert_gradients(gradient.grads, total, params)


def test_a_unit_that_is_never_active_has_finite_gradients_under_adam() -> None:
    """Its gradients are zero at every step, and the root of a zero has no finite derivative."""
    algorithm = maml(inner_optimizer="adam", adaptation_steps=2)
    state, batch = shaken(algorithm.init(0)), episodes()
    state.params["layer1.bias"][0] = -100.0
    gradient = algorithm.meta_grad(state, batch, step=0)
    assert all(bool(grad.isfinite().all()) for grad in gradient.grads.values())


def test_each_task_has_its_own_norm_to_clip_by() -> None:
    """A task whose gradient is huge does not make the others' steps shorter."""
    algorithm = maml(inner_gradient_clip=BOUND)
    state, batch = shaken(algorithm.init(0)), episodes()
    wild = batch.support_x.clone()
    wild[0] *= torch.linspace(1, 1000, wild.shape[1], dtype=wild.dtype).unsqueeze(1)

    def adapted(support_x: Tensor) -> Params:
        *_, last = algorithm.adaptation_path(state, support_x, batch.support_y, steps=STEPS, inductive=False)
        return last.params

    calm, beside = adapted(batch.support_x), adapted(wild)
    assert any(not torch.equal(calm[name][0], beside[name][0]) for name in calm)
    for name, value in calm.items():
        torch.testing.assert_close(beside[name][1:], value[1:], rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.freeze: 'block9\.\*' matches no parameter. There are: layer1.w"):
        maml(freeze=["head.*", "block9.*"])
    with pytest.raises(ConfigError, match=r"algorithm.freeze: nothing is left to learn"):
        maml(freeze=["*"])
    with pytest.raises(ValueError, match="is for inner_optimizer: sgd"):
        maml(inner_optimizer="adam", inner_momentum=0.5)
    with pytest.raises(ValueError, match="are for inner_optimizer: adam"):
        maml(inner_betas=(0.0, 0.9))
