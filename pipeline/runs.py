"""A run's folder: its configuration, checkpoints, metrics journal and results; which run a command goes on with.

    RUNS/NAME/001/config.yaml       the experiment, as it was validated
    RUNS/NAME/001/run.json          status, data digest, MLflow run, registered version
    RUNS/NAME/001/initial.safetensors   the weights it started from, where they are not random
    RUNS/NAME/001/checkpoints/      see training/checkpoint.py
    RUNS/NAME/001/metrics.jsonl     one line per outer step and per validation, written by rank 0
    RUNS/NAME/001/stop              asks the workers to write a checkpoint and end
    RUNS/NAME/001/evaluation/       results

RUNS is a folder, on one machine or shared by all nodes, or an object store (`s3://`, `gs://`). An unfinished run goes
on when the same command is run again; a finished one leads to a new number.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import yaml
from torch import Tensor

from pipeline import config, experiment, storage
from pipeline.errors import ConfigError, DataError, RunTaken
from pipeline.experiment import Experiment
from pipeline.storage import Location, ObjectPath
from pipeline.training.checkpoint import CheckpointStore
from pipeline.types import MetaState

RUN_FILE, CONFIG_FILE, JOURNAL_FILE, STOP_FILE = "run.json", "config.yaml", "metrics.jsonl", "stop"
INITIAL_FILE = "initial.safetensors"
PLACE_FILE = "place"  # on a Ray cluster: see `launch.free_place`
CLAIM_FILE = ".claim.json"
CLAIM_SECONDS = 5.0  # between the signs of life of a claim in an object store
CLAIM_LOST_SECONDS = 20.0  # without one, its process is taken for dead

# What a run may go on with otherwise than it was started: where its workers run. Episodes do not depend on it, so the
# result differs by no more than the order of summation does.
ELASTIC_KEYS = ("backend", "num_workers", "cpus_per_worker", "use_gpu", "max_failures", "resize_seconds")


class Initial(NamedTuple):
    """Weights that a run starts from."""

    source: str  # for the user
    state: MetaState


def joined_state(state: MetaState) -> dict[str, Tensor]:
    """Parameters and buffers under one set of names, as they are kept in a file."""
    tensors = {f"params/{k}": v for k, v in state.params.items()}
    tensors |= {f"buffers/{k}": v for k, v in state.buffers.items()}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def split_state(tensors: Mapping[str, Tensor]) -> MetaState:
    """What `joined_state` put together."""
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    return MetaState(parts["params"], parts["buffers"])


class RunFolder:
    """One run's files."""

    def __init__(self, path: str | Location) -> None:
        self.path = storage.location(path)
        self.checkpoints = CheckpointStore(self.path / "checkpoints")

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def journal(self) -> Location:
        return self.path / JOURNAL_FILE

    @property
    def evaluation(self) -> Location:
        return self.path / "evaluation"

    def read(self) -> dict[str, Any]:
        """The content of run.json. Raises DataError where it is missing or damaged."""
        try:
            return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path / RUN_FILE}: cannot be read ({error}). Is this a run's folder?") from error

    def update(self, **values: Any) -> dict[str, Any]:
        """Change entries of run.json, atomically."""
        content = {**self.read(), **values} if (self.path / RUN_FILE).exists() else values
        storage.write(self.path / RUN_FILE, json.dumps(content, indent=1) + "\n")
        return content

    @property
    def exists(self) -> bool:
        """Whether it has been set up completely."""
        return (self.path / RUN_FILE).exists()

    def describe(self, exp: Experiment, *, data_digest: str, initial: Initial | None = None, **values: Any) -> None:
        """Write its configuration, the weights it starts from and, where there is none yet, run.json."""
        storage.make_folder(self.path)  # there already if a start was killed before run.json was written
        text = yaml.safe_dump(exp.to_dict(), sort_keys=False, allow_unicode=True)
        storage.write(self.path / CONFIG_FILE, text)
        started = {} if self.exists else {"status": "running", "name": exp.name, "data_digest": data_digest}
        if initial is not None:
            content = safetensors.torch.save(joined_state(initial.state))
            storage.write(self.path / INITIAL_FILE, content)
            values["initial"] = {"from": initial.source, "sha256": hashlib.sha256(content).hexdigest()}
        self.update(**started, **values)

    def initial(self) -> MetaState | None:
        """The weights it starts from; None: random ones. Raises DataError: they are missing or damaged."""
        told = self.read().get("initial")
        if told is None:
            return None
        path = self.path / INITIAL_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}). Start anew with --fresh.") from error
        if hashlib.sha256(content).hexdigest() != told["sha256"]:
            raise DataError(f"{path}: damaged (its sha256 differs from run.json's). Start anew with --fresh.")
        return split_state(safetensors.torch.load(content))

    @property
    def finished(self) -> bool:
        return self.read().get("status") == "finished"

    def experiment(self) -> Experiment:
        """The experiment this run was started with. Raises ConfigError, DataError."""
        path = self.path / CONFIG_FILE
        return experiment.from_dict(config.read_yaml(path), source=str(path), stored=True)

    def request_stop(self) -> None:
        """Ask the workers, wherever they are, to write a checkpoint and end."""
        storage.write(self.path / STOP_FILE, "")

    @property
    def stop_requested(self) -> bool:
        return (self.path / STOP_FILE).exists()

    def clear_stop(self) -> None:
        """Forget an earlier attempt's request and the reason why it ended."""
        if self.stop_requested:
            (self.path / STOP_FILE).unlink()
        if self.read().get("stopped"):
            self.update(stopped=None)


