"""How the benchmarks measure: in turn, with quartiles, in fresh processes, on CPU and CUDA alike."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


class Quartiles(NamedTuple):
    """Of repeated measurements, or of ratios within a round: a round's contenders met the same load."""

    low: float
    median: float
    high: float


def quartiles(values: list[float]) -> Quartiles:
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(low, median, high)


def in_turn(steps: Mapping[str, Step], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step in every round: A B C A B C …, after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for counted in [False] * 2 + [True] * rounds:
        for name, step in steps.items():
            elapsed = _seconds(step, device)
            if counted:
                seconds[name].append(elapsed)
    return seconds


def _seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def gemm(device: torch.device) -> tuple[Step, float]:
    """A square float32 matrix product as a step to take turns with, and its floating-point operations."""
    n = GEMM_SIZE[device.type]
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    out = torch.empty(n, n, device=device)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * n**3


def flops(step: Step) -> float:
    """Floating-point operations of a step's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, which has done nothing but import torch. Raises RuntimeError."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pipeline.experiment"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise RuntimeError(str(result))
    return result


def _send(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*args))
    except Exception as error:
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes of a step's peak over idle, once warm; None where the system does not tell."""
    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - idle
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the warm-up freed is no part of idle
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    idle = _resident("VmRSS")
    step()
    return _resident("VmHWM") - idle


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def launches(step: Step, device: torch.device) -> int:
    """Kernels that a step launches on a GPU; on CPU the operators it dispatches."""
    if device.type == "cpu":
        with _Counter() as counter:
            step()
        return counter.count
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
