"""Where a worker runs: rank, world size, device, all-reduce, report. The loop knows only this.

`LocalContext` is one process, `ProcessContext` several on this machine with gloo and no Ray, `RayContext` a Ray
Train worker. Checkpoints and metrics go through the run's folder (see `runs.py`), the same way in all three.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from pipeline.errors import Interrupted, UserError, WorkerLost
from pipeline.storage import Location

PROCESS_TIMEOUT = timedelta(minutes=10)
GRACE_SECONDS = 30.0  # for workers that are asked to end, to write a checkpoint
STOP_POLL_SECONDS = 1.0

# A step's metric -> its name and description among Ray's metrics (Prometheus shows it as ray_NAME)
RAY_METRICS = {
    "step": ("metapipe_outer_step", "Completed outer steps."),
    "tasks_per_second": ("metapipe_tasks_per_second", "Tasks adapted a second, over all workers."),
    "meta_loss": ("metapipe_meta_loss", "Mean query loss after adaptation, over the meta-batch."),
    "step_seconds": ("metapipe_step_seconds", "Duration of an outer step."),
    "all_reduce_seconds": ("metapipe_all_reduce_seconds", "This rank's time in the all-reduce, waiting included."),
    "skipped_steps": ("metapipe_skipped_steps", "Outer steps left out because something was not finite."),
}


class Context(Protocol):
    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, flat: Tensor) -> None:
        """Sum over ranks, in place."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Called by every rank after each validation, once its checkpoint is written."""
        ...

    def observe(self, metrics: dict[str, float]) -> None:
        """Called by every rank after each outer step, with that step's metrics."""
        ...

    def stop_requested(self) -> bool:
        """Whether this rank has been asked to end; asked before each outer step, so it must not take long."""
        ...


class StopSignals:
    """SIGTERM and SIGINT as a request to end, while the block runs in the main thread; a second one interrupts."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.received: int | None = None
        self._on_request = on_request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.received is not None:
            raise Interrupted(number)
        self.received = number
        self._on_request()


class LocalContext:
    """One worker: this process."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu", *, signals: StopSignals | None = None) -> None:
        self.device = torch.device(device)
        self._signals = signals or StopSignals()

    def all_reduce(self, flat: Tensor) -> None:
        pass

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def observe(self, metrics: dict[str, float]) -> None:
        pass

    def stop_requested(self) -> bool:
        return self._signals.received is not None


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

    def __init__(self, device: torch.device, signals: StopSignals) -> None:
        super().__init__(device)
        self._signals = signals

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def observe(self, metrics: dict[str, float]) -> None:
        pass

    def stop_requested(self) -> bool:
        return self._signals.received is not None


class RayContext(_DistributedContext):
    """A Ray Train worker; Ray has set up the process group (NCCL with GPUs, gloo without)."""

    def __init__(self, *, run_name: str, stop_file: Location) -> None:
        import ray.train.torch

        super().__init__(ray.train.torch.get_device())
        self._gauges = _gauges(run_name, self.rank)
        self._stop = threading.Event()
        if self.rank == 0:  # the request of one rank reaches all
            threading.Thread(target=self._watch, args=(stop_file,), name="stop", daemon=True).start()

    def report(self, metrics: dict[str, float]) -> None:
        pass  # the driver follows the journal; Ray's report would wait for its controller, a second or two each time

    def observe(self, metrics: dict[str, float]) -> None:
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(metrics[name])

    def stop_requested(self) -> bool:
        return self._stop.is_set() or self._preempted()

    def asked_by_driver(self) -> bool:
        """Whether it is the driver that asked to end. Called by every rank, all of which get the answer of rank 0."""
        answer = torch.tensor([float(self._stop.is_set())], device=self.device)
        self.all_reduce(answer)
        return bool(answer)

    def _preempted(self) -> bool:
        """Whether a node of the group is being taken away (Ray drains it)."""
        # what this rank was told; the public `ray.train.get_preemption_info` is a barrier of all ranks, over an actor
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None

    def _watch(self, stop_file: Location) -> None:
        while not self._stop.wait(STOP_POLL_SECONDS):
            with suppress(OSError):  # an object store that fails now answers the next time
                if stop_file.exists():
                    self._stop.set()


