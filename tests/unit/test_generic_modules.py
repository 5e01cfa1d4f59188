"""Any nn.Module by a loop and by vmap: the meta-gradient is that of tasks one after another, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.module import Batching, ModuleModel
from pipeline.tasks.objectives import Classification
from pipeline.training import plan
from pipeline.training.context import LocalContext
from pipeline.types import MetaState, Params, TaskBatch, TaskModel

TASKS, STEPS, RATE, CLASSES = 2, 2, 0.01, 3


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(256, CLASSES)
    )


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, CLASSES))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES))


class Rows(nn.Module):
    """The rows of an image as a sequence for `core`."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.project = nn.Linear(24, 8)
        self.core = core
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.core(self.project(x.transpose(1, 2).flatten(2)))
        return self.head((rows[0] if isinstance(rows, tuple) else rows).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention() -> nn.Module:
    return Rows(Attention())


def transformer() -> nn.Module:
    return Rows(nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.5, batch_first=True, activation="gelu"))


def lstm() -> nn.Module:
    return Rows(nn.LSTM(8, 8, batch_first=True))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, CLASSES))


def residual() -> nn.Module:
    """The beginning of torchvision's ResNet-18: with all of it, statistics of small images are those of one value."""
    net = torchvision.models.resnet18(weights=None)
    stages = (net.conv1, net.bn1, net.relu, net.layer1, net.layer2, net.avgpool)
    return nn.Sequential(nn.Upsample(scale_factor=2), *stages, nn.Flatten(), nn.Linear(128, CLASSES))


