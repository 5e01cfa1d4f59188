"""Start the workers of a run and wait for them: in this process, as gloo processes, or as Ray Train workers."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from pipeline import errors, storage
from pipeline.errors import ConfigError, Interrupted, StopRequested, TrainingStopped, UserError, WorkerLost
from pipeline.experiment import Experiment, TrainingConfig
from pipeline.runs import PLACE_FILE, STOP_FILE, RunFolder
from pipeline.training.context import LocalContext, RayContext, StopSignals, run_processes, torch_config
from pipeline.training.loop import train, train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

AUTOSCALING_VARIABLE = "METAPIPE_AUTOSCALING"  # the cluster adds nodes on demand: do not refuse what it has no room for
SIGNAL_SECONDS = 0.5
CONTROLLER_FAILURES = 20  # groups that found no room in time, before the run is given up; Ray's own default is never


def run_workers(experiment: Experiment, run: RunFolder) -> None:
    """Train `run` to its end with the experiment's backend, starting lost workers again.

    SIGTERM or SIGINT: the workers write a checkpoint and end; a second one ends them at once.

    Raises TrainingStopped: the run ended early; running the same command again goes on from its last checkpoint.
    Interrupted: the same, after a signal. UserError of another kind: what a worker raised.
    """
    run.clear_stop()
    training = experiment.training
    if training.backend == "local":
        with StopSignals() as signals:
            device = "cuda" if training.use_gpu else "cpu"
            _until_interrupted(signals, lambda: train(LocalContext(device, signals=signals), experiment, run))
    elif training.backend == "processes":
        _run_processes(experiment, run)
    else:
        with ray_cluster(training.min_workers * training.cpus_per_worker):
            _run_ray_train(experiment, run)


def _until_interrupted(signals: StopSignals, work: Callable[[], None]) -> None:
    """An end that a signal asked for is an interruption."""
    try:
        work()
    except StopRequested:
        if signals.received is None:
            raise
        raise Interrupted(signals.received) from None


def _run_processes(experiment: Experiment, run: RunFolder) -> None:
    training = experiment.training
    room = (os.cpu_count() or 1) // training.cpus_per_worker
    workers = min(training.max_workers, max(training.min_workers, room))
    arguments = (experiment.to_dict(), str(run.path))
    failures = 0
    while True:
        try:
            run_processes(train_worker, *arguments, num_workers=workers, use_gpu=training.use_gpu)
        except WorkerLost:
            failures += 1
            if failures > training.max_failures:
                raise
        else:
            return


@contextmanager
def ray_cluster(cpus: int) -> Iterator[None]:
    """A Ray cluster: the one this process is connected to, the one at RAY_ADDRESS, or a private local one.

    The private one has at least `cpus` CPU slots, listens on this machine only, asks for a random token, and ends
    with the block.

    Raises ConfigError: no cluster answers at RAY_ADDRESS, or it refuses this process's token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        address = None  # of a job server, for `metapipe submit`
    import ray
    from ray._private import auto_init_hook

    # after an interrupt a thread may still call Ray, which would then join or start a cluster, and wait there
    auto_init_hook.enable_auto_connect = False
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        _ask_for_a_token()
        slots = max(cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=slots, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"the Ray cluster at {address} cannot be joined ({reason}). Check --address or RAY_ADDRESS, and the "
                "cluster's token in RAY_AUTH_TOKEN; without an address a private local cluster is used."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ask_for_a_token() -> None:
    """Has the private cluster ask for a token, and this process know it.

    Without one in the environment Ray would make it up and leave it in the home folder.
    """
    # Ray reads its settings once in a process: where it was imported before, it would not send the token
    from ray._private.authentication_test_utils import reset_auth_token_state

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    reset_auth_token_state()


def _run_ray_train(experiment: Experiment, run: RunFolder) -> None:
    import ray.train

    _check_room(experiment)
    training = experiment.training
    elastic = training.min_workers < training.max_workers
    # Ray may count on a node for a while after it is gone: with fewer workers allowed it should soon try those
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15" if elastic else "120"
    trainer = _trainer(experiment, run)
    with StopSignals(run.request_stop) as signals, ThreadPoolExecutor(1, thread_name_prefix="ray-train") as pool:
        # in a thread of its own: in the main one Ray would put its handler in the place of ours
        fit = pool.submit(trainer.fit)
        try:
            _wait_for(fit)
        except ray.train.TrainingFailedError as error:
            raise _user_error(error, run) from error
        except Interrupted:  # a second signal: do not wait for the thread, whose cluster is about to end
            ray.shutdown()
            raise
        _until_interrupted(signals, lambda: _raise_noted(run))


def _wait_for(fit: Future[Any]) -> None:
    """Its result; waking up now and then lets the main thread handle signals."""
    while True:
        try:
            fit.result(timeout=SIGNAL_SECONDS)
            return
        except TimeoutError:
            if fit.done():  # a timeout of its own
                raise


def _trainer(experiment: Experiment, run: RunFolder) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    training = experiment.training
    # Ray keeps its own notes in a folder that is new each time: resuming is ours, from the run's checkpoints
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"experiment": experiment.to_dict(), "run": str(run.path)},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # V2's, behind V1's stub
            num_workers=training.num_workers,  # type: ignore[arg-type]
            use_gpu=training.use_gpu,
            resources_per_worker=_worker_resources(training),
            elastic_resize_monitor_interval_s=training.resize_seconds,
        ),
        torch_config=torch_config(),
        run_config=RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(  # type: ignore[call-arg]  # V2's, behind V1's stub
                max_failures=training.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )


