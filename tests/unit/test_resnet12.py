"""ResNet-12 against a plain nn.Module, one task at a time, in float64; DropBlock's masks; images of every size."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.models.conv4 import Conv4Config
from pipeline.models.resnet12 import ResNet12, ResNet12Config, drop_block_mask
from pipeline.tasks.objectives import Classification
from pipeline.types import Params, TaskBatch

TASKS, EXAMPLES, CLASSES = 3, 6, 3
WIDTHS = (2, 3, 4, 5)
pytestmark = pytest.mark.usefixtures("one_thread")


def build(channels: int = 1, size: int = 20, dtype: torch.dtype = torch.float64, **keys: object) -> ResNet12:
    config = ResNet12Config(name="resnet12", **{"widths": WIDTHS, **keys})
    return config.build(input_shape=(channels, size, size), num_outputs=CLASSES, dtype=dtype)


def inputs(channels: int = 1, size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(TASKS, EXAMPLES, channels, size, size, generator=generator, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(inputs if i == 1 else width, width, 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
        self.shortcut = nn.ModuleDict({"conv": nn.Conv2d(inputs, width, 1, bias=False), "norm": nn.BatchNorm2d(width)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.norm2(self.conv2(y)), 0.1)
        y = self.norm3(self.conv3(y)) + self.shortcut["norm"](self.shortcut["conv"](x))
        return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


class Reference(nn.Module):
    """One task's, in training mode: normalized by the batch's statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for i, (before, width) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False), start=1):
            self.add_module(f"block{i}", Block(before, width))
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3, 4):
            x = self.get_submodule(f"block{i}")(x)
        return self.head(x.mean((2, 3)))


