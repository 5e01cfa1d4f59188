"""Any `nn.Module` as a task-batched model, through `torch.func.functional_call`: a loop over tasks, or vmap.

The module is written for one task (inputs [N, ...]). Its BatchNorm layers are replaced by ones that take their
statistics from the pass or from outside, so that a user's network gets the same transductive and inductive paths
as the package's own. With vmap every derivative stays outside it (`apply = vmap(functional_call)`); an inner
gradient inside vmap under an outer one outside it is silently wrong where normalization affines adapt.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import kernels
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision
from pipeline.types import Params, Statistics

Batching = Literal["auto", "loop", "vmap"]


class ModuleConfig(Section):
    """Your own network: `factory` is called with `arguments` and returns an nn.Module for one task."""

    name: Literal["module"]
    factory: str = Field(pattern=r"^[\w.]+:\w+$")  # "package.module:callable"
    folder: Path = Path(".")  # where the package lies, if it is not installed
    arguments: dict[str, Any] = Field(default_factory=dict)
    batching: Batching = "auto"
    # auto: measured at the start of training, where both give the same meta-gradient (`training/plan.py`); elsewhere a
    # loop, which any network can go through

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: Kernel = "auto",
        precision: Precision = "float32",
    ) -> ModuleModel:
        """Raises ConfigError: the factory cannot be imported or called, or does not fit the task or the kernels."""
        kernels.only_stock_ops(self.name, kernel, precision)
        factory = _import(self.factory, self.folder)

        def make() -> nn.Module:
            try:
                module = factory(**self.arguments)
            except TypeError as error:
                raise ConfigError(f"model.arguments: {self.factory} refused them: {error}.") from error
            if not isinstance(module, nn.Module):
                raise ConfigError(f"model.factory: {self.factory} returned {type(module).__name__}, not an nn.Module.")
            return module

        model = ModuleModel(make, dtype=dtype, batching=self.batching)
        model.check(input_shape, num_outputs, name=self.factory)
        return model

    def absolute(self) -> ModuleConfig:
        """With an absolute folder: workers run in another one."""
        return self.model_copy(update={"folder": self.folder.absolute()})

    def code_path(self) -> Path:
        """The file or package folder that holds the factory, to keep with a registered model."""
        name = self.factory.partition(":")[0].partition(".")[0]
        _import(self.factory, self.folder)
        file = Path(str(sys.modules[name].__file__))
        return file.parent if file.name == "__init__.py" else file


def _import(path: str, folder: Path) -> Any:
    module_name, _, attribute = path.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.factory: cannot import {path} ({error}). Write it as package.module:callable, with the package "
            f"installed or in model.folder ({folder})."
        ) from error


class EpisodeBatchNorm(nn.Module):
    """BatchNorm whose statistics come from the pass (given is None) or from outside; it keeps no running ones."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = original.eps
        self.weight = original.weight
        self.bias = original.bias
        self.given: tuple[Tensor, Tensor] | None = None
        self.observed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        self.observed = (mean, var)
        if self.given is not None:
            mean, var = self.given
        broadcast = (1, -1) + (1,) * (x.ndim - 2)
        normalized = (x - mean.view(broadcast)) * torch.rsqrt(var + self.eps).view(broadcast)
        if self.weight is None:
            return normalized
        return normalized * self.weight.view(broadcast) + self.bias.view(broadcast)


class ModuleModel:
    """Task-batched view of the modules that `make` returns. Parameters keep the module's own names.

    batching: how tasks are batched (see `ModuleConfig`); may be set at any time. Buffers other than BatchNorm's are
    constants; dropout is off.
    """

    cpu_task_chunk = None
    kernel, precision = "pure", "float32"

    def __init__(self, make: Any, *, dtype: torch.dtype, batching: Batching = "auto") -> None:
        self._make = make
        self._dtype = dtype
        # eval: dropout would draw from the global generator, and answers would differ from call to call
        self._module = _with_episode_norms(self._fresh(seed=0)).to(dtype).eval()
        self._norms = {n: m for n, m in self._module.named_modules() if isinstance(m, EpisodeBatchNorm)}
        self._device = torch.device("cpu")
        self.batching: Batching = batching

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # a module's constructor draws from the global generator
            torch.manual_seed(seed)
            return self._make()

    def init(self, seed: int) -> Params:
        module = self._fresh(seed).to(self._dtype)
        return {name: value.detach().clone() for name, value in module.named_parameters()}

    def check(self, input_shape: tuple[int, ...], num_outputs: int, *, name: str) -> None:
        """Raises ConfigError where the module does not map [N, *input_shape] to [N, num_outputs]."""
        x = torch.zeros(1, 2, *input_shape, dtype=self._dtype)
        params = {k: v.unsqueeze(0) for k, v in self.init(0).items()}
        try:
            with torch.no_grad():
                shape = list(self.twin("loop").apply(params, x)[0].shape[1:])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"model.factory: {name} cannot take inputs {[2, *input_shape]}: {error}") from error
        if shape != [2, num_outputs]:
            raise ConfigError(
                f"model.factory: {name} returns {shape} for two examples, the task needs {[2, num_outputs]}."
            )

    def twin(self, batching: Batching, *, dtype: torch.dtype | None = None) -> ModuleModel:
        """The same module, batched in another way or in another dtype."""
        return ModuleModel(self._make, dtype=dtype or self._dtype, batching=batching)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, ...] -> outputs [T, N, num_outputs], observed statistics."""
        if self._device != x.device:  # buffers follow the inputs; parameters come from outside
            self._module.to(x.device)
            self._device = x.device
        if self.batching == "vmap":
            in_dims = (0, 0, None if statistics is None else 0)
            outputs, observed = vmap(self._one_task, in_dims=in_dims, randomness="error")(params, x, statistics)
            return outputs, observed if observe else {}
        results = []
        for task in range(len(x)):
            given = None if statistics is None else {k: v[task] for k, v in statistics.items()}
            results.append(self._one_task({k: v[task] for k, v in params.items()}, x[task], given))
        outputs = torch.stack([output for output, _ in results])
        if not observe:
            return outputs, {}
        return outputs, {k: torch.stack([observed[k] for _, observed in results]) for k in results[0][1]}

    def _one_task(self, params: Params, x: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
        for name, norm in self._norms.items():
            norm.given = None if statistics is None else (statistics[f"{name}.mean"], statistics[f"{name}.var"])
        with _twice_differentiable():
            output = functional_call(self._module, params, (x,))
        observed: Statistics = {}
        for name, norm in self._norms.items():
            assert norm.observed is not None, f"{name} was not used in the forward pass"
            observed[f"{name}.mean"], observed[f"{name}.var"] = norm.observed
            norm.given = norm.observed = None
        return output, observed


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """The attention kernels that have a second derivative; under vmap the others would not see that they need one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _with_episode_norms(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return EpisodeBatchNorm(module)
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, EpisodeBatchNorm(child))
    return module
