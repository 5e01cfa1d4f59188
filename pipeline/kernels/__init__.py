"""Fast kernels for task-batched convolutional networks, and the choice among them.

- pure: stock PyTorch ops, in the model itself; the reference that the others are tested against.
- closed: PyTorch alone, on any device, with ops whose derivatives are again these ops (`closed.py`).
- native: the same with C++ for what is bound by memory on a CPU (`native.py`, `native.cpp`).

All of them are exact in their dtype. `precision: mixed` lets a training step's query pass keep its activations in
bfloat16: native kernels on CPUs that compute in it, closed ones on GPUs.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, NamedTuple

import torch

from pipeline.errors import ConfigError
from pipeline.kernels import native

Kernel = Literal["auto", "pure", "closed", "native"]
Precision = Literal["float32", "mixed"]

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    kernel: Literal["pure", "closed", "native"]
    precision: Precision


def choose(kernel: Kernel, precision: Precision, *, device: torch.device, channels: int, dtype: torch.dtype) -> Choice:
    """The kernels to use; the same on every call on one machine.

    channels: of the network's layers; dtype: of its parameters.

    `auto` is native where it can be built and fits, else closed. What had to be given up is logged once.
    Raises ConfigError: kernels that were asked for by name cannot be used.
    """
    unfit = _why_not_native(device.type, channels) if kernel in ("auto", "native") else None
    if kernel == "native" and unfit:
        raise ConfigError(f"training.kernel: native cannot be used: {unfit}. Set it to auto or closed.")
    if kernel == "auto":
        if unfit and device.type == "cpu":
            _say_once(f"native kernels are not used: {unfit}; training goes on with PyTorch's own ops, slower")
        kernel = "closed" if unfit else "native"
    if precision == "mixed":
        if dtype != torch.float32:
            raise ConfigError("training.precision: mixed keeps parameters in float32, training.dtype is not.")
        reason = _why_not_mixed(kernel, device, unfit)
        if reason:
            _say_once(f"precision: mixed is not used: {reason}; training goes on in float32")
            precision = "float32"
    return Choice(kernel, precision)


def only_stock_ops(name: str, kernel: Kernel, precision: Precision) -> None:
    """For models without kernels of their own. Raises ConfigError: some were asked for by name."""
    if kernel == "native":
        raise ConfigError(f"training.kernel: native: the model {name} has no native kernels. Set it to auto.")
    if precision == "mixed":
        raise ConfigError(f"training.precision: mixed: the model {name} has no kernels for it. Set it to float32.")


def _why_not_mixed(kernel: Kernel, device: torch.device, unfit: str | None) -> str | None:
    """None where bfloat16 is computed in, and by kernels that are made for it."""
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if kernel == "closed" and has else "it needs the closed kernels and a GPU of Ampere or later"
    return native.why_slow_in_bfloat16() if kernel == "native" else unfit or "on a CPU it needs the native kernels"


def allow_tf32(allowed: bool) -> None:
    """Whether cuDNN may round the factors of float32 convolutions to TF32's 10 bits. Of this process, for all of them.

    Matrix products stay as they are: the first layer's variances are small differences of large ones.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = False


def _why_not_native(device_type: str, channels: int) -> str | None:
    if device_type != "cpu":
        return f"they are for CPUs, the device is {device_type}"
    if channels % native.BLOCK:
        return f"they work on blocks of {native.BLOCK} channels, model.hidden is {channels}"
    return native.why_not()


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
