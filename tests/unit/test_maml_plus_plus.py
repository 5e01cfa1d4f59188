"""MAML++ against a loop over tasks and steps that has every part of it, each part alone, and all of them off: MAML."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.algorithms.maml_plus_plus import MAMLPlusPlus, MAMLPlusPlusConfig
from pipeline.tasks.objectives import Classification
from pipeline.types import MetaState, Params
from tests.references import assert_gradients, episodes, leaves, loss, network, outputs, shaken

RATE, AFFINE = "maml_plus_plus/rate/", "maml_plus_plus/affine/"
K, ALPHA = 3, 0.2
OFF: dict[str, Any] = {
    "per_step_rates": False,
    "multi_step_loss_steps": 0,
    "per_step_statistics": False,
    "per_step_affine": False,
    "inductive_statistics": "support",
}
NORM = ("norm1.weight", "norm1.bias")
pytestmark = pytest.mark.usefixtures("one_thread")


def learner(**settings: Any) -> MAMLPlusPlus:
    config = MAMLPlusPlusConfig(name="maml_plus_plus", **({"inner_lr": ALPHA, "adaptation_steps": K} | settings))
    return MAMLPlusPlus(config, model=network(), objective=Classification())


def at_step(params: Params, adapted: Params, made: int) -> Params:
    """What the network computes with after `made` steps: the gains and offsets of that step added."""
    row = min(made, K)
    return adapted | {k: adapted[k] + params[AFFINE + k][row] for k in NORM if AFFINE + k in params}


def path_by_hand(
    params: Params, x: Tensor, y: Tensor, *, steps: int = K, frozen: tuple[str, ...] = (), create_graph: bool = True
) -> list[Params]:
    """One task's adapted parameters, as the network uses them, after 0, 1, … steps."""
    adapted = {k: v for k, v in params.items() if "/" not in k}
    moving = [name for name in adapted if name not in frozen]
    path = [at_step(params, adapted, 0)]
    for made in range(steps):
        support_loss = loss(at_step(params, adapted, made), x, y)
        grads = torch.autograd.grad(support_loss, [adapted[k] for k in moving], create_graph=create_graph)
        for name, grad in zip(moving, grads, strict=True):
            rate = params[RATE + name][min(made, K - 1)] if RATE + name in params else ALPHA
            adapted = adapted | {name: adapted[name] - rate * grad}
        path.append(at_step(params, adapted, made + 1))
    return path


def weights_by_hand(step: int, lasting: int) -> list[float]:
    """The authors' schedule, with epochs of one outer step."""
    if step >= lasting:
        return [0.0] * (K - 1) + [1.0]
    decay = 1.0 / K / lasting
    others = [max(1.0 / K - step * decay, 0.03 / K)] * (K - 1)
    return [*others, min(1.0 / K + step * (K - 1) * decay, 1.0 - (K - 1) * 0.03 / K)]


PARTS: dict[str, dict[str, Any]] = {
    "rates": {"per_step_rates": True},
    "multi-step loss": {"multi_step_loss_steps": 10},
    "affine": {"per_step_affine": True},
    "statistics": {"per_step_statistics": True, "inductive_statistics": "running"},
}
ALL = {k: v for part in PARTS.values() for k, v in part.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("parts", "step"),
    [*((part, 4) for part in PARTS.values()), (ALL, 0), (ALL, 4), (ALL, 10)],
    ids=[*PARTS, "all at the start", "all on the way", "all after annealing"],
)
def test_meta_gradient_by_hand(parts: dict[str, Any], step: int, recompute: bool) -> None:
    algorithm = learner(**OFF | parts, recompute_inner_steps=recompute)
    state, batch = shaken(algorithm.init(0), 0.1), episodes()
    gradient = algorithm.meta_grad(state, batch, step=step)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    weights = weights_by_hand(step, parts.get("multi_step_loss_steps", 0))
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        path = path_by_hand(params, support_x, support_y)
        for weight, adapted in zip(weights, path[1:], strict=True):
            total = total + weight * loss(adapted, query_x, query_y)
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(float(total.detach()), rel=1e-12)
    assert_gradients(gradient.grads, total, params)
    learned = {name.rpartition("/")[0] + "/" for name in params if "/" in name}
    assert learned == {k for k, key in ((RATE, "per_step_rates"), (AFFINE, "per_step_affine")) if parts.get(key)}
    after = parts.get("multi_step_loss_steps", 0) <= step
    assert [name for name in gradient.metrics if "step" in name] == (
        [] if after else [f"query_loss_step{i}" for i in range(1, K + 1)]
    )