def _gauges(run_name: str, rank: int) -> dict[str, Any]:
    """Our own Ray metrics, by the name of the step's metric: for Prometheus (infra/monitoring)."""
    from ray.util.metrics import Gauge

    gauges = {}
    for name, (exported, description) in RAY_METRICS.items():
        gauges[name] = Gauge(exported, description=description, tag_keys=("run", "rank"))
        gauges[name].set_default_tags({"run": run_name, "rank": str(rank)})
    return gauges


def torch_config() -> Any:
    """Ray Train's set-up of the process group, on the interface that the cluster itself uses on each node.

    Left alone, gloo takes the address that the host name stands for: often 127.0.0.1 (see /etc/hosts), where another
    node finds nobody. GLOO_SOCKET_IFNAME in a node's environment goes before.
    """
    from ray.train.torch import TorchConfig

    base = TorchConfig().backend_cls

    class OnTheNodesInterface(base):  # type: ignore[misc, valid-type]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(choose_interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return OnTheNodesInterface

    return Config(timeout_s=int(PROCESS_TIMEOUT.total_seconds()))


def choose_interface() -> None:
    """Have gloo use the interface that holds this node's address, where there is one."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def run_processes(worker: Callable[..., None], *args: Any, num_workers: int, use_gpu: bool = False) -> None:
    """Run `worker(context, *args)` in `num_workers` new processes on this machine and wait for them.

    An interrupt is passed on to the workers, which have GRACE_SECONDS to write a checkpoint.

    Raises the worker's UserError; WorkerLost where a worker died. The others are then ended too.
    """
    # the driver listens, at a port that the system gives it: one chosen for a worker could be taken before it starts
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    errors = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=_process, args=(rank, num_workers, store.port, use_gpu, errors, worker, args), daemon=True)
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    try:
        waiting = list(processes)
        while waiting:
            ended = wait([process.sentinel for process in waiting])
            for process in waiting:
                if process.sentinel in ended:
                    process.join()  # a dying process closes its end a moment before it has an exit code
            if any(process.exitcode for process in waiting):
                if not errors.empty():
                    raise errors.get()
                # of several that have ended, the one that was killed took the others with it
                codes = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
                rank = min(codes, key=lambda rank: (codes[rank] > 0, rank))
                raise WorkerLost(
                    f"worker {rank} ended with exit code {codes[rank]}. Run the same command again to go on from the "
                    "last checkpoint."
                )
            waiting = [process for process in waiting if process.exitcode is None]
    except Interrupted:
        _end(processes, grace=GRACE_SECONDS)
        raise
    finally:
        _end(processes, grace=0)


def _end(processes: list[Any], *, grace: float) -> None:
    """Ask processes to end, and after `grace` seconds make them."""
    if grace:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + grace
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
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
    signals = StopSignals().__enter__()  # for the whole process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver passes it on
    threading.Thread(target=_end_with_the_driver, name="driver", daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine; its host name may not resolve
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if use_gpu else "gloo",
        store=torch.distributed.TCPStore("127.0.0.1", port, timeout=PROCESS_TIMEOUT),
        rank=rank,
        world_size=world_size,
        timeout=PROCESS_TIMEOUT,
    )
    exit_code = 0
    try:
        worker(ProcessContext(device, signals), *args)
        torch.distributed.barrier()  # who leaves first must not take the connection from under the others
    except UserError as error:
        errors.put(error)
        exit_code = 1
    except BaseException as error:
        if not isinstance(error, torch.distributed.DistBackendError) and "gloo" not in str(error):
            traceback.print_exc()  # else a peer has died: the driver says which
        exit_code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # not by way of the interpreter's end: gloo's threads may abort a process whose work is done and written
    os._exit(exit_code)
