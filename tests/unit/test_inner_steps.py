"""Recomputed inner steps give the meta-gradient of the unrolled graph, and keep none of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.algorithms.inner_steps import InnerStep, last, path
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.models.module import ModuleModel
from pipeline.tasks.objectives import Classification
from pipeline.types import MetaState, Params, TaskBatch

X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WEIGHTS = ("first", "second")


def loss(params: Params, *, dropout: float = 0.0) -> Tensor:
    hidden = torch.tanh(X @ params["first"])
    return F.mse_loss(F.dropout(hidden, dropout) @ params["second"], Y)


def gradients(state: Params, create_graph: bool, **how: float) -> Params:
    weights = [state[name] for name in WEIGHTS]
    found = torch.autograd.grad(loss(state, **how), weights, create_graph=create_graph)
    return dict(zip(WEIGHTS, found, strict=True))


def sgd(state: Params, learned: Params, number: int, *, create_graph: bool) -> Params:
    """Meta-SGD: a learned rate for every parameter."""
    grads = gradients(state, create_graph)
    return {name: state[name] - learned[name] * grads[name] for name in WEIGHTS}


def with_dropout(state: Params, learned: Params, number: int, *, create_graph: bool) -> Params:
    grads = gradients(state, create_graph, dropout=0.5)
    return {name: state[name] - learned[name] * grads[name] for name in WEIGHTS}


def momentum(state: Params, learned: Params, number: int, *, create_graph: bool) -> Params:
    grads = gradients(state, create_graph)
    velocity = {name: learned["momentum"] * state[f"v.{name}"] + grads[name] for name in WEIGHTS}
    return {name: state[name] - learned[name] * velocity[name] for name in WEIGHTS} | {
        f"v.{name}": velocity[name] for name in WEIGHTS
    }


def adam(state: Params, learned: Params, number: int, *, create_graph: bool) -> Params:
    grads = gradients(state, create_graph)
    new: Params = {}
    for name in WEIGHTS:
        new[f"v.{name}"] = 0.9 * state[f"v.{name}"] + 0.1 * grads[name]
        new[f"s.{name}"] = 0.99 * state[f"s.{name}"] + 0.01 * grads[name].square()
        new[name] = state[name] - learned[name] * new[f"v.{name}"] / (new[f"s.{name}"] + 1e-6).sqrt()
    return {name: new[name] for name in state}


def start(*kinds: str) -> tuple[Params, Params]:
    """Parameters and the named kinds of optimizer state, and learned rates."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_()

    state = {"first": random(3, 5), "second": random(5, 1)}
    for kind in kinds:
        state |= {f"{kind}.{name}": random(*state[name].shape) for name in WEIGHTS}
    learned = {name: random(*state[name].shape) for name in WEIGHTS}
    return state, learned | {"momentum": random()}


@pytest.mark.parametrize(
    ("step", "kinds"),
    [(sgd, ""), (with_dropout, ""), (momentum, "v"), (adam, "vs")],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("steps", [1, 4])
def test_recomputed_is_unrolled(step: InnerStep, kinds: str, steps: int) -> None:
    """Every gradient: of parameters, optimizer state and learned rates."""
    results = []
    for recompute in (False, True):
        state, learned = start(*kinds)
        torch.manual_seed(3)
        end = last(path(step, state, steps, learned=learned, recompute=recompute))
        drawn = torch.rand(1)  # the generator goes on from the forward pass, not from a replay
        outer = loss(end) + sum((end[f"{kind}.first"].square().sum() for kind in kinds), torch.zeros(()))
        wanted = {**state, **{f"learned {name}": value for name, value in learned.items()}}
        grads = torch.autograd.grad(outer, list(wanted.values()), allow_unused=True)
        results.append((outer, drawn, dict(zip(wanted, grads, strict=True)), torch.rand(1)))
    (outer, drawn, plain, after), (outer_r, drawn_r, recomputed, after_r) = results
    assert torch.equal(outer, outer_r)
    assert torch.equal(drawn, drawn_r)
    assert torch.equal(after, after_r), "a replay leaves the generator alone"
    for name, value in plain.items():
        if name == "learned momentum" and step is not momentum:
            assert value is None
        else:
            assert value.abs().max() > 1e-8, name
            torch.testing.assert_close(recomputed[name], value, rtol=1e-12, atol=1e-14, msg=name)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))


def conv4(kernel: str) -> Callable[[], object]:
    config = Conv4Config(name="conv4", hidden=16)
    return lambda: config.build(input_shape=(1, 16, 16), num_outputs=3, dtype=torch.float64, kernel=kernel)  # type: ignore[arg-type]