def _worker_resources(training: TrainingConfig) -> dict[str, float]:
    return {"CPU": float(training.cpus_per_worker), **({"GPU": 1.0} if training.use_gpu else {})}


def _check_room(experiment: Experiment) -> None:
    """Raises ConfigError where the cluster is too small now and has no autoscaler: Ray would wait for ever."""
    import ray

    training = experiment.training
    available = ray.cluster_resources()
    if os.environ.get(AUTOSCALING_VARIABLE):
        return
    for resource, amount in _worker_resources(training).items():
        if available.get(resource, 0) < amount * training.min_workers:
            raise ConfigError(
                f"training.num_workers={training.min_workers} with {amount:g} {resource} each: the Ray cluster has "
                f"only {available.get(resource, 0):g} {resource}. Lower num_workers, "
                + ("or set use_gpu: false" if resource == "GPU" else "or cpus_per_worker")
                + f". If the cluster scales up by itself, set {AUTOSCALING_VARIABLE}=1."
            )


def _ray_worker(config: dict[str, Any]) -> None:
    run = RunFolder(config["run"])
    if run.read().get("stopped"):
        return  # a rank of the group before this one met what a restart does not mend
    _note_place(run)
    context = RayContext(run_name=f"{run.path.parent.name}/{run.path.name}", stop_file=run.path / STOP_FILE)
    try:
        train_worker(context, config["experiment"], config["run"])
    except StopRequested as error:
        if not context.asked_by_driver():
            raise  # a node is being taken away: Ray starts the group again on others
        _note(run, context, error)
    except TrainingStopped as error:
        _note(run, context, error)  # every rank agrees on it; raising would only make Ray start the group again
    except UserError as error:
        _note(run, None, error)  # this rank alone: the others are in the all-reduce, only raising ends the group
        raise


def _note_place(run: RunFolder) -> None:
    """Leave the run's folder what `free_place` needs."""
    import ray.train
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is not None and ray.train.get_context().get_world_rank() == 0:
        storage.write(run.path / PLACE_FILE, group.id.hex())


def free_place(run: RunFolder) -> None:
    """End the workers of a run whose driver is gone, and free what they hold of the cluster.

    Ray Train's own cleaner asks the cluster's state server, which a private cluster does not have and which is not
    always found on another.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    place = run.path / PLACE_FILE
    if place.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(place.read_text()))))


def _note(run: RunFolder, context: RayContext | None, error: UserError) -> None:
    """Leave the driver an error that ends the run. context: of a rank among many with the same error."""
    if context is None or context.rank == 0:
        with suppress(OSError):  # the folder itself may be what fails
            run.update(stopped=[type(error).__name__, str(error)])


def _raise_noted(run: RunFolder) -> None:
    """Raises what a worker has left in the run's folder, if anything."""
    stopped = run.read().get("stopped")
    if stopped:
        kind, message = stopped
        raise getattr(errors, kind)(message)


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