class Depends(nn.Module):
    """Control flow that depends on values, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        return y if y.sum() > 0 else 2 * y


BOTH = [batch_norm, group_norm, layer_norm, attention, transformer, dropout, residual]
CASES = [(make, batching) for make in BOTH for batching in ("loop", "vmap")] + [(lstm, "loop"), (Depends, "loop")]


def episodes(dtype: torch.dtype = torch.float64) -> TaskBatch:
    generator = torch.Generator().manual_seed(5)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(TASKS, CLASSES * per_class, 3, 8, 8, generator=generator, dtype=torch.float64)
        return x.to(dtype), torch.arange(CLASSES).repeat_interleave(per_class).expand(TASKS, -1)

    return TaskBatch(*part(1), *part(2))


def build(model: TaskModel) -> MAML:
    config = MAMLConfig(name="maml", inner_lr=RATE, adaptation_steps=STEPS)
    return MAML(config, model=model, objective=Classification())


def one_after_another(make: Callable[[], nn.Module], state: MetaState, batch: TaskBatch) -> Params:
    """The sum of the tasks' meta-gradients with the module as it is: nothing of the package, nothing batched."""
    module = make().double()
    for part in module.modules():
        # batch statistics in BatchNorm, and no dropout
        part.train(isinstance(part, nn.modules.batchnorm._BatchNorm))
    meta = {name: value.detach().requires_grad_() for name, value in state.params.items()}
    total = torch.zeros((), dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            params = meta
            for _ in range(STEPS):
                loss = F.cross_entropy(functional_call(module, params, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {k: v - RATE * g for (k, v), g in zip(params.items(), grads, strict=True)}
            total = total + F.cross_entropy(functional_call(module, params, (query_x,)), query_y)
        return dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))


@pytest.mark.parametrize(("make", "batching"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_meta_gradient(make: Callable[[], nn.Module], batching: Batching) -> None:
    model = ModuleModel(make, dtype=torch.float64, batching=batching)
    state, batch = MetaState(model.init(0), {}), episodes()
    expected = one_after_another(make, state, batch)
    found = build(model).meta_grad(state, batch, step=0).grads
    size = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-10 * size, name


@pytest.mark.parametrize("make", BOTH)
def test_vmap_is_trusted_where_it_is_right(make: Callable[[], nn.Module]) -> None:
    model = ModuleModel(make, dtype=torch.float32)
    assert plan.why_not_vmap(build, model, build(model).init(0), episodes(torch.float32)) is None


@pytest.mark.parametrize("make", [lstm, Depends])
def test_what_vmap_cannot_take_goes_through_a_loop(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = ModuleModel(make, dtype=torch.float32)
    state = build(model).init(0)

    def draw(tasks: int) -> TaskBatch:
        return TaskBatch(*(part[:tasks] for part in episodes(torch.float32)))

    chosen = plan.choose(LocalContext(), build, model, state, draw, chunk=None, memory=None)
    assert chosen.batching == model.batching == "loop"
    assert "tasks are batched by a loop: vmap cannot take this network" in caplog.text
    assert all(value.isfinite().all() for value in build(model).meta_grad(state, draw(3), step=0).grads.values())


def test_the_choice_is_one_of_the_two_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModuleModel(layer_norm, dtype=torch.float32)
    state, batch = build(model).init(0), episodes(torch.float32)
    for fastest, seconds in (("vmap", iter([2.0, 1.0] * plan.TRIALS)), ("loop", iter([1.0, 2.0] * plan.TRIALS))):
        model.batching = "auto"
        monkeypatch.setattr(plan, "_seconds", lambda work, seconds=seconds: next(seconds))
        chosen = plan.choose(LocalContext(), build, model, state, lambda _: batch, chunk=None, memory=None)
        assert chosen.batching == model.batching == fastest
        model.batching = "auto"
        assert plan.resumed(LocalContext(), chosen, model) == chosen
        assert model.batching == fastest


def test_a_wrong_meta_gradient_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Of a batching rule that loses part of a derivative, as PyTorch's do in the test below."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    class Scaled(ModuleModel):
        def twin(self, batching: Batching, *, dtype: torch.dtype | None = None) -> ModuleModel:
            return Scaled(self._make, dtype=dtype or self._dtype, batching=batching)

        def apply(self, params: Params, x: Tensor, **settings):  # type: ignore[no-untyped-def, override]
            if self.batching == "vmap":
                params = copy.copy(params)
                bias = params["3.bias"]
                params["3.bias"] = bias + 1e-3 * (bias - bias.detach())  # the same value, another derivative
            return super().apply(params, x, **settings)

    model = Scaled(net, dtype=torch.float32)
    state, batch = build(model).init(0), episodes(torch.float32)
    reason = plan.why_not_vmap(build, model, state, batch)
    assert reason is not None
    assert "gives another meta-gradient than a loop" in reason
    assert plan.choose(LocalContext(), build, model, state, lambda _: batch, chunk=2, memory=None).batching == "loop"
    assert "gives another meta-gradient" in caplog.text


def test_an_inner_gradient_inside_vmap_under_an_outer_one_outside_is_wrong() -> None:
    """Why every derivative stays outside vmap (`models/module.py`)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, y = random(TASKS, 4, 6, 5, 5), random(TASKS, 4, 8, 5, 5)
    params = (random(8, 6, 3, 3) * 0.2, random(8).abs() + 0.5, random(8))

    def loss(p: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        normalized = F.batch_norm(F.conv2d(x, p[0], padding=1), None, None, p[1], p[2], True)
        return ((normalized.tanh() - y) ** 2).mean()

    def task(p: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        for _ in range(STEPS):
            p = tuple(a - 0.5 * g for a, g in zip(p, grad(loss)(p, x, y), strict=True))
        return loss(p, x, y)

    expected = [sum(parts) for parts in zip(*(grad(task)(params, x[t], y[t]) for t in range(TASKS)), strict=True)]
    inside = [part.sum(0) for part in vmap(grad(task), in_dims=(None, 0, 0))(params, x, y)]
    outside = grad(lambda p: vmap(task, in_dims=(None, 0, 0))(p, x, y).sum())(params)

    def wrong(found: list[Tensor]) -> float:
        pairs = zip(found, expected, strict=True)
        return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)  # type: ignore[union-attr]

    assert wrong(inside) < 1e-12
    if math.isclose(wrong(outside), 0.0, abs_tol=1e-9):
        pytest.skip(f"torch {torch.__version__} does it right; derivatives may go inside vmap now")
    assert wrong(outside) > 1e-4
