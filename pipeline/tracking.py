"""MLflow: runs, metrics, data sets, the model registry. One process writes: the driver.

The store is the one at MLFLOW_TRACKING_URI, by default `mlflow.db` (sqlite) in the current folder with artifacts
in `mlartifacts` beside it. A password in that address is used and never shown or stored.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read once, while mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's own 7 take four minutes to give up

import mlflow
import mlflow.pyfunc
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

import pipeline
from pipeline.config import flatten
from pipeline.credentials import login_in, redacted, without_credentials
from pipeline.errors import TrackingError, UserError
from pipeline.experiment import Experiment
from pipeline.learner import Learner, ModelCard, write_model
from pipeline.promotion import Decision
from pipeline.serving import ARTIFACT, signature
from pipeline.types import MetaState

CANDIDATE, CHAMPION = "candidate", "champion"
REACH_SECONDS = 5  # to wait for a tracking server's first answer
BATCH_METRICS = 1000  # MLflow's limit for one log_batch
BATCH_PARAMS = 100
DIGEST_LENGTH = 36  # MLflow's limit for a data set's digest; the whole one is a tag
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow answers either, by store and by thing
REQUIREMENTS = ("mlflow", "torch", "numpy", "pydantic", "safetensors", "pillow", "pyarrow", "pyyaml")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or sqlite in the current folder.

    Raises TrackingError: the variable is missing in a job on a Ray cluster, whose current folder is thrown away.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # how Ray marks a job's process
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set for this job: set it where `metapipe submit` is run, or in the environment "
            "of the cluster's nodes."
        )
    return given or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turns whatever MLflow raises into a TrackingError that says what could not be done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {without_credentials(tracking_uri())}: cannot {what} ({_short(error)}). Nothing trained is "
            "lost: once it answers, run the same command again."
        ) from error


class Tracker:
    """A tracking store that answers. Raises TrackingError where it does not."""

    def __init__(self) -> None:
        _hand_over_login()
        address = tracking_uri()  # a database's may hold a password
        self.uri = without_credentials(address)  # to show, to store, to compare
        _check_reachable(address)
        try:
            self.client = mlflow.MlflowClient(address, address)
            self.client.search_experiments(max_results=1)
            mlflow.set_tracking_uri(address)  # for what has no client: models and artifacts
            mlflow.set_registry_uri(address)
        except Exception as error:
            raise TrackingError(
                f"MLFLOW_TRACKING_URI={self.uri}: the tracking store cannot be opened ({_short(error)}). Start a "
                "server with `mlflow server`, or unset the variable to use sqlite in the current folder."
            ) from error

    @property
    def hint(self) -> str:
        """How to look at the results."""
        if self.uri.startswith("sqlite"):
            return f"mlflow ui --backend-store-uri {self.uri}"
        return self.uri

    # runs

    def start(
        self,
        experiment: Experiment,
        *,
        run_name: str,
        data_digest: str,
        run_id: str | None,
        parent: str | None = None,
    ) -> RunLog:
        """A new run (a child of the run `parent`), or `run_id`'s gone on with if this store has it.

        Raises TrackingError.
        """
        with _telling("start a run"):
            if run_id is not None and self._has(run_id):
                self.client.update_run(run_id, status="RUNNING")
                return RunLog(self, run_id, resumed=True)
            experiment_id = self._experiment_id(experiment.tracking.experiment)
            tags = _origin_tags() | ({"mlflow.parentRunId": parent} if parent else {})
            run = self.client.create_run(experiment_id, run_name=run_name, tags=tags)
        log = RunLog(self, run.info.run_id, resumed=False)
        log.describe(experiment, data_digest)
        return log

    def _has(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in MISSING:
                return False  # the store was replaced
            raise

    def _experiment_id(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None
        if self.uri.startswith("sqlite:///"):  # else it would be ./mlruns of whoever comes first
            location = (Path(self.uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    def runs(self, experiment_name: str, limit: int) -> list[mlflow.entities.Run]:
        """The latest runs of an experiment, newest first (none if there is no such experiment)."""
        found = self.client.get_experiment_by_name(experiment_name)
        if found is None:
            return []
        return list(self.client.search_runs([found.experiment_id], max_results=limit, order_by=["start_time DESC"]))

    # registry

    def fetch_model(self, uri: str) -> Path:
        """The learner's folder of a registered model. Raises TrackingError: no such model, version or alias."""
        try:
            local = mlflow.artifacts.download_artifacts(artifact_uri=uri)
        except Exception as error:
            names = ", ".join(sorted(model.name for model in self.client.search_registered_models())) or "none"
            raise TrackingError(
                f"{uri}: no such model in {self.uri} ({_short(error)}). Registered models: {names}. Write it as "
                "models:/NAME@champion or models:/NAME/VERSION."
            ) from error
        folder = Path(local) / "artifacts" / ARTIFACT
        if not folder.is_dir():
            raise TrackingError(f"{uri}: was not registered by this package (it has no artifacts/{ARTIFACT}).")
        return folder

    @_telling("ask for the champion")
    def champion(self, name: str) -> tuple[str, Learner] | None:
        """The present champion's version and learner."""
        # by search: asked for the alias of a model that isn't there, a server with basic auth answers 403
        found = self.client.search_registered_models(filter_string=f"name = '{name}'", max_results=1)
        if not found or CHAMPION not in found[0].aliases:
            return None
        version = found[0].aliases[CHAMPION]
        return str(version), Learner.from_folder(self.fetch_model(f"models:/{name}@{CHAMPION}"))

    @_telling("register the model")
    def register(self, run_id: str, card: ModelCard, state: MetaState, tags: dict[str, str]) -> ModelVersion:
        """Log the model to its run and register it as a new version with the alias `candidate`."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / ARTIFACT
            write_model(folder, card, state)
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("served_model.py")),
                    artifacts={ARTIFACT: str(folder)},
                    code_paths=_code_paths(card),
                    signature=signature(card),
                    pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
                )
        try:
            self.client.create_registered_model(card.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(card.name, info.model_uri, run_id, tags=tags, model_id=info.model_id)
        self.client.set_registered_model_alias(card.name, CANDIDATE, str(version.version))
        return version

    @_telling("record the promotion")
    def record(self, name: str, version: str, decision: Decision) -> None:
        """Tag the version with the decision and, where it was promoted, give it the alias `champion`."""
        for key, value in decision.tags().items():
            self.client.set_model_version_tag(name, version, key, value)
        if decision.promote:
            self.client.set_registered_model_alias(name, CHAMPION, version)


def param_name(key: str) -> str:
    """A dotted key as MLflow takes it: of `sets[0].name` it refuses the brackets."""
    return key.replace("[", ".").replace("]", "")


class RunLog:
    """One MLflow run that this process writes."""

    def __init__(self, tracker: Tracker, run_id: str, *, resumed: bool) -> None:
        self.run_id = run_id
        self._client = tracker.client
        self._resumed = resumed

    @_telling("log the configuration")
    def describe(self, experiment: Experiment, data_digest: str) -> None:
        """The full configuration as parameters and as a file, and the data set as an input."""
        content = experiment.to_dict()
        params = [Param(param_name(key), str(value)) for key, value in flatten(content).items()]
        for start in range(0, len(params), BATCH_PARAMS):
            self._client.log_batch(self.run_id, params=params[start : start + BATCH_PARAMS])
        self._client.log_dict(self.run_id, content, "experiment.json")
        folder = content["task"].get("data", content["task"]["family"])
        dataset = MetaDataset(  # type: ignore[abstract]
            LocalArtifactDatasetSource(folder), name=Path(folder).name, digest=data_digest[:DIGEST_LENGTH]
        )
        self._client.log_inputs(
            self.run_id,
            datasets=[DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "meta-training")])],
        )
        self.tags({"data_digest": data_digest})

    @_telling("read metrics")
    def last_step(self) -> int:
        """The last step whose metrics have arrived; −1 where none have."""
        metrics = self._client.get_run(self.run_id).data._metric_objs
        return max((m.step for m in metrics if not m.key.startswith("system/")), default=-1)

    @_telling("log metrics")
    def metrics(self, records: Sequence[dict[str, Any]]) -> None:
        """Journal records: {"step": …, "time": milliseconds, name: value, …}.

        A step is cut in two only where it has more than MLflow takes at once.
        """
        batch: list[Metric] = []
        for record in records:
            values = {k: v for k, v in record.items() if k not in ("step", "time")}
            if len(batch) + len(values) > BATCH_METRICS:
                self._client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += [Metric(k, float(v), record["time"], record["step"]) for k, v in values.items()]
            while len(batch) > BATCH_METRICS:
                self._client.log_batch(self.run_id, metrics=batch[:BATCH_METRICS])
                batch = batch[BATCH_METRICS:]
        if batch:
            self._client.log_batch(self.run_id, metrics=batch)

    def summary(self, values: dict[str, float], *, step: int) -> None:
        """Results of the whole run, at its last step."""
        self.metrics([{"step": step, "time": int(time.time() * 1000), **values}])

    @_telling("log tags")
    def tags(self, tags: dict[str, str]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    @_telling("log artifacts")
    def artifacts(self, folder: Path, into: str) -> None:
        """Every file of a folder, under `into`."""
        self._client.log_artifacts(self.run_id, str(folder), into)

    @_telling("log text")
    def text(self, text: str, file: str) -> None:
        """A text as an artifact."""
        self._client.log_text(self.run_id, text, file)

    @_telling("end the run")
    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """CPU, memory, disk and network of this machine, sampled in the background while the block runs."""
        monitor = SystemMetricsMonitor(self.run_id, resume_logging=self._resumed)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


def _code_paths(card: ModelCard) -> list[str]:
    """This package, and a user's own network, so that the model loads where neither is installed."""
    paths = [Path(pipeline.__file__).parent]
    network = card.model.code_path() if hasattr(card.model, "code_path") else None
    if network is not None:
        paths.append(network)
    return [str(path) for path in paths]


