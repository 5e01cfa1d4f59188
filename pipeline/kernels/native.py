"""The native kernels (`native.cpp`): built once per machine and kind of CPU, loaded on first use.

The library goes to a folder of the user's, METAPIPE_KERNELS or `~/.cache/metapipe/kernels`, under a name that tells
its source, PyTorch, compiler flags and CPU; the first process builds it under a lock while others wait. Where it cannot
be built, `why_not` says why and nothing else here may be called.

    python -m pipeline.kernels      # builds it now and says what came of it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.kernels import closed
from pipeline.kernels.closed import EPSILON, Images, convolution, prepare

__all__ = ["BLOCK", "convolution", "first_layer", "norm_relu_pool", "prepare", "why_not", "why_slow_in_bfloat16"]

BLOCK = 16  # channels of a layer must be a multiple of it
FOLDER_VARIABLE = "METAPIPE_KERNELS"  # where the library is kept; "off": never build or load it
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
BUILD_SECONDS = 600
ops: Any = torch.ops.metapipe_native


# building and loading


@cache
def why_not() -> str | None:
    """None once the library is loaded; else why it cannot be used here. Builds it where there is none yet."""
    try:
        torch.ops.load_library(str(_built()))
    except (_CannotBuild, OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home folder
        return str(error)
    return None


class _CannotBuild(Exception):
    pass


def _folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if given == "off":
        raise _CannotBuild(f"{FOLDER_VARIABLE} is off")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metapipe" / "kernels"


def _built() -> Path:
    """The library, built by this process or by another. Raises _CannotBuild, OSError."""
    library = _folder() / f"{_key()}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when its holder dies
        if not library.exists():
            _compile(library)
    return library


def _key() -> str:
    """Of everything that the library depends on."""
    cpu = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu += "".join(
            sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Feat"))})
        )
    parts = (SOURCE.read_text(encoding="utf-8"), torch.__version__, cpu, *FLAGS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(library: Path) -> None:
    """Whole or not there: compiled beside its place, then renamed. Raises _CannotBuild."""
    from torch.utils import cpp_extension  # slow to import

    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if compiler is None:
        raise _CannotBuild(f"there is no C++ compiler ({cpp_extension.get_cxx_compiler()})")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        partial = Path(scratch) / library.name
        command = [compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [str(SOURCE), "-o", str(partial)]
        command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
            raise _CannotBuild(f"{compiler} failed ({lines[0] if lines else error.returncode})") from error
        except subprocess.TimeoutExpired as error:
            raise _CannotBuild(f"{compiler} took longer than {BUILD_SECONDS} s") from error
        os.replace(partial, library)


def why_slow_in_bfloat16() -> str | None:
    """None where this CPU computes in bfloat16 (AVX-512 BF16 or AMX); elsewhere it would only emulate it."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if has else "this CPU does not compute in bfloat16"


# ops closed under differentiation, as in `closed`


def first_layer(
    images: Images, weight: Tensor, gain: Tensor, offset: Tensor, *, stride: int, pool: int, dtype: torch.dtype
) -> Tensor:
    """As `closed.first_layer`."""
    folded, shift = closed.fold(weight, gain, offset, images)
    return _First.apply(images.padded, folded.transpose(1, 2).contiguous(), shift, stride, pool, dtype)


class _First(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, offset: Tensor, *how: Any) -> Tensor:
        y, winner = ops.first_forward(images, weight, offset, *how)
        ctx.save_for_backward(images, winner)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        images, winner = ctx.saved_tensors
        return None, *_FirstGradients.apply(images, gy, winner, *ctx.how), None, None, None


class _FirstGradients(Function):
    """Linear in gy; its adjoint takes the values at the winners."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, gy: Tensor, winner: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(images, winner)
        ctx.how = how
        stride, pool, _ = how
        return ops.first_gradients(images, gy, winner, stride, pool)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_weight: Tensor, v_offset: Tensor) -> tuple:
        images, winner = ctx.saved_tensors
        return None, ops.first_gather(images, v_weight, v_offset, winner, *ctx.how), None, None, None, None


def norm_relu_pool(x: Tensor, gain: Tensor, offset: Tensor, *, pool: int) -> Tensor:
    """As `closed.norm_relu_pool`; x in bfloat16 too, with gain and offset in float32."""
    return _Norm.apply(x, gain, offset, pool)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, pool: int) -> Tensor:
        y, winner, mean, r = ops.norm_forward(x, gain, offset, pool, EPSILON)
        ctx.save_for_backward(x, gain, winner, mean, r)
        ctx.pool = pool
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, gain, winner, mean, r = ctx.saved_tensors
        return *_NormBackward.apply(x, gain, gy, winner, mean, r, ctx.pool), None


class _NormBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, gy: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.pool = saved
        gx, g_gain, g_offset = ops.norm_backward(x, gain, gy, *saved)
        ctx.save_for_backward(x, gain, gy, *tensors, g_gain, g_offset)
        return gx, g_gain, g_offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor, v_gain: Tensor, v_offset: Tensor) -> tuple:
        d_x, d_gain, d_gy = ops.norm_double_backward(*ctx.saved_tensors, vx, v_gain, v_offset, ctx.pool)
        return d_x, d_gain, d_gy, None, None, None, None
