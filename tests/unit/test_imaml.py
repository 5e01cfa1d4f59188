"""iMAML: the exact implicit gradient of quadratics, a dense Hessian in float64, memory, and where it must give up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.imaml import IMAML, LOG_LAMBDA, LONGEST, IMAMLConfig, conjugate_gradient
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification, Regression
from pipeline.training.plan import peak_bytes
from pipeline.types import MetaState, Params, Statistics, TaskBatch

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, DIMENSION, WAYS = 3, 4, 3


class Point:
    """A model whose output is its parameter."""

    stochastic = False
    parameter_names = ["theta"]  # noqa: RUF012
    head = ("head.weight", "head.bias")  # it has none

    def init(self, seed: int) -> Params:
        return {"theta": torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)}

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(self, params: Params, x: Tensor, **_: object) -> tuple[Tensor, Statistics]:
        return params["theta"].unsqueeze(1), {}


class Quadratic(Regression):
    """½(θ − c)ᵀA(θ − c) per task; targets [T, 1 + D, D] hold c and A."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        away = outputs[:, 0] - targets[:, 0]
        return 0.5 * torch.einsum("ti,tij,tj->t", away, targets[:, 1:], away)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def quadratics(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(TASKS, DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    centre = torch.randn(TASKS, 1, DIMENSION, generator=generator, dtype=torch.float64)
    return torch.cat(
        [centre, root @ root.mT / (3 * DIMENSION) + 0.5 * torch.eye(DIMENSION, dtype=torch.float64)], dim=1
    )


def point(**settings: Any) -> tuple[IMAML, MetaState, TaskBatch]:
    rate = 1 / (settings.get("regularization", 2.0) + 3)
    settings = {"inner_lr": rate, "adaptation_steps": 120, "cg_steps": DIMENSION, **settings}
    imaml = IMAML(IMAMLConfig(name="imaml", **settings), model=Point(), objective=Quadratic())  # type: ignore[arg-type]
    support, query = quadratics(1), quadratics(2)
    return imaml, imaml.init(0), TaskBatch(support[:, :1], support, query[:, :1], query)


@pytest.mark.parametrize(
    ("regularization", "settings"),
    [
        (0.1, {}),
        (1.0, {}),
        (8.0, {}),
        (1.0, {"inner_momentum": 0.3}),
        (1.0, {"inner_weight_decay": 0.3}),
        (1.0, {"inner_gradient_clip": 4.0}),
    ],
)
def test_exact_implicit_gradient_of_the_quadratic(regularization: float, settings: dict[str, float]) -> None:
    """φ* = (A + (λ + w)I)⁻¹(Ac + λθ), differentiated by θ and log λ."""
    imaml, state, batch = point(regularization=regularization, learn_regularization=True, **settings)
    gradient = imaml.meta_grad(state, batch, step=0)
    theta = state.params["theta"].clone().requires_grad_()
    log_lambda = torch.tensor(regularization, dtype=torch.float64).log().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        c, a = batch.support_y[task, 0], batch.support_y[task, 1:]
        d, b = batch.query_y[task, 0], batch.query_y[task, 1:]
        eye = torch.eye(DIMENSION, dtype=torch.float64)
        matrix = a + (log_lambda.exp() + settings.get("inner_weight_decay", 0.0)) * eye
        end = torch.linalg.solve(matrix, a @ c + log_lambda.exp() * theta)
        total = total + 0.5 * (end - d) @ b @ (end - d)
    by_theta, by_log_lambda = torch.autograd.grad(total, [theta, log_lambda])
    torch.testing.assert_close(gradient.metrics["meta_loss"], total.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient.grads["theta"], by_theta, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient.grads[LOG_LAMBDA], by_log_lambda, rtol=1e-7, atol=1e-9)
    assert float(gradient.metrics["cg_residual"]) < 1e-8
    assert imaml.describe(state) == {"lambda": pytest.approx(regularization)}


def test_a_fixed_lambda_is_no_meta_parameter() -> None:
    fixed, state, batch = point(regularization=2.0)
    assert list(state.params) == ["theta"]
    assert fixed.describe(state) == {}
    learned, learned_state, _ = point(regularization=2.0, learn_regularization=True)
    ours, theirs = fixed.meta_grad(state, batch, step=0), learned.meta_grad(learned_state, batch, step=0)
    assert torch.equal(ours.grads["theta"], theirs.grads["theta"])


def test_damping_and_the_residual_of_few_steps() -> None:
    """((1 + δ)I + A/λ)⁻¹∇L_query; the residual is relative, and a mean over tasks of what the sum says."""
    regularization, damping = 0.5, 1.5
    imaml, state, batch = point(regularization=regularization, cg_damping=damping)
    got = imaml.meta_grad(state, batch, step=0).grads["theta"]
    expected = torch.zeros(DIMENSION, dtype=torch.float64)
    residual = 0.0
    for task in range(TASKS):
        c, a = batch.support_y[task, 0], batch.support_y[task, 1:]
        d, b = batch.query_y[task, 0], batch.query_y[task, 1:]
        eye = torch.eye(DIMENSION, dtype=torch.float64)
        end = torch.linalg.solve(a + regularization * eye, a @ c + regularization * state.params["theta"])
        g = b @ (end - d)
        expected += torch.linalg.solve((1 + damping) * eye + a / regularization, g)
        image = g + a @ g / regularization  # one step without damping: x = (g·g / g·Ag) g
        residual += float((g - (g @ g) / (g @ image) * image).norm() / g.norm())
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    one_step, _, _ = point(regularization=regularization, cg_steps=1)
    metrics = one_step.meta_grad(state, batch, step=0).metrics
    assert float(metrics["cg_residual"]) == pytest.approx(residual, rel=1e-7)


def images(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(TASKS, WAYS * n, 1, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(WAYS).repeat_interleave(n).expand(TASKS, -1)


def network(params: Params, x: Tensor, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple]:
    """One hidden layer with batch normalization, written independently."""
    x = x.flatten(1) @ params["layer1.weight"].T + params["layer1.bias"]
    own = x.mean(0), x.var(0, unbiased=False)
    mean, var = statistics or own
    x = (x - mean) / (var + 1e-5).sqrt() * params["norm1.weight"] + params["norm1.bias"]
    return x.relu() @ params["head.weight"].T + params["head.bias"], own


HEAD = ("head.weight", "head.bias")
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam, inductive": {"inner_optimizer": "adam", "inner_lr": 0.01, "normalization": "inductive"},
    "frozen layer, decay": {"freeze": ["layer1.*"], "inner_weight_decay": 0.2, "normalization": "inductive"},
    "head only": {"freeze": ["layer1.*", "norm1.*"]},
}


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_agrees_with_a_dense_hessian(case: str) -> None:
    """At the end of a few steps, which is not the solution: the same formula, task by task, with its matrix made."""
    settings, regularization, steps = CASES[case], 3.0, 3
    batch = TaskBatch(*images(3, 4), *images(2, 4))
    model = MLPConfig(name="mlp", hidden=[3], normalization="batch").build(
        input_shape=(1, 4, 4), num_outputs=WAYS, dtype=torch.float64
    )
    config = IMAMLConfig(
        name="imaml",
        **{
            "inner_lr": 0.1,
            "adaptation_steps": steps,
            "regularization": regularization,
            "learn_regularization": True,
            "cg_steps": 90,
            **settings,
        },
    )
    imaml = IMAML(config, model=model, objective=Classification())
    state = imaml.init(3)
    gradient = imaml.meta_grad(state, batch, step=0)
    theta = {k: v for k, v in state.params.items() if k != LOG_LAMBDA}
    frozen = [k for k in theta if any(k.startswith(p.rstrip("*")) for p in config.freeze)]
    adapts = [k for k in theta if k not in frozen]
    expected = {k: torch.zeros_like(v) for k, v in state.params.items()}
    for task in range(TASKS):
        sx, sy, qx, qy = (part[task] for part in batch[:4])
        phi = _inner_loop(config, theta, adapts, sx, sy)
        names = adapts + frozen
        sizes = [phi[k].numel() for k in names]
        flat = torch.cat([phi[k].flatten() for k in names])

        def named(flat: Tensor, names: list[str] = names, sizes: list[int] = sizes) -> Params:
            return {k: v.view(theta[k].shape) for k, v in zip(names, flat.split(sizes), strict=True)}

        def support_loss(flat: Tensor, sx: Tensor = sx, sy: Tensor = sy, named: Any = named) -> Tensor:
            return F.cross_entropy(network(named(flat), sx, None)[0], sy)

        hessian = torch.autograd.functional.hessian(support_loss, flat)
        leaf = flat.clone().requires_grad_()
        statistics = network(named(leaf), sx, None)[1] if config.normalization == "inductive" else None
        (g,) = torch.autograd.grad(F.cross_entropy(network(named(leaf), qx, statistics)[0], qy), leaf)
        count = sum(phi[k].numel() for k in adapts)
        shift = (regularization + config.inner_weight_decay) * torch.eye(count, dtype=torch.float64)
        assert float(torch.linalg.eigvalsh(hessian[:count, :count] + shift).min()) > 0
        v = torch.linalg.solve(hessian[:count, :count] + shift, g[:count])
        total = torch.cat([regularization * v, g[count:] - hessian[count:, :count] @ v])
        for name, value in named(total).items():
            expected[name] += value
        moved = flat[:count] - torch.cat([theta[k].flatten() for k in adapts])
        expected[LOG_LAMBDA] -= regularization * (v @ moved)
    for name, value in expected.items():
        torch.testing.assert_close(gradient.grads[name], value, rtol=1e-8, atol=1e-11, msg=name)
    assert all(float(expected[name].abs().max()) > 1e-6 for name in [LOG_LAMBDA, *HEAD])


def _inner_loop(config: IMAMLConfig, theta: Params, adapts: list[str], x: Tensor, y: Tensor) -> Params:
    phi = {k: v.clone() for k, v in theta.items()}
    first, second = ({k: torch.zeros_like(theta[k]) for k in adapts} for _ in range(2))
    for step in range(1, config.adaptation_steps + 1):
        leaves = {k: phi[k].clone().requires_grad_() for k in adapts}
        loss = F.cross_entropy(network({**phi, **leaves}, x, None)[0], y)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for name, g in zip(adapts, grads, strict=True):
            g = g + config.regularization * (phi[name] - theta[name]) + config.inner_weight_decay * phi[name]
            if config.inner_optimizer == "adam":
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                g = first[name] / (1 - 0.9**step) / (second[name] / (1 - 0.999**step) + 1e-16).sqrt()
            phi[name] = phi[name] - config.inner_lr * g
    return phi


def test_memory_grows_with_neither_kind_of_steps() -> None:
    batch = TaskBatch(*images(8, 4), *images(2, 4))
    model = MLPConfig(name="mlp", hidden=[8, 8], normalization="batch").build(
        input_shape=(1, 4, 4), num_outputs=WAYS, dtype=torch.float64
    )

    def peak(learner: type[IMAML] | type[MAML], config: Any) -> int:
        algorithm = learner(config, model=model, objective=Classification())
        state = algorithm.init(0)
        return peak_bytes(lambda: algorithm.meta_grad(state, batch, step=0), torch.device("cpu"))

    def imaml(steps: int, cg_steps: int = 3) -> int:
        return peak(IMAML, IMAMLConfig(name="imaml", inner_lr=0.1, adaptation_steps=steps, cg_steps=cg_steps))

    assert imaml(12) <= 1.01 * imaml(2)
    assert imaml(2, cg_steps=12) <= 1.01 * imaml(2)
    of_maml = [peak(MAML, MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=steps)) for steps in (2, 12)]
    assert of_maml[1] > 2 * of_maml[0], "or the test sees nothing"


def test_conjugate_gradient_keeps_each_task_to_itself() -> None:
    """Positive definite; b = 0; a first direction that curves down; a later one that does."""
    definite, down = torch.diag(torch.tensor([1.0, 3.0, 7.0])), torch.diag(torch.tensor([-1.0, -2.0, 1.0]))
    later = torch.diag(torch.tensor([1.0, 1.0, -0.2]))
    matrices = torch.stack([definite, definite, down, later]).double()
    b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.5]], dtype=torch.float64)
    x, residual = conjugate_gradient(lambda p: torch.einsum("tij,tj->ti", matrices, p), b, steps=6)
    torch.testing.assert_close(x[0], b[0] / definite.diagonal().double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(x[1], b[1])
    assert torch.equal(x[2], b[2]), "the gradient itself, as first-order MAML has it"
    first = (b[3] @ b[3]) / (b[3] @ matrices[3] @ b[3]) * b[3]
    torch.testing.assert_close(x[3], first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(residual, b - torch.einsum("tij,tj->ti", matrices, x), rtol=1e-10, atol=1e-12)
    nearly = torch.tensor([[[-0.99, 0.0], [0.0, 1.0]]], dtype=torch.float64) + torch.eye(2, dtype=torch.float64)
    x_long, left = conjugate_gradient(lambda p: torch.einsum("tij,tj->ti", nearly, p), b[:1, :2], steps=6)
    assert float(x_long.norm() / b[0, :2].norm()) == pytest.approx(LONGEST, rel=1e-12), "and not 100 times as long"
    torch.testing.assert_close(left, b[:1, :2] - torch.einsum("tij,tj->ti", nearly, x_long), rtol=1e-10, atol=1e-12)
    alone, _ = conjugate_gradient(lambda p: p @ matrices[3], b[3:], steps=6)
    torch.testing.assert_close(alone, x[3:], rtol=1e-12, atol=1e-12)


def test_lambda_at_test() -> None:
    """0 is plain gradient descent; none is the one of training, also where that is learned."""
    batch = point()[2]

    def end(learned: float | None = None, **settings: Any) -> Tensor:
        imaml, state, _ = point(inner_lr=0.2, adaptation_steps=5, learn_regularization=learned is not None, **settings)
        if learned is not None:
            state = MetaState({**state.params, LOG_LAMBDA: torch.tensor(learned, dtype=torch.float64).log()}, {})
        path = imaml.adaptation_path(state, batch.support_x, batch.support_y, steps=5, inductive=False)
        return list(path)[-1].params["theta"]

    config = MAMLConfig(name="maml", inner_lr=0.2, adaptation_steps=5)
    maml = MAML(config, model=Point(), objective=Quadratic())  # type: ignore[arg-type]
    path = maml.adaptation_path(maml.init(0), batch.support_x, batch.support_y, steps=5, inductive=False)
    plain = list(path)[-1].params["theta"]
    assert torch.equal(end(eval_regularization=0), plain)
    assert torch.equal(end(learned=4.0, eval_regularization=0), plain)
    torch.testing.assert_close(end(learned=4.0), end(regularization=4.0))
    assert not torch.allclose(end(regularization=4.0), end(regularization=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_order": True}, "first_order: true changes nothing here"),
        ({"inner_lr": 1.0, "regularization": 2.0}, r"times regularization .* is at least 2, so inner steps diverge"),
        ({"eval_regularization": 100.0}, r"times eval_regularization .* is at least 2, so inner steps diverge"),
        ({"regularization": 0.0}, "greater than 0"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMAMLConfig(name="imaml", **{"inner_lr": 0.1, **settings})