def _hand_over_login() -> None:
    """Move the user and password of an http address to where MLflow looks for them, for this process and its children.

    So MLflow itself never has an address that it could print, log or store with the password in it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    login = login_in(given) if given.startswith(("http://", "https://")) else None
    if login is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login
        os.environ["MLFLOW_TRACKING_URI"] = without_credentials(given)


def _check_reachable(uri: str) -> None:
    """Ask a server once: MLflow's own client would retry for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; what it allows will show
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={uri}: no MLflow server answers there ({getattr(error, 'reason', error)}). Start one "
            "with `mlflow server`, or unset the variable to use sqlite in the current folder."
        ) from error


def _origin_tags() -> dict[str, str]:
    """Where the code came from."""
    tags = {"metapipe.version": pipeline.__version__}
    here = Path(pipeline.__file__).parent
    for key, command in (
        ("mlflow.source.git.commit", ["git", "rev-parse", "HEAD"]),
        ("git.changes", ["git", "status", "--porcelain", "--untracked-files=no"]),
    ):
        try:
            answer = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return tags  # not a checkout
        tags[key] = answer.stdout.strip() if "commit" in key else str(bool(answer.stdout.strip())).lower()
    return tags


def _short(error: Exception) -> str:
    """The first line of a message, without passwords in its addresses; MLflow's carry pages."""
    lines = redacted(str(error).strip()).splitlines()  # before it is cut: half an address is not recognized
    return lines[0][:200] if lines else type(error).__name__
