"""Where a worker runs: rank, world size, device, all-reduce, report. The loop knows only this.

`LocalContext` is one process, `ProcessContext` several on this machine with gloo and no Ray, `RayContext` a Ray
Train worker. Checkpoints and metrics go through the run's folder (see `runs.py`), the same way in all three.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from pipeline.errors import TrainingStopped, UserError

PROCESS_TIMEOUT = timedelta(minutes=10)


class Context(Protocol):
    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, flat: Tensor) -> None:
        """Sum over ranks, in place."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Called by every rank after each validation, equally often (under Ray it is a barrier)."""
        ...


class LocalContext:
    """One worker: this process."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def all_reduce(self, flat: Tensor) -> None:
        pass

    def report(self, metrics: dict[str, float]) -> None:
        pass


class _DistributedContext:
    """A rank of torch's default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = device

    def all_reduce(self, flat: Tensor) -> None:
        torch.distributed.all_reduce(flat)


class ProcessContext(_DistributedContext):
    """One of several processes that `run_processes` started."""

    def report(self, metrics: dict[str, float]) -> None:
        pass


class RayContext(_DistributedContext):
    """A Ray Train worker; Ray has set up the process group (NCCL with GPUs, gloo without)."""

    def __init__(self) -> None:
        import ray.train.torch

        super().__init__(ray.train.torch.get_device())

    def report(self, metrics: dict[str, float]) -> None:
        import ray.train

        ray.train.report(metrics)


def run_processes(worker: Callable[..., None], *args: Any, num_workers: int, use_gpu: bool = False) -> None:
    """Run `worker(context, *args)` in `num_workers` new processes on this machine and wait for them.

    Raises the worker's UserError; TrainingStopped where a worker died. The others are then ended too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    errors = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=_process, args=(rank, num_workers, port, use_gpu, errors, worker, args), daemon=True)
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    try:
        waiting = list(processes)
        while waiting:
            wait([process.sentinel for process in waiting])
            failed = [p for p in waiting if p.exitcode not in (None, 0)]
            if failed:
                if not errors.empty():
                    raise errors.get()
                raise TrainingStopped(
                    f"worker {processes.index(failed[0])} ended with exit code {failed[0].exitcode}. Run the same "
                    "command again to go on from the last checkpoint."
                )
            waiting = [process for process in waiting if process.exitcode is None]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _end_with_the_driver() -> None:
    """A driver that is killed cannot end its workers, and they must not go on writing a run that starts anew."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _process(
    rank: int, world_size: int, port: int, use_gpu: bool, errors: Any, worker: Callable[..., None], args: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    threading.Thread(target=_end_with_the_driver, name="driver", daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine; its host name may not resolve
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if use_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=PROCESS_TIMEOUT,
    )
    try:
        worker(ProcessContext(device), *args)
    except UserError as error:
        errors.put(error)
        raise SystemExit(1) from None
    finally:
        torch.distributed.destroy_process_group()
