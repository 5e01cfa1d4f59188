"""Whether what a job needs is where the nodes of a cluster can use it; checked from outside, before it is submitted."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import http_path, initial, storage
from pipeline.config import flatten
from pipeline.errors import ConfigError, TrackingError
from pipeline.experiment import Experiment
from pipeline.job_environment import refuse_password
from pipeline.tasks.shards import MANIFEST

ANSWER_SECONDS = 5
ONLY_THERE = "If only the cluster's nodes can reach it, say --no-check."


def check_storage(experiment: Experiment) -> list[str]:
    """Whether data and runs are where the cluster's nodes can use them; remarks for the user.

    A job's current folder is a copy of the project without data, thrown away with the cluster. So they lie in an
    object store, or under an absolute path of storage that every node sees.

    Raises ConfigError: a relative path, or an address with a password in it.
    """
    content = flatten(experiment.to_dict())
    for key, value in content.items():
        refuse_password(key, str(value))
    remarks = []
    for key, place in {**_data(experiment), "tracking.runs": content["tracking.runs"]}.items():
        if "://" in place:
            continue
        if not Path(place).is_absolute():
            name = Path(place).name
            raise ConfigError(
                f"{key}={place}: on the cluster a relative path would be in the job's own copy of the project, which "
                "has no data and is thrown away. Give an object store, or an absolute path that every node sees: "
                f"--set {key}=s3://BUCKET/{name} or --set {key}=/SHARED/{name}"
            )
        remarks.append(f"{key}={place}: every node has to see it under this path")
    return remarks


def network_files(experiment: Experiment, project: Path) -> list[Path]:
    """The files of a user's own network that have to travel: its module, or its package's modules.

    Raises ConfigError: its folder is given as an absolute path in the project, or a relative one that leads out of it.
    """
    content = flatten(experiment.to_dict())
    if "model.factory" not in content:
        return []
    folder, name = Path(content["model.folder"]), content["model.factory"].partition(":")[0].partition(".")[0]
    here = (project / folder).resolve()
    found = [file for file in (here / f"{name}.py", *sorted((here / name).rglob("*.py"))) if file.is_file()]
    if not found:
        return []  # installed, here and on the cluster's nodes
    inside = here.is_relative_to(project.resolve())
    if folder.is_absolute() and not inside:
        return []  # on storage that every node sees, like data
    if folder.is_absolute() or not inside:
        told = (
            f"--set model.folder={here.relative_to(project.resolve())}" if inside else "submit from a folder above it"
        )
        raise ConfigError(
            f"model.folder={folder}: a network travels with the job where its folder lies in the project ({project}) "
            f"and is given relative to it: {told}."
        )
    return [project / file.relative_to(project.resolve()) for file in found]


def starting_files(experiment: Experiment, project: Path) -> list[Path]:
    """The files with weights or words' vectors that have to travel: those that are given by a relative path.

    Raises ConfigError: one that lies outside the project, or is no file, such as a run's folder, which does not travel.
    """
    content = flatten(experiment.to_dict())
    given = {key: content.get(key) for key in ("training.init_from", "model.vectors")}
    if getattr(experiment.model, "in_a_file", False):
        given["model.weights"] = content["model.weights"]
    found = []
    for key, place in given.items():
        if not place or "://" in place or place.startswith(initial.IN_A_REGISTRY) or Path(place).is_absolute():
            continue
        file = (project / place).resolve()
        if not file.is_file() or not file.is_relative_to(project.resolve()):
            is_folder = "a folder, which does not travel with the job" if file.is_dir() else "no file of this folder"
            other = ", a registered model (models:/NAME@champion)" if key == "training.init_from" else ""
            raise ConfigError(
                f"{key}={place}: it is {is_folder}. Give a file in the current folder, which travels{other}, an object "
                "store, or an absolute path that the head sees."
            )
        found.append(project / place)
    return found


def driver_resources(experiment: Experiment) -> dict[str, int]:
    """CPUs and GPUs of the process that runs the command: Ray keeps only those of its own workers free for a job."""
    training = experiment.training
    if training.backend == "ray":
        return {}
    workers = training.min_workers
    return {"cpus": workers * training.cpus_per_worker, "gpus": workers if training.use_gpu else 0}


def check_addresses(environment: Mapping[str, str], *, same_files: bool, same_network: bool) -> None:
    """Whether the addresses in a job's environment mean on the cluster what they mean here.

    same_files, same_network: whether the head has this machine's files, and its loopback.

    Raises TrackingError: a loopback address or a database in a file, where the head is not this machine.
    """
    for name, value in environment.items():
        here = None if same_network else _loopback_host(value)
        if here is not None:
            raise TrackingError(
                f"{name}={value}: {here} is this machine here, and on each of the cluster's nodes that node itself. "
                "Give an address that the nodes reach (and have the server listen on it), or unset it here and set it "
                "in the environment of the nodes."
            )
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if uri and urlsplit(uri).scheme in ("", "file", "sqlite") and not uri.startswith("databricks"):
        file = uri.removeprefix("sqlite:///")
        if not (same_files and uri.startswith("sqlite:///") and Path(file).is_absolute()):
            raise TrackingError(
                f"MLFLOW_TRACKING_URI={uri}: a file on this machine, which the cluster does not have. Start a server "
                "that its nodes reach (`mlflow server`, see infra/README.md) and give its http address."
            )


def check_data_servers(experiment: Experiment, *, same_network: bool) -> None:
    """Whether the data sets' web servers are on the cluster what they are here; same_network as in `check_addresses`.

    Raises ConfigError: a loopback address, where the head is not this machine.
    """
    for key, place in _data(experiment).items():
        here = _loopback_host(place) if place.startswith(http_path.PREFIXES) and not same_network else None
        if here is not None:
            raise ConfigError(
                f"{key}={place}: {here} is this machine here, and on each of the cluster's nodes that node itself, "
                "which has no such server. Give an address that the nodes reach (and have the server listen on it), "
                f"or an object store: --set {key}=s3://BUCKET/{place.rstrip('/').rsplit('/', 1)[-1]}"
            )


def check_stores(experiment: Experiment) -> None:
    """Whether data and runs in an object store are there and can be written, asked from here with this environment.

    Raises ConfigError.
    """
    content = flatten(experiment.to_dict())
    try:
        storage.check_store(content["tracking.runs"], key="tracking.runs")
    except ConfigError as error:
        raise ConfigError(f"{error} {ONLY_THERE}") from error
    for key, place in _data(experiment).items():
        data = storage.readable(place)
        if isinstance(data, Path):
            continue
        try:
            missing = not (data / MANIFEST).exists()
        except OSError as error:
            raise ConfigError(f"{key}={data}: it cannot be asked ({error}). {ONLY_THERE}") from error
        if missing:
            raise ConfigError(f"{key}={data}: no such data set (it has no {MANIFEST}). {ONLY_THERE}")


def _data(experiment: Experiment) -> dict[str, str]:
    """Key -> the data set it names: none for procedural tasks, several for a mixture."""
    task = experiment.to_dict()["task"]
    sections = {"task": task} | {f"task.sets[{i}].task": part["task"] for i, part in enumerate(task.get("sets", []))}
    return {f"{key}.data": section["data"] for key, section in sections.items() if "data" in section}


def check_answers(environment: Mapping[str, str]) -> None:
    """Whether the tracking server answers, asked from here. Raises TrackingError."""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(http_path.PREFIXES):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers; what it allows will show
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={uri}: no MLflow server answers there ({getattr(error, 'reason', error)}). Start it, "
            f"or unset the variable if the cluster's nodes have their own. {ONLY_THERE}"
        ) from error


def _loopback_host(address: str) -> str | None:
    """The host of an address, where that is whichever machine asks; None: it is another, or there is none."""
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:
        return None
    if host == "localhost" or host.endswith(".localhost"):
        return host
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return None
    return host if number.is_loopback or number.is_unspecified else None
