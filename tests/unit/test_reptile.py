"""Reptile: θ − φ of a quadratic in closed form, against a plain loop in float64, and what its minibatches hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.reptile import Reptile, ReptileConfig
from pipeline.keys import order
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.training import outer
from pipeline.training.plan import peak_bytes
from pipeline.types import MetaState, Params, Statistics, TaskBatch

TASKS, WAYS, RATE = 3, 3, 0.3
KEYS = torch.tensor([11, -7, 5])


class Point:
    """A model whose output is its parameter: with a squared loss, a quadratic in the parameters."""

    stochastic = False
    parameter_names = ["theta"]  # noqa: RUF012
    head = ("head.weight", "head.bias")  # it has none

    def init(self, seed: int) -> Params:
        return {"theta": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(self, params: Params, x: Tensor, **_: object) -> tuple[Tensor, Statistics]:
        return params["theta"].unsqueeze(1).expand(-1, x.shape[1], -1), {}


class Quadratic(Regression):
    """½‖θ − c‖² per task, the mean over examples; targets [T, N, D] hold c."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(dim=2).mean(dim=1)


def point(**settings: object) -> Reptile:
    config = ReptileConfig(name="reptile", inner_lr=RATE, **settings)  # type: ignore[arg-type]
    return Reptile(config, model=Point(), objective=Quadratic())  # type: ignore[arg-type]


def centres(tasks: int, examples: int = 1) -> Tensor:
    return torch.randn(tasks, examples, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def quadratics(support: Tensor, query: Tensor | None = None) -> TaskBatch:
    """Tasks whose support examples have these centres [T, N, 3]."""
    query = support if query is None else query
    return TaskBatch(support, support, query, query, KEYS.repeat(2)[: len(support)])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_closed_form_of_the_quadratic(steps: int) -> None:
    """φ = c + (1 − α)^k (θ − c), so θ − φ = (1 − (1 − α)^k)(θ − c), summed over tasks."""
    reptile, c = point(adaptation_steps=steps), centres(4)
    state = reptile.init(0)
    gradient = reptile.meta_grad(state, quadratics(c), step=0)
    expected = ((1 - (1 - RATE) ** steps) * (state.params["theta"] - c[:, 0])).sum(0)
    torch.testing.assert_close(gradient.grads["theta"], expected, rtol=1e-12, atol=1e-12)
    after = 0.5 * (1 - RATE) ** (2 * steps) * (state.params["theta"] - c[:, 0]).square().sum()
    torch.testing.assert_close(gradient.metrics["meta_loss"], after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 4])
def test_outer_sgd_is_the_papers_update(tasks: int) -> None:
    """Serial with one task, batched with several: θ ← θ + ε·mean(φ − θ), with ε falling to 0 in a line."""
    reptile, c, epsilon, total = point(adaptation_steps=2), centres(tasks), 0.8, 5
    config = outer.OuterConfig(optimizer="sgd", outer_lr=epsilon, schedule="linear", final_lr_fraction=0)
    params = {k: v.requires_grad_() for k, v in reptile.init(0).params.items()}
    optimizer = outer.make_optimizer(config, params)
    theta = params["theta"].detach().clone()
    for step in range(total):
        gradient = reptile.meta_grad(MetaState(params, {}), quadratics(c), step=step)
        rate = outer.outer_lr(config, step, total, outer.Plateau())
        outer.update(config, optimizer, params, {k: g / tasks for k, g in gradient.grads.items()}, lr=rate)
        ends = [c[task, 0] + (1 - RATE) ** 2 * (theta - c[task, 0]) for task in range(tasks)]
        theta = theta + epsilon * (1 - step / (total - 1)) * sum(end - theta for end in ends) / tasks
        torch.testing.assert_close(params["theta"].detach(), theta, rtol=1e-12, atol=1e-12)