def test_with_everything_off_it_is_maml() -> None:
    algorithm = learner(**OFF)
    config = MAMLConfig(name="maml", inner_lr=ALPHA, adaptation_steps=K)
    maml = MAML(config, model=network(), objective=Classification())
    state, batch = shaken(maml.init(0)), episodes()
    assert algorithm.init(0).params.keys() == state.params.keys()
    got, expected = algorithm.meta_grad(state, batch, step=0), maml.meta_grad(state, batch, step=0)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_at_first_every_rate_is_the_given_one_and_nothing_is_added() -> None:
    everything, nothing = learner(**OFF | ALL | {"multi_step_loss_steps": 0}), learner(**OFF)
    state, batch = everything.init(0), episodes()
    assert all(bool((v == ALPHA).all()) for k, v in state.params.items() if k.startswith(RATE))
    got = everything.meta_grad(state, batch, step=0).grads
    expected = nothing.meta_grad(nothing.init(0), batch, step=0).grads
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert all(float(got[k].abs().min()) > 0 for k in state.params if k.startswith(RATE) and "layer1.bias" not in k)


@pytest.mark.parametrize("step", [0, 4, 5])
def test_first_order_until_a_step(step: int) -> None:
    algorithm = learner(**OFF | ALL, first_order_steps=5)
    state, batch = shaken(algorithm.init(0), 0.1), episodes()
    gradient = algorithm.meta_grad(state, batch, step=step)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        path = path_by_hand(params, support_x, support_y, create_graph=step >= 5)
        for weight, adapted in zip(weights_by_hand(step, 10), path[1:], strict=True):
            total = total + weight * loss(adapted, query_x, query_y)
    assert_gradients(gradient.grads, total, params)


def test_the_weights_of_the_steps() -> None:
    algorithm = learner(multi_step_loss_steps=10)
    for step in (0, 1, 5, 9, 10, 11, 1000):
        assert algorithm._loss_weights(step) == pytest.approx(weights_by_hand(step, 10))
        assert sum(algorithm._loss_weights(step)) == pytest.approx(1)
    assert learner(multi_step_loss_steps=0)._loss_weights(0) == [0.0, 0.0, 1.0]
    assert learner(multi_step_loss_steps=10, adaptation_steps=1)._loss_weights(0) == [1.0]


def with_statistics(algorithm: MAMLPlusPlus) -> tuple[MetaState, Params]:
    """A state after two outer steps, and what was observed in the second one."""
    state, batch = shaken(algorithm.init(0), 0.1), episodes()
    for _ in range(2):
        observed = {k: v / 3 for k, v in algorithm.meta_grad(state, batch, step=0).statistics.items()}
        state = MetaState(state.params, algorithm.update_buffers(state.buffers, observed))
        batch = batch._replace(query_x=batch.query_x + 1)
    return state, observed


def test_statistics_are_those_of_the_query_sets_at_every_step() -> None:
    algorithm = learner(**OFF | ALL)
    state, batch = shaken(algorithm.init(0), 0.1), episodes()
    got = algorithm.meta_grad(state, batch, step=0).statistics
    assert set(got) == {"norm1.mean", "norm1.var"}
    mean, var = torch.zeros(2, K + 1, 5, dtype=torch.float64)
    for support_x, support_y, query_x, _ in zip(*batch[:4], strict=True):
        for made, adapted in enumerate(path_by_hand(leaves(state.params), support_x, support_y)):
            x = (query_x @ adapted["layer1.weight"].T + adapted["layer1.bias"]).detach()
            mean[made] += x.mean(0)
            var[made] += x.var(0, unbiased=False)
    torch.testing.assert_close(got["norm1.mean"], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got["norm1.var"], var, rtol=1e-10, atol=1e-12)
    assert float((mean[1:] - mean[:-1]).abs().min(1).values.max()) > 1e-4, "they differ by step"


