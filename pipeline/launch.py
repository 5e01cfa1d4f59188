"""Start the workers of a run and wait for them: in this process, as gloo processes, or as Ray Train workers."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError, Interrupted, TrainingStopped, UserError
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training.context import LocalContext, RayContext, run_processes
from pipeline.training.loop import train, train_worker


def run_workers(experiment: Experiment, run: RunFolder) -> None:
    """Train `run` to its end with the experiment's backend.

    Raises TrainingStopped: the run ended early; running the same command again goes on from its last checkpoint.
    UserError of another kind: what a worker raised.
    """
    training = experiment.training
    if training.backend == "local":
        train(LocalContext("cuda" if training.use_gpu else "cpu"), experiment, run)
    elif training.backend == "processes":
        arguments = (experiment.to_dict(), str(run.path))
        run_processes(train_worker, *arguments, num_workers=training.num_workers, use_gpu=training.use_gpu)
    else:
        with ray_cluster(training.num_workers * training.cpus_per_worker):
            _run_ray_train(experiment, run)


@contextmanager
def ray_cluster(cpus: int) -> Iterator[None]:
    """A Ray cluster: the one this process is connected to, the one at RAY_ADDRESS, or a private local one.

    The private one has at least `cpus` CPU slots, listens on this machine only, asks for a random token, and ends
    with the block.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    private = "RAY_ADDRESS" not in os.environ
    if private:
        # otherwise Ray makes up a token and leaves it in the home folder
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if private:
        slots = max(cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=slots, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(**quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({error}). Start one, or unset "
                "RAY_ADDRESS to use a private local one."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _run_ray_train(experiment: Experiment, run: RunFolder) -> None:
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    training = experiment.training
    resources = {"CPU": float(training.cpus_per_worker), **({"GPU": 1.0} if training.use_gpu else {})}
    available = ray.cluster_resources()
    for resource, amount in resources.items():
        if available.get(resource, 0) < amount * training.num_workers:  # Ray would wait for ever
            raise ConfigError(
                f"training.num_workers={training.num_workers} with {amount:g} {resource} each: the Ray cluster has "
                f"only {available.get(resource, 0):g} {resource}. Lower num_workers, "
                + ("or set use_gpu: false." if resource == "GPU" else "or cpus_per_worker.")
            )
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    # Ray keeps its own notes in a folder that is new each time: resuming is ours, from the run's checkpoints
    storage = run.path / "ray"
    attempt = f"{len(list(storage.glob('*'))):03d}" if storage.exists() else "000"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"experiment": experiment.to_dict(), "run": str(run.path)},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers, use_gpu=training.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # V2's, behind V1's stub
                max_failures=training.max_failures, controller_failure_limit=3
            ),
        ),
    )
    run.update(stopped=None)
    on_interrupt = signal.getsignal(signal.SIGINT)  # Ray puts its own handler in its place
    try:
        trainer.fit()
    except (SystemExit, ray.exceptions.RayActorError) as error:  # what Ray's handler makes of an interrupt
        raise Interrupted from error
    except ray.train.TrainingFailedError as error:
        raise _user_error(error, run) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    stopped = run.read()["stopped"]
    if stopped:
        raise TrainingStopped(stopped)


def _ray_worker(config: dict[str, Any]) -> None:
    context = RayContext()
    try:
        train_worker(context, config["experiment"], config["run"])
    except TrainingStopped as error:
        # every rank agrees on it; raising would only make Ray restart the group to fail again
        if context.rank == 0:
            RunFolder(Path(config["run"])).update(stopped=str(error))


def _user_error(error: Exception, run: RunFolder) -> UserError:
    """The message a user can act on, from what Ray says of its workers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    causes = [cause for failure in failures for cause in (failure, getattr(failure, "cause", None), failure.__cause__)]
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    reasons = "; ".join(sorted({str(failure).strip().splitlines()[-1] for failure in failures if str(failure).strip()}))
    return TrainingStopped(
        f"{run.path}: the Ray workers failed ({reasons or error}). Run the same command again to go on from the last "
        "checkpoint; --debug shows the whole traceback."
    )


def default_device() -> torch.device:
    """Where the driver evaluates and serves."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
