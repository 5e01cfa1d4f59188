"""The learned update rule against a loop over tasks, steps and coordinates, and its beginning as gradient descent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.lstm_meta_learner import LSTMMetaLearner, LSTMMetaLearnerConfig
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification
from pipeline.types import MetaState, Params, TaskBatch

TASKS, N_WAY, INPUTS, HIDDEN = 2, 3, 2, 3
OWN = "lstm_meta_learner/"


def learner(**settings: Any) -> LSTMMetaLearner:
    settings = {"inner_lr": 0.1, "adaptation_steps": 2, "hidden_units": HIDDEN} | settings
    config = LSTMMetaLearnerConfig(name="lstm_meta_learner", **settings)
    model = MLPConfig(name="mlp", hidden=[2]).build(input_shape=(INPUTS,), num_outputs=N_WAY, dtype=torch.float64)
    return LSTMMetaLearner(config, model=model, objective=Classification())


def batch() -> TaskBatch:
    generator = torch.Generator().manual_seed(4)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, N_WAY * per_class, INPUTS, generator=generator, dtype=torch.float64)
        return x, torch.arange(N_WAY).repeat_interleave(per_class).expand(TASKS, -1)

    return TaskBatch(*part(2), *part(3))


def random_state(algorithm: LSTMMetaLearner) -> MetaState:
    """Weights large enough that everything matters."""
    generator = torch.Generator().manual_seed(5)
    state = algorithm.init(0)
    params = {k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.params.items()}
    return MetaState(params, state.buffers)


def reference_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    hidden = (x @ params["layer1.weight"].T + params["layer1.bias"]).clamp_min(0)
    return F.cross_entropy(hidden @ params["head.weight"].T + params["head.bias"], y)


def reference_features(x: Tensor) -> list[Tensor]:
    """Andrychowicz et al. 2016, appendix A, for one number."""
    if abs(float(x.detach())) >= math.exp(-10):
        return [x.abs().log() / 10, x.sign()]
    return [torch.tensor(-1.0, dtype=x.dtype), x * math.exp(10)]


def reference_step(own: Params, theta: Tensor, gradient: Tensor, loss: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Ravi & Larochelle 2017, sec. 3.1, for one coordinate; `memory` is changed."""
    inputs = torch.stack([*reference_features(gradient), *memory["h"], *reference_features(loss)])
    gates = own["lstm.weight"] @ inputs + own["lstm.bias"]
    enter, keep, leave, new = gates.view(4, HIDDEN)
    memory["c"] = torch.sigmoid(keep) * memory["c"] + torch.sigmoid(enter) * torch.tanh(new)
    memory["h"] = torch.sigmoid(leave) * torch.tanh(memory["c"])
    for gate, name in (("i", "input_gate"), ("f", "forget_gate")):
        seen = torch.cat([memory["h"], theta.view(1), memory[gate].view(1)])
        memory[gate] = torch.sigmoid(own[f"{name}.weight"][0] @ seen + own[f"{name}.bias"][0])
    return memory["f"] * theta - memory["i"] * gradient


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_agrees_with_a_reference_coordinate_by_coordinate(first_order: bool, recompute: bool) -> None:
    algorithm = learner(first_order=first_order, recompute_inner_steps=recompute)
    state, tasks = random_state(algorithm), batch()
    gradient = algorithm.meta_grad(state, tasks, step=0)

    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    own = {k.removeprefix(OWN): v for k, v in leaves.items() if k.startswith(OWN)}
    total = torch.zeros((), dtype=torch.float64)
    gates = {"i": 0.0, "f": 0.0}
    for task in range(TASKS):
        support_x, support_y, query_x, query_y = (part[task] for part in tasks[:4])
        params = {k: v for k, v in leaves.items() if not k.startswith(OWN)}
        zeros = torch.zeros(HIDDEN, dtype=torch.float64)
        memories = {
            k: [{"h": zeros, "c": zeros, "i": zeros[0], "f": zeros[0]} for _ in range(v.numel())]
            for k, v in params.items()
        }
        for _ in range(2):
            loss = reference_loss(params, support_x, support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order, retain_graph=True)
            loss = loss.detach() if first_order else loss
            new = {}
            for (name, value), grad in zip(params.items(), grads, strict=True):
                coordinates = zip(value.flatten(), grad.flatten(), memories[name], strict=True)
                moved = [reference_step(own, theta, g, loss, memory) for theta, g, memory in coordinates]
                new[name] = torch.stack(moved).view_as(value)
            params = new
        total = total + reference_loss(params, query_x, query_y)
        flat = [memory for of_leaf in memories.values() for memory in of_leaf]
        gates = {k: v + sum(float(memory[k].detach()) for memory in flat) / len(flat) for k, v in gates.items()}

    assert float(gradient.metrics["meta_loss"] - total.detach()) == pytest.approx(0, abs=1e-12)
    assert float(gradient.metrics["lstm_input_gate"]) == pytest.approx(gates["i"], rel=1e-12)
    assert float(gradient.metrics["lstm_forget_gate"]) == pytest.approx(gates["f"], rel=1e-12)
    expected = torch.autograd.grad(total, list(leaves.values()))
    for (name, got), want in zip(gradient.grads.items(), expected, strict=True):
        assert float(want.norm()) > 1e-9, name
        assert float((got - want).norm() / want.norm()) < 1e-9, name


def test_it_starts_as_gradient_descent() -> None:
    """With no weights and a forget gate that is open, its steps are MAML's."""
    algorithm, tasks = learner(forget_bias=60.0, adaptation_steps=3), batch()
    state = algorithm.init(0)
    weights = {k: torch.zeros_like(v) for k, v in state.params.items() if k.startswith(OWN) and k.endswith("weight")}
    state = MetaState(state.params | weights, {})
    model = algorithm.model
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=3), model=model, objective=Classification())
    paths = [
        list(each.adaptation_path(given, tasks.support_x, tasks.support_y, steps=3, inductive=False))
        for each, given in ((algorithm, state), (maml, maml.init(0)))
    ]
    for ours, theirs in zip(*paths, strict=True):
        assert ours.params.keys() == theirs.params.keys()
        for name, value in theirs.params.items():
            torch.testing.assert_close(ours.params[name], value, rtol=1e-12, atol=1e-14)
    described = algorithm.describe(algorithm.init(0))
    assert described == {f"{OWN}input_gate": pytest.approx(0.1), f"{OWN}forget_gate": pytest.approx(1.0)}


def test_frozen_parameters_stay_and_steps_may_be_more_than_in_training() -> None:
    algorithm, tasks = learner(freeze=["layer1.*"], eval_adaptation_steps=5), batch()
    state = random_state(algorithm)
    *_, last = algorithm.adaptation_path(state, tasks.support_x, tasks.support_y, steps=5, inductive=False)
    assert torch.equal(last.params["layer1.weight"], state.params["layer1.weight"].expand(TASKS, -1, -1))
    assert float((last.params["head.weight"] - state.params["head.weight"]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [("inner_lr", 1.0), ("inner_optimizer", "adam"), ("inner_momentum", 0.9), ("inner_weight_decay", 0.1)],
)
def test_what_the_learned_rule_replaces_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        learner(**{key: value})