def test_more_steps_than_in_training_use_the_last_ones_quantities() -> None:
    """Answers after 0 … 5 steps, inductive by each step's running statistics, and transductive."""
    algorithm, batch = learner(**OFF | ALL), episodes()
    state, observed = with_statistics(algorithm)
    buffers = state.buffers
    assert buffers["norm1.mean"].shape == (K + 1, 5)
    assert not torch.allclose(buffers["norm1.mean"], observed["norm1.mean"]), "an average of two"
    path = algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=5, inductive=True)
    params = leaves(state.params)
    by_hand = [path_by_hand(params, x, y, steps=5) for x, y in zip(batch.support_x, batch.support_y, strict=True)]
    for made, adapted in enumerate(path):
        row = min(made, K)
        given = buffers["norm1.mean"][row], buffers["norm1.var"][row]
        inductive = algorithm.predict(adapted, batch.query_x, "inductive")
        transductive = algorithm.predict(adapted, batch.query_x, "transductive")
        for task, expected in enumerate(by_hand):
            query_x = batch.query_x[task]
            torch.testing.assert_close(
                inductive[task], outputs(expected[made], query_x, given).detach(), rtol=1e-9, atol=1e-9
            )
            torch.testing.assert_close(
                transductive[task], outputs(expected[made], query_x).detach(), rtol=1e-9, atol=1e-9
            )


def test_before_any_outer_step_inductive_answers_use_the_support_set() -> None:
    algorithm, batch = learner(**OFF | ALL), episodes()
    state = algorithm.init(0)
    first = next(algorithm.adaptation_path(state, batch.support_x, batch.support_y, steps=1, inductive=True))
    assert first.statistics is not None
    x = batch.support_x[0] @ state.params["layer1.weight"].T + state.params["layer1.bias"]
    torch.testing.assert_close(first.statistics["norm1.mean"][0], x.mean(0))


def test_where_only_the_head_adapts_the_body_still_knows_the_step() -> None:
    """Features would be computed once, but their normalization is another one at every step."""
    frozen = ("layer1.weight", "layer1.bias", *NORM)
    algorithm = learner(**OFF | PARTS["affine"], freeze=["layer1.*", "norm1.*"])
    state, batch = shaken(algorithm.init(0), 0.1), episodes()
    gradient = algorithm.meta_grad(state, batch, step=0)
    params, total = leaves(state.params), torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        total = total + loss(path_by_hand(params, support_x, support_y, frozen=frozen)[-1], query_x, query_y)
    assert_gradients(gradient.grads, total, params)
    assert algorithm.meta_grad(state, batch, step=0).grads.keys() == state.params.keys()


def test_what_it_describes() -> None:
    algorithm = learner(freeze=["norm1.*"])
    state = algorithm.init(0)
    state.params[RATE + "head.weight"][1] = -0.5
    state.params[AFFINE + "norm1.bias"][:] = 2
    described = algorithm.describe(state)
    assert [described[f"rate/head.weight/step{i}"] for i in (1, 2, 3)] == pytest.approx([ALPHA, -0.5, ALPHA])
    assert described["affine/norm1.bias"] == pytest.approx(2)
    assert described["affine/norm1.weight"] == 0
    assert not any(name.startswith("rate/norm1") for name in described)
    assert learner(**OFF).describe(learner(**OFF).init(0)) == {}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="per_step_statistics are running statistics"):
        learner(inductive_statistics="support")
    with pytest.raises(ValueError, match="normalization: transductive in training"):
        learner(normalization="inductive")
