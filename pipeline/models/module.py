"""Any `nn.Module` as a task-batched model, through `torch.func.functional_call`: a loop over tasks, or vmap.

The module is written for one task (inputs [N, ...]). Its BatchNorm layers are replaced by ones that take their
statistics from the pass or from outside, so that a user's network gets the same transductive and inductive paths
as the package's own; so are its dropout layers, whose masks come from keys. With vmap every derivative stays outside
it (`apply = vmap(functional_call)`); an inner gradient inside vmap under an outer one outside it is silently wrong
where normalization affines adapt.

Which of the two is faster depends on the network and the machine, and vmap cannot batch every network:
`pipeline/training/batching.py` verifies and measures them on the first batch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import kernels
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision
from pipeline.keys import bits
from pipeline.models.episode_layers import EpisodeBatchNorm, EpisodeDropout, FixedBatchNorm, with_episode_layers
from pipeline.types import Inputs, Params, Statistics

Batching = Literal["auto", "loop", "vmap"]
BatchNormStatistics = Literal["episode", "pretrained"]
_ALWAYS_INSTALLED = ("torch", "torchvision")  # this package depends on them


class ModuleConfig(Section):
    """Your own network: `factory` is called with `arguments` and returns an nn.Module for one task."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "vectors", "tokens")

    name: Literal["module"]
    factory: str = Field(pattern=r"^[\w.]+:\w+$")  # "package.module:callable"
    folder: Path = Path(".")  # where the package lies, if it is not installed
    arguments: dict[str, Any] = Field(default_factory=dict)
    batching: Batching = "auto"
    # of tasks. auto: the faster one as measured on the first batch; vmap only where its meta-gradient is the loop's
    dropout: bool = False  # in meta-training; the masks are a function of seed, outer step and episode
    head: str | None = None  # the linear layer whose outputs are the module's; None: its last nn.Linear
    batch_norm: BatchNormStatistics = "episode"
    # pretrained: the running statistics that come with the weights (training.init_from), in every pass

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

        model = ModuleModel(
            make,
            dtype=dtype,
            batching=self.batching,
            dropout=self.dropout,
            head=self.head,
            batch_norm=self.batch_norm,
        )
        model.check(input_shape, num_outputs, name=self.factory)
        return model

    def absolute(self) -> ModuleConfig:
        """With an absolute folder: workers run in another one."""
        return self.model_copy(update={"folder": self.folder.absolute()})

    def code_path(self) -> Path | None:
        """The file or package folder with the factory, to keep with a registered model; None: installed anyway."""
        name = self.factory.partition(":")[0].partition(".")[0]
        if name in _ALWAYS_INSTALLED:
            return None
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


