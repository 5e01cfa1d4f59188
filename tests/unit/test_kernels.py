"""Conv4's kernels against stock PyTorch ops in float64, their choice, and how the native ones are built."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import kernels
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.experiment import TrainingConfig
from pipeline.kernels import closed, native
from pipeline.models.conv4 import Conv4, Conv4Config
from pipeline.tasks.objectives import Classification
from pipeline.types import TaskBatch

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KERNELS = ("closed", "native")
pytestmark = pytest.mark.usefixtures("one_thread")


def need(kernel: str) -> ModuleType:
    """The room's module; skips where the native one cannot be built."""
    if kernel == "native" and native.why_not():
        pytest.skip(f"no native kernels here: {native.why_not()}")
    return {"closed": closed, "native": native}[kernel]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Of norms; where it should be near zero, as a gradient can be, the difference itself."""
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm().clamp_min(1.0))


def first_and_second_order(function: Any, *inputs: Tensor) -> list[Tensor]:
    """Outputs, gradients of a random functional of them, and gradients of a random functional of those."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    gy = numbers(*y.shape, seed=1).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, gy, create_graph=True)
    directions = [numbers(*g.shape, seed=2 + i).to(g.dtype) for i, g in enumerate(first)]
    second = torch.autograd.grad(first, [*leaves, gy], directions, materialize_grads=True)
    return [y, *first, *second]


def assert_agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-10, number


def stock_norm(x: Tensor, gain: Tensor, offset: Tensor, pool: int) -> Tensor:
    x = F.relu(F.batch_norm(x, None, None, gain, offset, training=True, eps=closed.EPSILON))
    return F.max_pool2d(x, pool) if pool > 1 else x


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 5),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    blocks=st.integers(1, 9),
    pool=st.sampled_from([1, 2]),
)
def test_normalization_to_the_second_order(
    kernel: str, images: int, height: int, width: int, blocks: int, pool: int
) -> None:
    """Every size, odd ones too, and numbers of channels that are several groups of blocks and a rest."""
    ops, channels = need(kernel), 16 * blocks
    x = numbers(images, channels, height, width) + 3  # a mean that is not small
    gain, offset = numbers(channels, seed=3), numbers(channels, seed=4)  # gains of both signs
    ours = first_and_second_order(lambda *a: ops.norm_relu_pool(*a, pool=pool), x, gain, offset)
    assert_agree(ours, first_and_second_order(lambda *a: stock_norm(*a, pool), x, gain, offset))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pool", [1, 2])
def test_normalization_by_finite_differences(kernel: str, pool: int) -> None:
    """Independent of PyTorch's own formulas."""
    ops = need(kernel)
    x, gain, offset = (t.requires_grad_() for t in (numbers(1, 16, 2, 3), numbers(16, seed=1), numbers(16, seed=2)))
    function = lambda *a: ops.norm_relu_pool(*a, pool=pool)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, gain, offset))
    assert torch.autograd.gradgradcheck(function, (x, gain, offset))


