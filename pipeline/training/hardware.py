"""What a run was computed on, as it is written into the run and told with its results."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from pipeline.training.context import Context

Hardware = dict[str, Any]


def of_worker(context: Context, *, threads: int) -> Hardware:
    """The machine of this worker, as one of `context.world_size` alike."""
    gpu = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None
    return {
        "processor": processor(),
        "cores": cores(),
        "gpu": gpu,
        "workers": context.world_size,
        "threads_per_worker": threads,
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def told(hardware: Hardware) -> str:
    """In words, e.g. `2 cores of Intel(R) Xeon(R), 2 workers of 1 thread`."""
    gpu = f"{hardware['gpu']}, " if hardware["gpu"] else ""
    return (
        f"{gpu}{_number(hardware['cores'], 'core')} of {hardware['processor']}, "
        f"{_number(hardware['workers'], 'worker')} of {_number(hardware['threads_per_worker'], 'thread')}"
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