def test_minibatches_go_through_the_set_in_one_order_after_another() -> None:
    """With rate 1 a step on ½‖θ − c‖² ends at the mean of its minibatch's centres, so they can be read off."""
    n, size, steps = 5, 2, 10  # four times through the set; the third minibatch is of two orders
    config = ReptileConfig(name="reptile", inner_lr=1.0, adaptation_steps=steps, inner_batch_size=size)
    reptile = Reptile(config, model=Point(), objective=Quadratic())  # type: ignore[arg-type]
    powers = (10.0 ** torch.arange(n, dtype=torch.float64)).expand(2, n).unsqueeze(2).expand(2, n, 3).contiguous()
    path = list(reptile.adaptation_path(reptile.init(0), powers, powers, steps=steps, inductive=False))
    sums = torch.stack([adapted.params["theta"][:, 0] for adapted in path[1:]]) * size  # [steps, T]
    assert torch.equal(sums[:, 0], sums[:, 1]), "at test all tasks have the same orders"
    totals = sums[:, 0].round().long()
    for five in (totals[:5], totals[5:]):
        assert int(five.sum()) == 22222, "five minibatches of two hold each of five examples twice"
        assert all(set(str(int(total))) <= {"0", "1"} for total in (*five[:2], *five[3:])), "an order repeats nothing"
    assert not torch.equal(totals[:2], totals[5:7]), "the orders differ"


def test_orders_of_training_follow_the_episode() -> None:
    reptile, c = point(adaptation_steps=2, inner_batch_size=2), centres(1, 5).expand(3, -1, -1)
    state = reptile.init(0)
    grads = [reptile.meta_grad(state, quadratics(c).tasks(slice(t, t + 1)), step=0).grads["theta"] for t in range(3)]
    assert not torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[1], grads[2])
    same = quadratics(c)._replace(keys=KEYS[:1].expand(3))
    torch.testing.assert_close(reptile.meta_grad(state, same, step=3).grads["theta"], 3 * grads[0])


@pytest.mark.parametrize("settings", [{"eval_inner_batch_size": 5}, {"inner_batch_size": 99}])
def test_no_more_examples_than_there_are(settings: dict) -> None:
    minibatches = point(adaptation_steps=3, **{"inner_batch_size": 2, **settings})
    whole, c = point(adaptation_steps=3), centres(2, 5)
    ends = [list(a.adaptation_path(a.init(0), c, c, steps=3, inductive=False))[-1] for a in (minibatches, whole)]
    assert torch.equal(ends[0].params["theta"], ends[1].params["theta"])


def test_the_query_set_counts_where_it_is_trained_on() -> None:
    c = centres(2, 4)
    batch, other = quadratics(c[:, :2], c[:, 2:]), quadratics(c[:, :2], c[:, 2:] + 1)
    state = point().init(0)
    for train_on, moved in (("support", c[:, :2]), ("all", c)):
        gradients = [point(train_on=train_on).meta_grad(state, each, step=0).grads["theta"] for each in (batch, other)]
        torch.testing.assert_close(gradients[0], RATE * (state.params["theta"] - moved.mean(1)).sum(0))
        assert torch.equal(gradients[0], gradients[1]) == (train_on == "support")


