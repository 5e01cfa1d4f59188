"""Numbers and times of work that a GPU has been given and may not have done yet. On a CPU everything is done at once.

Asking a GPU for a number makes the host wait for all that is queued before it, and then the GPU for the host. So what
the host wants to know is copied aside as it comes, and read a step later, when it has long been there.
"""

from __future__ import annotations

import time
from typing import TypeAlias

import torch
from torch import Tensor

Mark: TypeAlias = float | torch.cuda.Event
"""A point in a device's work: seconds of the host's clock, or an event in the GPU's queue."""


def mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Between two marks of one device; waits until the second is reached."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


def to_device(values: list[float], like: Tensor) -> Tensor:
    """A few numbers with the dtype and on the device of `like`, without waiting for it."""
    if like.device.type != "cuda":
        return torch.tensor(values, dtype=like.dtype)
    # from pageable memory the copy would first wait for everything that is queued
    return torch.tensor(values, dtype=like.dtype, pin_memory=True).to(like.device, non_blocking=True)


class Fetched:
    """Numbers [n] on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