@settings(max_examples=20, deadline=None)
@given(
    tasks=st.integers(1, 3),
    channels=st.integers(1, 4),
    hidden=st.integers(1, 5),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    stride=st.sampled_from([1, 2]),
)
def test_convolution_to_the_second_order(
    tasks: int, channels: int, hidden: int, height: int, width: int, stride: int
) -> None:
    x, weight = numbers(2, tasks * channels, height, width), numbers(tasks * hidden, channels, 3, 3, seed=1)
    ours = first_and_second_order(lambda x, w: closed.convolution(x, w, stride=stride, tasks=tasks), x, weight)
    stock = first_and_second_order(lambda x, w: F.conv2d(x, w, stride=stride, padding=1, groups=tasks), x, weight)
    assert_agree(ours, stock)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    tasks=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    hidden=st.sampled_from([16, 48, 64, 80]),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    pool=st.sampled_from([1, 2]),
)
def test_first_layer_to_the_second_order(
    kernel: str, tasks: int, channels: int, hidden: int, height: int, width: int, pool: int
) -> None:
    """Images with empty regions, as drawings have: windows of equal values have one winner, the same as in PyTorch."""
    ops, stride = need(kernel), 3 - pool
    images = numbers(tasks, 3, channels, height, width).clamp_min(0.5) - 0.5
    weight = numbers(tasks, hidden, channels, 3, 3, seed=1)
    gain, offset = numbers(tasks, hidden, seed=2), numbers(tasks, hidden, seed=3)
    prepared = closed.prepare(images, stride=stride)

    def ours(*a: Tensor) -> Tensor:
        return ops.first_layer(prepared, *a, stride=stride, pool=pool, dtype=torch.float64)

    def stock(weight: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        x = images.transpose(0, 1).flatten(1, 2)
        x = F.conv2d(x, weight.flatten(0, 1), stride=stride, padding=1, groups=tasks)
        return stock_norm(x, gain.flatten(), offset.flatten(), pool)

    assert_agree(
        first_and_second_order(ours, weight, gain, offset), first_and_second_order(stock, weight, gain, offset)
    )


def episodes(shape: tuple[int, ...], tasks: int = 3, dtype: torch.dtype = torch.float64) -> TaskBatch:
    def part(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat_interleave(per_class).expand(tasks, -1)
        return numbers(tasks, 3 * per_class, *shape, seed=seed).clamp_min(0.3).to(dtype), labels

    return TaskBatch(*part(2, 5), *part(4, 6))


def conv4(kernel: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **config: Any) -> Conv4:
    section = Conv4Config(name="conv4", **{"hidden": 16, **config.pop("model", {})})
    return section.build(input_shape=shape, num_outputs=3, dtype=dtype, kernel=kernel, **config)  # type: ignore[arg-type]


def meta_gradient(model: Conv4, batch: TaskBatch, **config: Any) -> Any:
    settings = MAMLConfig(**{"name": "maml", "inner_lr": 0.1, "adaptation_steps": 2, **config})
    maml = MAML(settings, model=model, objective=Classification())
    return maml.meta_grad(maml.init(0), batch, step=0)


@pytest.fixture
def two_threads(one_thread: None) -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 19, 22)], ids=str)
@pytest.mark.parametrize(
    "model",
    [
        {"downsample": "max_pool"},
        {"downsample": "stride"},
        {"downsample": "max_pool", "readout": "mean", "hidden": 80},
        {"downsample": "stride", "readout": "flatten"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_meta_gradients_agree(kernel: str, shape: tuple[int, ...], model: dict) -> None:
    need(kernel)
    batch = episodes(shape)
    ours, pure = (meta_gradient(conv4(name, shape, model=model), batch) for name in (kernel, "pure"))
    assert abs(float(ours.metrics["meta_loss"] - pure.metrics["meta_loss"])) < 1e-10
    for name, value in pure.grads.items():
        assert relative(ours.grads[name], value) < 1e-10, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "algorithm",
    [{"first_order": True}, {"normalization": "inductive"}, {"inductive_statistics": "running"}],
    ids=lambda algorithm: next(iter(algorithm)),
)
def test_variants_of_maml_agree(kernel: str, algorithm: dict) -> None:
    """Given and observed statistics too, with images that were prepared and with plain ones."""
    need(kernel)
    batch = episodes((1, 16, 16))
    ours, pure = (meta_gradient(conv4(name, (1, 16, 16)), batch, **algorithm) for name in (kernel, "pure"))
    for ours_part, pure_part in ((ours.grads, pure.grads), (ours.statistics, pure.statistics)):
        assert ours_part.keys() == pure_part.keys()
        for name, value in pure_part.items():
            assert relative(ours_part[name], value) < 1e-10, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_prepared_and_plain_images_give_the_same(kernel: str) -> None:
    need(kernel)
    model, x = conv4(kernel, (1, 16, 16)), episodes((1, 16, 16)).query_x
    params = {k: v.expand(len(x), *v.shape) for k, v in model.init(0).items()}
    for asked in ({}, {"observe": True}, {"statistics": model.apply(params, x, observe=True)[1]}):
        prepared, plain = model.apply(params, model.prepare(x), **asked), model.apply(params, x, **asked)
        torch.testing.assert_close(prepared, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_threads_agree_with_the_reference(kernel: str) -> None:
    need(kernel)
    batch = episodes((1, 16, 16))
    ours, pure = (meta_gradient(conv4(name, (1, 16, 16)), batch).grads for name in (kernel, "pure"))
    assert max(relative(ours[name], value) for name, value in pure.items()) < 1e-10


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("pool", [1, 2])
def test_native_results_do_not_depend_on_the_number_of_threads(pool: int) -> None:
    ops = need("native")
    x, gain, offset = numbers(40, 80, 6, 6).float(), numbers(80, seed=1).float(), numbers(80, seed=2).float()
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results.append(first_and_second_order(lambda *a: ops.norm_relu_pool(*a, pool=pool), x, gain, offset))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_statistics_of_a_large_mean(kernel: str) -> None:
    """With a mean of a hundred standard deviations: E[x²] − E[x]² alone would be wrong by a thousandth."""
    ops = need(kernel)
    x = (numbers(75, 16, 14, 14) + 100).float()
    ones, zeros = torch.ones(16), torch.zeros(16)
    expected = stock_norm(x.double(), ones.double(), zeros.double(), 1)
    assert relative(ops.norm_relu_pool(x, ones, zeros, pool=1).double(), expected) < 5e-5


@pytest.mark.parametrize(("precision", "cosine"), [("float32", 0.9999), ("mixed", 0.98)])
@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
@pytest.mark.parametrize("kernel", ["closed", "native"])
def test_lower_precisions_point_the_same_way(kernel: str, downsample: str, precision: str, cosine: float) -> None:
    """Against float64. Not more can be asked of single numbers: the meta-gradient jumps at ReLU and max kinks."""
    need(kernel)
    shape, model = (1, 28, 28), {"downsample": downsample, "hidden": 64}
    if kernel == "native" and precision == "mixed" and native.why_slow_in_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    single = conv4(kernel, shape, torch.float32, model=model)
    single.precision = precision  # type: ignore[assignment]  # the closed kernels' is chosen on GPUs only
    ours = meta_gradient(single, episodes(shape, dtype=torch.float32), adaptation_steps=1)
    exact = meta_gradient(conv4("pure", shape, model=model), episodes(shape), adaptation_steps=1)
    tolerance = {"float32": 1e-5, "mixed": 0.05}[precision]
    torch.testing.assert_close(ours.metrics["meta_loss"].double(), exact.metrics["meta_loss"], rtol=tolerance, atol=0)
    flat = [torch.cat([g.double().flatten() for g in grads.values()]) for grads in (ours.grads, exact.grads)]
    assert float(F.cosine_similarity(*flat, dim=0)) > cosine
    assert all(g.dtype == torch.float32 for g in ours.grads.values())


def test_bfloat16_is_for_the_query_pass_of_training_alone() -> None:
    need("native")
    if native.why_slow_in_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    x = episodes((1, 16, 16), dtype=torch.float32).query_x
    models = [conv4("native", (1, 16, 16), torch.float32, precision=p) for p in ("float32", "mixed")]
    params = {k: v.expand(len(x), *v.shape) for k, v in models[0].init(0).items()}
    exact = models[0].apply(params, x)[0]
    assert torch.equal(models[0].apply(params, x, low_precision=True)[0], exact)
    assert torch.equal(models[1].apply(params, x)[0], exact)
    assert not torch.equal(models[1].apply(params, x, low_precision=True)[0], exact)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_reaches_the_outputs(kernel: str, value: str) -> None:
    """Or training would go on with it unseen."""
    ops = need(kernel)
    x = numbers(2, 16, 4, 4)
    x[1, 3, 2, 1] = float(value)
    y = ops.norm_relu_pool(x, torch.ones(16).double(), torch.zeros(16).double(), pool=2)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    model = conv4(kernel, (1, 16, 16))
    params = {k: v.clone() for k, v in model.init(0).items()}
    params["block1.conv.weight"][0, 0, 0, 0] = float("nan")
    images = episodes((1, 16, 16), tasks=1).query_x
    assert model.apply({k: v.unsqueeze(0) for k, v in params.items()}, images)[0].isnan().all()


# the choice


def chosen(kernel: str, precision: str = "float32", **changes: Any) -> kernels.Choice:
    where = {"device": CPU, "channels": 64, "dtype": torch.float32, **changes}
    return kernels.choose(kernel, precision, **where)  # type: ignore[arg-type]


def test_auto_is_native_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)
    assert chosen("auto").kernel == "native"
    assert chosen("auto", channels=20).kernel == "closed"
    assert chosen("auto", device=torch.device("cuda")).kernel == "closed"
    assert chosen("closed") == ("closed", "float32")


def test_what_is_given_up_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "there is no C++ compiler (c++ 42)")
    for _ in range(2):
        assert chosen("auto", "mixed") == ("closed", "float32")
    said = [record.getMessage() for record in caplog.records]
    assert sum("c++ 42" in message and "native kernels" in message for message in said) == 1
    assert sum("c++ 42" in message and "precision: mixed" in message for message in said) == 1
    with pytest.raises(ConfigError, match="c\\+\\+ 42"):
        chosen("native")


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "mixed"), ((7, 5), "float32")])
def test_a_gpu_has_mixed_precision_from_ampere_on(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen("auto", "mixed", device=torch.device("cuda")) == ("closed", expected)


def test_a_cpu_without_bfloat16_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "why_slow_in_bfloat16", lambda: "this CPU does not compute in bfloat16")
    assert chosen("native", "mixed") == ("native", "float32")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": "native", "use_gpu": True}, "native is for CPUs"),
        ({"precision": "mixed", "kernel": "closed"}, "needs the native kernels"),
        ({"precision": "mixed", "kernel": "pure", "use_gpu": True}, "needs the closed kernels on a GPU"),
        ({"tf32": True}, "tf32 is for GPUs"),
        ({"precision": "mixed", "dtype": "float64"}, "dtype is float64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainingConfig(steps=1, **settings)


def test_models_without_kernels_refuse_them() -> None:
    kernels.only_stock_ops("mlp", "auto", "float32")
    with pytest.raises(ConfigError, match="no native kernels"):
        kernels.only_stock_ops("mlp", "native", "float32")
    with pytest.raises(ConfigError, match="no kernels for it"):
        kernels.only_stock_ops("mlp", "auto", "mixed")


# how the native kernels are built

ASK = "from pipeline.kernels import native; print(native.why_not() or 'ready')"


def process(folder: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, native.FOLDER_VARIABLE: str(folder), "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-c", ASK]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def answer(of: subprocess.Popen) -> str:
    return of.communicate(timeout=120)[0].strip()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    """With a compiler that notes its calls, takes its time, and hands out the library that is built already."""
    need("native")
    built = native._built()
    script = f'echo called >> {tmp_path}/calls; sleep 1; while [ "$1" != -o ]; do shift; done; cp {built} "$2"'
    fake = compiler(tmp_path, script)
    processes = [process(tmp_path / "cache", CXX=fake) for _ in range(3)]
    assert [answer(one) for one in processes] == ["ready"] * 3
    assert (tmp_path / "calls").read_text() == "called\n"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted([built.name, "lock"])


def test_without_a_compiler(tmp_path: Path) -> None:
    assert "no C++ compiler" in answer(process(tmp_path, PATH=str(tmp_path), CXX="c++"))


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """The next process tries again; nothing half-built is left."""
    fake = compiler(tmp_path, 'echo "native.cpp:1: error: no such thing" >&2; exit 1')
    assert "error: no such thing" in answer(process(tmp_path / "cache", CXX=fake))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in answer(process(tmp_path / "file" / "cache"))


def test_they_can_be_switched_off() -> None:
    assert answer(process(Path("off"))) == f"{native.FOLDER_VARIABLE} is off"