@contextmanager
def claimed(runs_of_name: Location) -> Iterator[None]:
    """Hold a name's folder (RUNS/NAME) while one of its runs is worked on; the claim ends with the process.

    Raises RunTaken: another process holds it. ConfigError: the folder cannot be made.
    """
    held = _held_object(runs_of_name) if isinstance(runs_of_name, ObjectPath) else _held_file(runs_of_name)
    with held:
        yield


def _taken(runs_of_name: Location) -> RunTaken:
    return RunTaken(
        f"{runs_of_name}: another process is training a run of this name. Wait for it, or give this one another name "
        "with --set name=…"
    )


@contextmanager
def _held_file(runs_of_name: Path) -> Iterator[None]:
    try:
        runs_of_name.mkdir(parents=True, exist_ok=True)
        stream = (runs_of_name / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{runs_of_name}: cannot be written ({error.strerror}). Set tracking.runs.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(runs_of_name) from None
        yield


@contextmanager
def _held_object(runs_of_name: ObjectPath) -> Iterator[None]:
    """An object store has no locks: the holder renews an object, and one that is not renewed any more is taken over."""
    storage.check_store(str(runs_of_name), key="tracking.runs")
    place = runs_of_name / CLAIM_FILE
    own = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    done = threading.Event()
    _wait_until_free(place)

    def renew() -> None:
        while not done.wait(CLAIM_SECONDS):
            with suppress(OSError):  # the next one may get through
                place.write_bytes(json.dumps({**own, "time": time.time()}).encode())

    place.write_bytes(json.dumps({**own, "time": time.time()}).encode())
    time.sleep(0.2)  # of two that begin at the same moment, the later one has it
    if json.loads(place.read_bytes())["token"] != own["token"]:
        raise _taken(runs_of_name)
    renewer = threading.Thread(target=renew, name="claim", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        done.set()
        renewer.join()
        with suppress(OSError):
            place.unlink()


def _wait_until_free(place: ObjectPath) -> None:
    """Returns when nobody holds the claim. Raises RunTaken as soon as its holder gives a sign of life."""
    first: bytes | None = None
    waiting_since = time.monotonic()
    while True:
        try:
            content = place.read_bytes()
            holder = json.loads(content)
        except (FileNotFoundError, ValueError):
            return
        if holder.get("host") == socket.gethostname() and not _alive(int(holder.get("pid", 0))):
            return
        if first is not None and content != first:
            raise _taken(place.parent)
        first = content
        if time.monotonic() - waiting_since > CLAIM_LOST_SECONDS:
            return
        time.sleep(1.0)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def runs_of(exp: Experiment) -> Location:
    """The folder of an experiment's runs: RUNS/NAME."""
    return storage.location(exp.tracking.runs).absolute() / exp.name


def open_run(
    exp: Experiment,
    *,
    data_digest: str,
    fresh: bool = False,
    initial: Callable[[], Initial | None] = lambda: None,
) -> tuple[RunFolder, bool]:
    """The folder to train in, and whether it is an unfinished run to go on with.

    fresh: leave an unfinished run as it is and start a new one. initial: gives the weights that a new run starts from;
    where it raises, there is no new run.

    Raises ConfigError: the last run under this name is unfinished and had another configuration or data set; the
    message lists the keys that differ.
    """
    parent = runs_of(exp)
    last = latest_run(parent)
    if last is not None and not last.finished and not fresh:
        changes = changes_since(last, exp, data_digest=data_digest)
        if changes:
            raise ConfigError(
                f"{last.path}: this run is unfinished and was started differently: {'; '.join(changes)}. Go on with "
                "the old values, start anew with --fresh, or choose another name with --set name=…"
            )
        return last, True
    run = RunFolder(parent / f"{last.number + 1 if last else 1:03d}")
    run.describe(exp, data_digest=data_digest, initial=initial())
    return run, False


def changes_since(run: RunFolder, exp: Experiment, *, data_digest: str | None) -> list[str]:
    """`key: old -> new` for all that could make an experiment's result another one than a run's.

    data_digest: None: not known here, so not compared.
    """
    changes = config.differences(_comparable(run.experiment()), _comparable(exp))
    before = run.read()["data_digest"]
    if data_digest is not None and before != data_digest:
        changes.append(f"data set digest: {before[:12]} -> {data_digest[:12]}")
    return changes


def latest_run(parent: Location) -> RunFolder | None:
    """The run with the highest number under `parent` that has been set up completely."""
    numbered = [p for p in parent.iterdir() if p.name.isdigit()] if parent.is_dir() else []
    for path in sorted(numbered, key=lambda p: int(p.name), reverse=True):
        if (path / RUN_FILE).exists():
            return RunFolder(path)
    return None


def find_run(path: str | Location) -> RunFolder:
    """The run at a folder: a run's own, or the last one under a name's folder. Raises DataError."""
    path = storage.location(path).absolute()
    if (path / RUN_FILE).exists():
        return RunFolder(path)
    run = latest_run(path)
    if run is None:
        raise DataError(f"{path}: holds no run. `metapipe runs` lists them; give e.g. runs/NAME or runs/NAME/001.")
    return run


def _comparable(exp: Experiment) -> dict[str, Any]:
    content = exp.to_dict()
    del content["tracking"]  # where results go changes none of them
    content["model"].pop("folder", None)  # nor where a network's code lies: each job on a cluster unpacks it anew
    content["training"] = {k: v for k, v in content["training"].items() if k not in ELASTIC_KEYS}
    return content
