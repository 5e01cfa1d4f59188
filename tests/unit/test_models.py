"""Task-batched models: each task as if alone, and any nn.Module by loop and by vmap."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.models.module import ModuleConfig, ModuleModel
from pipeline.tasks.objectives import Classification
from pipeline.types import TaskBatch, TaskModel

TASKS, EXAMPLES, CLASSES = 3, 6, 3


def conv_net(norm: str = "batch") -> nn.Module:
    layers = {"batch": nn.BatchNorm2d(4), "group": nn.GroupNorm(2, 4), "none": nn.Identity()}
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), layers[norm], nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, CLASSES)
    )


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def wrong_output() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES + 1))


def inputs(size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(TASKS, EXAMPLES, 1, size, size, generator=generator, dtype=torch.float64)


def models() -> list:
    shape = {"input_shape": (1, 16, 16), "num_outputs": CLASSES, "dtype": torch.float64}
    return [
        pytest.param(Conv4Config(name="conv4", hidden=4, downsample="stride").build(**shape), id="conv4-stride"),
        pytest.param(Conv4Config(name="conv4", hidden=4).build(**shape), id="conv4-max_pool"),
        pytest.param(Conv4Config(name="conv4", hidden=4).build(kernel="pure", **shape), id="conv4-pure"),
        pytest.param(MLPConfig(name="mlp", hidden=[5, 4]).build(**shape), id="mlp"),
        pytest.param(MLPConfig(name="mlp", hidden=[]).build(**shape), id="mlp-head alone"),
        pytest.param(MLPConfig(name="mlp", hidden=[5], normalization="batch").build(**shape), id="mlp-batch"),
    ]


@pytest.mark.parametrize("model", models())
def test_tasks_do_not_see_each_other(model: TaskModel) -> None:
    x = inputs(16)
    params = {k: torch.stack([v * (1 + 0.1 * t) for t in range(TASKS)]) for k, v in model.init(0).items()}
    together, observed = model.apply(params, x, observe=True)
    assert together.shape == (TASKS, EXAMPLES, CLASSES)
    for task in range(TASKS):
        alone, own = model.apply({k: v[task : task + 1] for k, v in params.items()}, x[task : task + 1], observe=True)
        torch.testing.assert_close(together[task], alone[0], rtol=1e-12, atol=1e-12)
        for name, value in own.items():
            torch.testing.assert_close(observed[name][task], value[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", models())
def test_own_statistics_given_back_change_nothing(model: TaskModel) -> None:
    x = inputs(16)
    params = {k: v.expand(TASKS, *v.shape) for k, v in model.init(0).items()}
    outputs, observed = model.apply(params, x, observe=True)
    plain, nothing = model.apply(params, x)
    given, _ = model.apply(params, x, statistics=observed)
    assert nothing == {}
    torch.testing.assert_close(plain, outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(given, outputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", models())
def test_init_depends_on_its_seed_only(model: TaskModel) -> None:
    before = torch.random.get_rng_state()
    first, again, other = model.init(1), model.init(1), model.init(2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("net", ["batch", "group", "none", "linear"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
def test_loop_and_vmap_give_the_same_meta_gradient(net: str, first_order: bool, normalization: str) -> None:
    """With every derivative outside vmap; normalization affines adapt."""
    make = linear_net if net == "linear" else lambda: conv_net(net)
    y = torch.arange(CLASSES).repeat_interleave(EXAMPLES // CLASSES).expand(TASKS, -1)
    batch = TaskBatch(inputs(), y, inputs().flip(0), y)
    config = MAMLConfig(
        name="maml", inner_lr=0.1, adaptation_steps=2, first_order=first_order, normalization=normalization
    )
    grads = []
    for batching in ("loop", "vmap"):
        model = ModuleModel(make, dtype=torch.float64, batching=batching)  # type: ignore[arg-type]
        maml = MAML(config, model=model, objective=Classification())
        grads.append(maml.meta_grad(maml.init(0), batch, step=0).grads)
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-12)


def test_a_module_agrees_with_the_native_network() -> None:
    """MLP as an nn.Module with the same numbers: the same outputs and the same meta-gradient."""
    native = MLPConfig(name="mlp", hidden=[8], normalization="batch").build(
        input_shape=(1, 8, 8), num_outputs=CLASSES, dtype=torch.float64
    )
    names = ["1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"]

    def make() -> nn.Module:
        layers = [nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)]
        return nn.Sequential(nn.Flatten(), *layers)

    wrapped = ModuleModel(make, dtype=torch.float64)
    params = native.init(4)
    renamed = dict(zip(names, params.values(), strict=True))
    expand = lambda p: {k: v.expand(TASKS, *v.shape) for k, v in p.items()}  # noqa: E731
    torch.testing.assert_close(native.apply(expand(params), inputs())[0], wrapped.apply(expand(renamed), inputs())[0])


def test_a_module_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returns \[2, 4\]"):
        ModuleConfig(name="module", factory=f"{__name__}:wrong_output").build(
            input_shape=(1, 8, 8), num_outputs=CLASSES, dtype=torch.float32
        )
    with pytest.raises(ConfigError, match="cannot import"):
        ModuleConfig(name="module", factory="no_such_package.nets:make").build(
            input_shape=(1, 8, 8), num_outputs=CLASSES, dtype=torch.float32
        )
    with pytest.raises(ConfigError, match="refused them"):
        ModuleConfig(name="module", factory=f"{__name__}:linear_net", arguments={"depth": 3}).build(
            input_shape=(1, 8, 8), num_outputs=CLASSES, dtype=torch.float32
        )


def test_conv4_refuses_what_it_cannot_take() -> None:
    with pytest.raises(ConfigError, match="too small"):
        Conv4Config(name="conv4").build(input_shape=(1, 12, 12), num_outputs=5, dtype=torch.float32)
    with pytest.raises(ConfigError, match="takes images"):
        Conv4Config(name="conv4").build(input_shape=(7,), num_outputs=5, dtype=torch.float32)