def images(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(TASKS, WAYS * n, 1, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(WAYS).repeat_interleave(n).expand(TASKS, -1)


def network(params: Params, x: Tensor) -> Tensor:
    """One hidden layer with batch normalization, written independently."""
    x = x.flatten(1) @ params["layer1.weight"].T + params["layer1.bias"]
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * params["norm1.weight"] + params["norm1.bias"]
    return x.relu() @ params["head.weight"].T + params["head.bias"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_meta_gradient_agrees_with_a_plain_loop(optimizer: str) -> None:
    """One task after another, with torch's SGD and Adam written out; the body's first layer frozen."""
    n, size, steps = 4, 5, 4
    batch = TaskBatch(*images(n), *images(2), KEYS)
    model = MLPConfig(name="mlp", hidden=[6], normalization="batch").build(
        input_shape=(1, 16, 16), num_outputs=WAYS, dtype=torch.float64
    )
    config = ReptileConfig(
        name="reptile",
        inner_lr=0.01,
        adaptation_steps=steps,
        inner_optimizer=optimizer,  # type: ignore[arg-type]
        inner_batch_size=size,
        freeze=["layer1.*"],
    )
    assert config.inner_betas == (0.0, 0.999)
    reptile = Reptile(config, model=model, objective=Classification())
    state = reptile.init(3)
    gradient = reptile.meta_grad(state, batch, step=0)
    totals = {k: torch.zeros_like(v) for k, v in state.params.items()}
    loss_after = 0.0
    for task in range(TASKS):
        params = {k: v.clone().requires_grad_(not k.startswith("layer1")) for k, v in state.params.items()}
        moving = [v for v in params.values() if v.requires_grad]
        squares = [torch.zeros_like(v) for v in moving]
        positions = [int(i) for number in range(2) for i in order(KEYS[task], WAYS * n, number)]
        for step in range(steps):
            which = positions[step * size : (step + 1) * size]
            loss = F.cross_entropy(network(params, batch.support_x[task, which]), batch.support_y[task, which])
            for v, square, g in zip(moving, squares, torch.autograd.grad(loss, moving), strict=True):
                square.mul_(0.999).add_(0.001 * g.square())
                root = (square / (1 - 0.999 ** (step + 1)) + 1e-16).sqrt()
                v.data -= 0.01 * (g if optimizer == "sgd" else g / root)
        for name, value in params.items():
            totals[name] += state.params[name] - value.detach()
        loss_after += float(F.cross_entropy(network(params, batch.query_x[task]), batch.query_y[task]).detach())
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(loss_after, rel=1e-10)
    for name, value in totals.items():
        torch.testing.assert_close(gradient.grads[name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert not any(value.requires_grad for value in gradient.grads.values())
    assert float(gradient.grads["layer1.weight"].abs().max()) == 0, "what does not adapt is not learned"


def test_minibatches_where_only_the_head_adapts() -> None:
    """The body's features are computed once, of the whole set; steps take their part of them."""
    batch = TaskBatch(*images(4), *images(2), KEYS)
    model = MLPConfig(name="mlp", hidden=[6]).build(input_shape=(1, 16, 16), num_outputs=WAYS, dtype=torch.float64)
    freeze = [name for name in model.parameter_names if not name.startswith("head")]
    config = ReptileConfig(name="reptile", inner_lr=0.1, adaptation_steps=3, inner_batch_size=5, freeze=freeze)
    reptile = Reptile(config, model=model, objective=Classification())
    state = reptile.init(3)
    whole = reptile.meta_grad(state, batch, step=0).grads["head.weight"]
    expected = torch.zeros_like(whole)
    for task in range(TASKS):
        features = (
            batch.support_x[task].flatten(1) @ state.params["layer1.weight"].T + state.params["layer1.bias"]
        ).relu()
        weight, bias = (state.params[f"head.{k}"].clone().requires_grad_() for k in ("weight", "bias"))
        positions = [int(i) for number in range(2) for i in order(KEYS[task], WAYS * 4, number)]
        for step in range(3):
            which = positions[step * 5 : (step + 1) * 5]
            loss = F.cross_entropy(features[which] @ weight.T + bias, batch.support_y[task, which])
            grads = torch.autograd.grad(loss, [weight, bias])
            weight, bias = ((v - 0.1 * g).detach().requires_grad_() for v, g in zip((weight, bias), grads, strict=True))
        expected += state.params["head.weight"] - weight.detach()
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)


def test_memory_does_not_grow_with_the_steps() -> None:
    batch = TaskBatch(*images(4), *images(2), KEYS)
    model = Conv4Config(name="conv4", hidden=4).build(input_shape=(1, 16, 16), num_outputs=WAYS, dtype=torch.float64)

    def peak(steps: int) -> int:
        config = ReptileConfig(name="reptile", inner_lr=0.1, adaptation_steps=steps, inner_batch_size=5)
        reptile = Reptile(config, model=model, objective=Classification())
        state = reptile.init(0)
        return peak_bytes(lambda: reptile.meta_grad(state, batch, step=0), torch.device("cpu"))

    assert peak(9) <= 1.01 * peak(3)


def test_a_carried_state_is_that_of_one_adam_through_all_of_training() -> None:
    """Against torch's Adam, kept from task to task (algorithm 1); at test it goes on from there."""
    rate, tasks = 0.7, centres(3, 2)
    reptile = Reptile(
        ReptileConfig(name="reptile", inner_lr=RATE, adaptation_steps=2, inner_optimizer="adam", inner_state="carried"),
        model=Point(),  # type: ignore[arg-type]
        objective=Quadratic(),
    )
    state = reptile.init(0)
    theta = state.params["theta"].clone()
    moving = theta.clone().requires_grad_()
    adam = torch.optim.Adam([moving], lr=RATE, betas=(0.0, 0.999))

    def train_on(task: Tensor) -> None:
        with torch.no_grad():
            moving.copy_(theta)
        for _ in range(2):
            adam.zero_grad()
            (0.5 * (moving - task).square().sum(1).mean()).backward()
            adam.step()

    for task in tasks:
        train_on(task)
        theta = theta + rate * (moving.detach() - theta)
        gradient = reptile.meta_grad(state, quadratics(task.unsqueeze(0)), step=0)
        state = MetaState(
            {"theta": state.params["theta"] - rate * gradient.grads["theta"]},
            reptile.update_buffers(state.buffers, gradient.statistics),
        )
        torch.testing.assert_close(state.params["theta"], theta, rtol=1e-6, atol=1e-7)
    (*_, end) = reptile.adaptation_path(state, tasks[:1], tasks[:1], steps=2, inductive=False)
    train_on(tasks[0])
    torch.testing.assert_close(end.params["theta"][0], moving.detach(), rtol=1e-6, atol=1e-7)
    (*_, other) = reptile.adaptation_path(MetaState(state.params, {}), tasks[:1], tasks[:1], steps=2, inductive=False)
    assert (end.params["theta"] - other.params["theta"]).abs().max() > 0.01


def test_the_state_that_is_carried_is_there_from_the_start() -> None:
    """A program that is compiled at the first step knows then what it has to ask for."""
    reptile = point(inner_optimizer="adam", inner_state="carried")
    state = reptile.init(0)
    gradient = reptile.meta_grad(state, quadratics(centres(2)), step=0)
    assert {k: v.shape for k, v in gradient.statistics.items()} == {k: v.shape for k, v in state.buffers.items()}
    assert state.buffers.keys() == {"reptile/adam.v/theta", "reptile/adam.t/"}, "β1 = 0: no first moment"


def test_the_next_tasks_begin_with_the_mean_of_the_states_that_tasks_end_with() -> None:
    settings = {"inner_momentum": 0.5, "inner_state": "carried"}
    reptile, c = point(**settings), centres(2)
    state = reptile.init(0)
    both = reptile.meta_grad(state, quadratics(c), step=0)
    each = [reptile.meta_grad(state, quadratics(c[t : t + 1]), step=0).statistics for t in range(2)]
    assert both.statistics.keys() == {"reptile/momentum/theta"}
    for name, value in both.statistics.items():
        torch.testing.assert_close(value, each[0][name] + each[1][name])
    buffers = reptile.update_buffers({k: v + 1 for k, v in each[0].items()}, each[1])
    assert buffers == each[1], "the last ones', not an average over all"
    mean = reptile.update_buffers(state.buffers, {k: v / 2 for k, v in both.statistics.items()})
    step = 0.5 * mean["reptile/momentum/theta"] + state.params["theta"] - c[0, 0]
    torch.testing.assert_close(
        reptile.meta_grad(MetaState(state.params, mean), quadratics(c[:1]), step=1).grads["theta"], RATE * step
    )


def test_a_state_that_there_is_none_of_is_not_carried() -> None:
    with pytest.raises(ValueError, match="inner_state: carried is for inner_optimizer: adam"):
        ReptileConfig(name="reptile", inner_lr=0.1, inner_state="carried")