def of_tasks(params: Params) -> Params:
    return {k: torch.stack([v * (1 + 0.1 * t) + 0.01 * t for t in range(TASKS)]) for k, v in params.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_a_plain_module_for_each_task(channels: int) -> None:
    model, x = build(channels), inputs(channels)
    params = {k: v.requires_grad_() for k, v in of_tasks(model.init(0)).items()}
    outputs, nothing = model.apply(params, x)
    assert nothing == {}
    features, _ = model.features(params, x)
    assert features.shape == (TASKS, EXAMPLES, WIDTHS[-1])
    grads = torch.autograd.grad(outputs.square().sum(), list(params.values()))
    for task in range(TASKS):
        reference = Reference(channels).double().train()
        assert set(model.parameter_names) == {name for name, _ in reference.named_parameters()}
        reference.load_state_dict({k: v[task].detach() for k, v in params.items()}, strict=False)
        expected = reference(x[task])
        torch.testing.assert_close(outputs[task], expected, rtol=1e-9, atol=1e-9)
        expected.square().sum().backward()
        for name, got in zip(params, grads, strict=True):
            want = reference.get_parameter(name).grad
            torch.testing.assert_close(got[task], want, rtol=1e-7, atol=1e-7, msg=name)


def test_statistics_go_in_and_come_out() -> None:
    model, x = build(), inputs()
    params = of_tasks(model.init(0))
    outputs, observed = model.apply(params, x, observe=True)
    assert {name.rpartition(".")[0] for name in observed} == {
        f"block{b}.{n}" for b in (1, 2, 3, 4) for n in ("norm1", "norm2", "norm3", "shortcut.norm")
    }
    given, _ = model.apply(params, x, statistics=observed)
    torch.testing.assert_close(given, outputs, rtol=1e-10, atol=1e-10)
    one, _ = model.apply(params, x[:, :1], statistics=observed)
    torch.testing.assert_close(one, outputs[:, :1], rtol=1e-10, atol=1e-10)


def test_the_default_is_the_size_of_the_papers() -> None:
    model = build(3, 84, torch.float32, widths=(64, 160, 320, 640))
    params = sum(v.numel() for k, v in model.init(0).items() if not k.startswith("head"))
    assert params == sum(p.numel() for p in _paper_sized().parameters())
    assert round(params / 1e6, 1) == 12.4


def _paper_sized() -> nn.Module:
    with torch.device("meta"):
        widths = (3, 64, 160, 320, 640)
        return nn.Sequential(*(Block(before, width) for before, width in itertools.pairwise(widths)))


@pytest.mark.parametrize("block_size", [1, 3, 5])
def test_masks_drop_squares_at_the_rate_that_was_asked_for(block_size: int) -> None:
    keys = torch.tensor([3, 4])
    kept = drop_block_mask(keys, (40, 8, 15, 15), 0.1, block_size)
    assert kept.shape == (2, 40, 8, 15, 15)
    rate = 1 - kept.double().mean(dim=(1, 2, 3, 4))
    # squares overlap, so a little less than asked for; without overlap it is exactly 0.1 in the mean
    assert ((rate > 0.08) & (rate < 0.105)).all(), rate
    dropped = (~kept).float().flatten(0, 2).unsqueeze(1)
    # opening by a square leaves a union of such squares as it is
    eroded = -F.max_pool2d(-dropped, block_size, stride=1)
    opened = F.max_pool2d(F.pad(eroded, [block_size - 1] * 4), block_size, stride=1)
    assert torch.equal(opened, dropped)


def test_masks_are_a_function_of_each_tasks_key() -> None:
    shape = (4, 3, 6, 6)
    both = drop_block_mask(torch.tensor([5, 6]), shape, 0.3, 2)
    assert torch.equal(both[1:], drop_block_mask(torch.tensor([6]), shape, 0.3, 2))
    assert not torch.equal(both[0], both[1])


def test_dropping_is_for_passes_with_keys_in_the_last_two_blocks() -> None:
    model = build(size=32, drop_rate=0.3, drop_block_size=2)
    assert model.stochastic
    assert not build().stochastic
    x, params = inputs(size=32), of_tasks(model.init(0))
    keys = torch.tensor([7, 8, 9])
    before = torch.get_rng_state()
    dropped, observed = model.apply(params, x, keys=keys, observe=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(dropped, model.apply(params, x, keys=keys, observe=True)[0])
    plain, of_plain = model.apply(params, x, observe=True)
    for name, value in of_plain.items():
        same = torch.equal(value, observed[name])
        assert same == (not name.startswith("block4")), name  # the first mask is after block 3
    assert not torch.allclose(dropped, plain)
    alone = model.apply({k: v[1:2] for k, v in params.items()}, x[1:2], keys=keys[1:2])[0]
    torch.testing.assert_close(alone[0], dropped[1], rtol=1e-10, atol=1e-10)


def test_what_is_kept_is_scaled_up() -> None:
    """A constant activation keeps its mean, task by task."""
    model = build(drop_rate=0.2, drop_block_size=2)
    x = torch.ones(5, 2 * 4, 6, 6, dtype=torch.float64)  # two tasks of four channels
    dropped = model._drop(x, torch.tensor([1, 2]))
    assert 0 < float((dropped == 0).double().mean()) < 0.4
    torch.testing.assert_close(dropped.unflatten(1, (2, 4)).mean(dim=(0, 2, 3, 4)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 224])
@pytest.mark.parametrize("name", ["conv4-max_pool", "conv4-stride", "resnet12"])
def test_images_of_28_to_224_pixels(name: str, size: int, channels: int) -> None:
    shape = {"input_shape": (channels, size, size), "num_outputs": CLASSES, "dtype": torch.float32}
    if name == "resnet12":
        model = ResNet12Config(name="resnet12", widths=(2, 2, 3, 4), drop_rate=0.1).build(**shape)
    else:
        model = Conv4Config(name="conv4", hidden=2, downsample=name.split("-")[1]).build(**shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, CLASSES, channels, size, size, generator=generator)
    y = torch.arange(CLASSES).expand(2, -1)
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.01), model=model, objective=Classification())
    gradient = maml.meta_grad(maml.init(0), TaskBatch(x, y, x.flip(0), y, torch.tensor([1, 2])), step=0)
    assert all(bool(g.isfinite().all()) for g in gradient.grads.values())
    assert float(gradient.grads["block1.conv1.weight" if name == "resnet12" else "block1.conv.weight"].abs().max()) > 0


def test_refuses_what_it_cannot_take() -> None:
    with pytest.raises(ConfigError, match="15×15 is too small"):
        build(size=15)
    with pytest.raises(ConfigError, match="takes images"):
        ResNet12Config(name="resnet12").build(input_shape=(7,), num_outputs=5, dtype=torch.float32)
    with pytest.raises(ConfigError, match="no native kernels"):
        ResNet12Config(name="resnet12").build(
            input_shape=(1, 28, 28), num_outputs=5, dtype=torch.float32, kernel="native"
        )