MODELS: dict[str, Callable[[], object]] = {
    "conv4, pure": conv4("pure"),
    "conv4, closed": conv4("closed"),
    "conv4, native or closed": conv4("auto"),
    "mlp": lambda: MLPConfig(name="mlp").build(input_shape=(1, 16, 16), num_outputs=3, dtype=torch.float64),
    "module, loop": lambda: ModuleModel(network, dtype=torch.float64, batching="loop"),
    "module, vmap": lambda: ModuleModel(network, dtype=torch.float64, batching="vmap"),
}


def maml(model: str, **settings: object) -> tuple[MAML, MetaState, TaskBatch]:
    config = MAMLConfig(name="maml", inner_lr=0.1, **settings)  # type: ignore[arg-type]
    learner = MAML(config, model=MODELS[model](), objective=Classification())  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> Tensor:
        return torch.rand(2, n, 1, 16, 16, dtype=torch.float64, generator=generator)

    labels = torch.arange(3).repeat(2)
    batch = TaskBatch(images(3), labels[:3].expand(2, -1), images(6), labels.expand(2, -1))
    return learner, learner.init(0), batch


@pytest.mark.parametrize("model", MODELS)
def test_mamls_meta_gradient(model: str) -> None:
    learner, state, batch = maml(model, adaptation_steps=3)
    again, _, _ = maml(model, adaptation_steps=3, recompute_inner_steps=True)
    plain, recomputed = learner.meta_grad(state, batch, step=0), again.meta_grad(state, batch, step=0)
    assert torch.equal(plain.metrics["meta_loss"], recomputed.metrics["meta_loss"])
    for name, value in plain.grads.items():
        torch.testing.assert_close(recomputed.grads[name], value, rtol=1e-10, atol=1e-12, msg=name)


class Kept:
    """A tensor that a graph keeps; it lives as long as the graph."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def kept_bytes(learner: MAML, state: MetaState, batch: TaskBatch) -> int:
    """Of the tensors that graphs keep when the outer derivative is taken, each storage once."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    grad, sums = torch.autograd.grad, []

    def keep(value: Tensor) -> Kept:
        kept = Kept(value)
        alive.add(kept)
        return kept

    def counted(*arguments: object, **settings: object) -> object:
        storages = {kept.value.untyped_storage().data_ptr(): kept.value.untyped_storage() for kept in alive}
        sums.append(sum(storage.nbytes() for storage in storages.values()))
        return grad(*arguments, **settings)  # type: ignore[arg-type]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.value), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        learner.meta_grad(state, batch, step=0)
    # the outer derivative: after one call for each inner step, before those of the recomputed ones
    return sums[learner.train_steps]


@pytest.mark.parametrize("model", ["conv4, pure", "conv4, closed", "conv4, native or closed"])
def test_what_is_kept_does_not_grow_with_the_steps(model: str) -> None:
    def kept(steps: int, **settings: object) -> int:
        return kept_bytes(*maml(model, adaptation_steps=steps, **settings))

    _, state, batch = maml(model)
    params = len(batch.support_x) * sum(value.numel() * value.element_size() for value in state.params.values())
    grown = kept(9, recompute_inner_steps=True) - kept(1, recompute_inner_steps=True)
    assert grown <= 8 * 1.1 * params, "each step's parameters and nothing else"
    assert kept(9) - kept(1) > 2 * grown, "or the test sees nothing"


class Noted(torch.autograd.Function):
    """The identity; as long as a graph holds it, it is among the `alive`."""

    alive: ClassVar[weakref.WeakSet[object]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        Noted.alive.add(ctx)
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


def learned_rule(state: Params, learned: Params, number: int, *, create_graph: bool) -> Params:
    """Rates that depend on the gradient: the step has a graph of its own, in first order too."""
    grads = gradients(state, create_graph)
    return {name: state[name] - (Noted.apply(learned[name]) * grads[name]).sigmoid() * grads[name] for name in WEIGHTS}


@pytest.mark.parametrize("kept", [False, True])
def test_a_first_order_step_with_a_graph_of_its_own(kept: bool) -> None:
    state, learned = start()
    end = last(path(learned_rule, state, 3, learned=learned, first_order=True))
    assert len(Noted.alive) == 3 * len(WEIGHTS)
    wanted = [*state.values(), *(learned[name] for name in WEIGHTS)]
    plain = torch.autograd.grad(loss(end), wanted)
    del end
    assert not Noted.alive
    recomputed = last(
        path(learned_rule, state, 3, learned=learned, first_order=True, recompute=True, first_order_keeps_a_graph=kept)
    )
    assert len(Noted.alive) == (0 if kept else 3 * len(WEIGHTS))
    for ours, theirs in zip(torch.autograd.grad(loss(recomputed), wanted), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