class ModuleModel:
    """Task-batched view of the modules that `make` returns. Parameters keep the module's own names.

    Buffers other than BatchNorm's are constants. `stochastic`: with keys its dropout layers drop.
    With `batch_norm` pretrained, BatchNorm's running statistics travel with the parameters, under the module's names
    (`constant_names`): what holds, copies and stores parameters holds them too, and nothing learns them.
    """

    cpu_task_chunk: int | None = None
    kernel, precision = "pure", "float32"

    def __init__(
        self,
        make: Any,
        *,
        dtype: torch.dtype,
        batching: Batching = "auto",
        dropout: bool = False,
        head: str | None = None,
        batch_norm: BatchNormStatistics = "episode",
    ) -> None:
        """batching: loop or vmap; auto is the loop, which is always right, until one was chosen.

        Raises ConfigError: dropout that cannot come from keys; a head that is not there.
        """
        self._make = make
        self._dtype = dtype
        self._asked = batching
        self.batching: Literal["loop", "vmap"] = "loop" if batching == "auto" else batching
        # eval: what is not replaced would draw from the global generator, and answers would differ from call to call
        fixed = batch_norm == "pretrained"
        module = with_episode_layers(self._fresh(seed=0), dropout=dropout, fixed_statistics=fixed)
        self._module = module.to(dtype).eval()
        self.constant_names = [
            f"{path}.{buffer}".removeprefix(".")
            for path, layer in self._module.named_modules()
            if isinstance(layer, FixedBatchNorm)
            for buffer in ("running_mean", "running_var")
        ]
        self._norms = {n: m for n, m in self._module.named_modules() if isinstance(m, EpisodeBatchNorm)}
        self._dropouts = [m for m in self._module.modules() if isinstance(m, EpisodeDropout) and m.p > 0]
        self.parameter_names = [name for name, _ in self._module.named_parameters()]
        self.norm_layers = [name for name, norm in self._norms.items() if norm.weight is not None]
        name = self._head_name(head)
        self.head = (f"{name}.weight", f"{name}.bias")
        self._head_inputs: list[Tensor] = []  # of the pass for one task that was last
        if name:
            layer = self._module.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, inputs: self._head_inputs.append(inputs[0]))
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._module.modules())
        self.stochastic = bool(self._dropouts)
        self._keyed = dropout
        self._device = torch.device("cpu")

    def _head_name(self, asked: str | None) -> str:
        """Empty where there is no linear layer with a bias, which only matters to who asks for features."""
        layers = [n for n, m in self._module.named_modules() if isinstance(m, nn.Linear) and m.bias is not None]
        if asked is not None and asked not in layers:
            there = f"there are: {', '.join(layers)}" if layers else "there is none"
            raise ConfigError(f"model.head: {asked!r} is no linear layer (with a bias) of the module; {there}.")
        return asked or (layers[-1] if layers else "")

    def candidates(self) -> tuple[Literal["loop", "vmap"], ...]:
        """The ways of batching to choose from: one, where the configuration names it."""
        return ("loop", "vmap") if self._asked == "auto" else (self._asked,)

    @contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute with parameters and inputs of another floating dtype while the block runs."""
        self._module.to(dtype)
        try:
            yield
        finally:
            self._module.to(self._dtype)

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # a module's constructor draws from the global generator
            torch.manual_seed(seed)
            return self._make()

    def init(self, seed: int) -> Params:
        module = self._fresh(seed).to(self._dtype)
        params = {name: value.detach().clone() for name, value in module.named_parameters()}
        return params | {name: module.get_buffer(name).clone() for name in self.constant_names}

    def check(self, input_shape: tuple[int, ...], num_outputs: int, *, name: str, key: str = "model.factory") -> None:
        """key: of the configuration, that `name` comes from.

        Raises ConfigError: the module does not map [N, *input_shape] to [N, num_outputs], or draws without keys."""
        x = torch.zeros(1, 2, *input_shape, dtype=self._dtype)
        params = {k: v.unsqueeze(0) for k, v in self.init(0).items()}
        try:
            with torch.no_grad():
                shape = list(self.apply(params, x)[0].shape[1:])
                draws = self._keyed and self._draws_without_keys(params, x)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torchvision's are assertions
            raise ConfigError(f"{key}: {name} cannot take inputs {[2, *input_shape]}: {error}") from error
        if shape != [2, num_outputs]:
            raise ConfigError(f"{key}: {name} returns {shape} for two examples, the task needs {[2, num_outputs]}.")
        if draws:
            raise ConfigError(
                f"model.dropout: in training {name} draws random numbers by other means than nn.Dropout, nn.Dropout1d, "
                "2d or 3d and nn.MultiheadAttention (F.dropout, nn.AlphaDropout, stochastic depth), which cannot come "
                "from keys. Write them as those modules, or set model.dropout: false."
            )

    def _draws_without_keys(self, params: Params, x: Tensor) -> bool:
        """Whether the module in training mode uses the global generator."""
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            self._module.train()
            try:
                self.apply(params, x)
            finally:
                self._module.eval().load_state_dict(buffers, strict=False)
            return not torch.equal(before, torch.get_rng_state())

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
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, ...] -> outputs [T, N, num_outputs], observed statistics."""
        return self._pass(self._outputs, params, x, statistics=statistics, observe=observe, keys=keys)

    def features(
        self,
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x [T, N, ...] -> what the head gets [T, N, F], observed statistics.

        Raises ConfigError: the module has no linear head, or does more than apply it to [N, F].
        """
        return self._pass(self._features, params, x, statistics=statistics, observe=observe, keys=keys)

    def _outputs(self, params: Params, x: Tensor) -> Tensor:
        try:
            return functional_call(self._module, params, (x,))
        finally:
            self._head_inputs.clear()

    def _features(self, params: Params, x: Tensor) -> Tensor:
        self._head_inputs.clear()
        functional_call(self._module, params, (x,))
        inputs = self._head_inputs[:]
        self._head_inputs.clear()
        if len(inputs) != 1 or inputs[0].ndim != 2:
            raise ConfigError(
                "model.factory: the module does not give features [N, F] to a last nn.Linear with a bias, which this "
                "algorithm needs. End the module in one, and name it in model.head if it is not the last."
            )
        return inputs[0]

    def _pass(
        self,
        call: Callable[[Params, Tensor], Tensor],
        params: Params,
        x: Tensor,
        *,
        statistics: Statistics | None,
        observe: bool,
        keys: Tensor | None,
    ) -> tuple[Tensor, Statistics]:
        """What `call` makes of each task, [T, N, ...], and observed statistics."""
        if self._device != x.device:  # buffers follow the inputs; parameters come from outside
            self._module.to(x.device)
            self._device = x.device
        keys = keys if self.stochastic else None
        with _twice_differentiable(recurrent_on_gpu=self._recurrent and x.is_cuda):
            if self.batching == "vmap":
                in_dims = (0, 0, None if statistics is None else 0, None if keys is None else 0)
                one_task = vmap(partial(self._one_task, call), in_dims=in_dims, randomness="error")
                outputs, observed = one_task(params, x, statistics, keys)
                return outputs, observed if observe else {}
            results = []
            for task in range(len(x)):
                given = None if statistics is None else {k: v[task] for k, v in statistics.items()}
                key = None if keys is None else keys[task]
                results.append(self._one_task(call, {k: v[task] for k, v in params.items()}, x[task], given, key))
        outputs = torch.stack([output for output, _ in results])
        if not observe:
            return outputs, {}
        return outputs, {k: torch.stack([observed[k] for _, observed in results]) for k in results[0][1]}

    def _one_task(
        self,
        call: Callable[[Params, Tensor], Tensor],
        params: Params,
        x: Tensor,
        statistics: Statistics | None,
        key: Tensor | None,
    ) -> tuple[Tensor, Statistics]:
        for name, norm in self._norms.items():
            known = statistics is not None and f"{name}.mean" in statistics
            norm.given = (statistics[f"{name}.mean"], statistics[f"{name}.var"]) if statistics and known else None
        layers = len(self._dropouts)
        for dropout, layer_key in zip(
            self._dropouts, [None] * layers if key is None else bits(key, layers), strict=True
        ):
            dropout.start(layer_key)
        output = call(params, x)
        observed: Statistics = {}
        for name, norm in self._norms.items():
            if norm.observed is not None:  # None: of a branch that is for training alone, as GoogLeNet's auxiliary ones
                observed[f"{name}.mean"], observed[f"{name}.var"] = norm.observed
            norm.given = norm.observed = None
        return output, observed


@contextmanager
def _twice_differentiable(*, recurrent_on_gpu: bool) -> Iterator[None]:
    """Only kernels that second-order gradients go through, and that vmap can batch, while the block runs.

    Flash attention and cuDNN's recurrent layers have no second derivative; the inference path of PyTorch's transformer
    layers has none at all, and is taken inside vmap even where gradients are asked for.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent_on_gpu:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
