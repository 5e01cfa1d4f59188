"""A run's folder: its configuration, checkpoints, metrics journal and results; which run a command goes on with.

    RUNS/NAME/001/config.yaml       the experiment, as it was validated
    RUNS/NAME/001/run.json          status, data digest, MLflow run, registered version
    RUNS/NAME/001/checkpoints/      see training/checkpoint.py
    RUNS/NAME/001/metrics.jsonl     one line per outer step and per validation, written by rank 0
    RUNS/NAME/001/evaluation/       results

An unfinished run goes on when the same command is run again; a finished one leads to a new number.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline import config, experiment
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Experiment
from pipeline.files import write_atomically
from pipeline.training.checkpoint import CheckpointStore

RUN_FILE, CONFIG_FILE, JOURNAL_FILE = "run.json", "config.yaml", "metrics.jsonl"


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints")

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def evaluation(self) -> Path:
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
        write_atomically(self.path / RUN_FILE, json.dumps(content, indent=1) + "\n")
        return content

    @property
    def finished(self) -> bool:
        return self.read().get("status") == "finished"

    def experiment(self) -> Experiment:
        """The experiment this run was started with. Raises ConfigError, DataError."""
        path = self.path / CONFIG_FILE
        return experiment.from_dict(config.read_yaml(path), source=str(path))


@contextmanager
def claimed(runs_of_name: Path) -> Iterator[None]:
    """Hold a name's folder (RUNS/NAME) while one of its runs is worked on; the lock goes with the process.

    Raises ConfigError: another process holds it, or the folder cannot be made.
    """
    try:
        runs_of_name.mkdir(parents=True, exist_ok=True)
        stream = (runs_of_name / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{runs_of_name}: cannot be written ({error.strerror}). Set tracking.runs.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{runs_of_name}: another process is training a run of this name. Wait for it, or give this one "
                "another name with --set name=…"
            ) from None
        yield


def runs_of(exp: Experiment) -> Path:
    """The folder of an experiment's runs: RUNS/NAME."""
    return exp.tracking.runs.absolute() / exp.name


def open_run(exp: Experiment, *, data_digest: str, fresh: bool = False) -> tuple[RunFolder, bool]:
    """The folder to train in, and whether it is an unfinished run to go on with.

    fresh: leave an unfinished run as it is and start a new one.

    Raises ConfigError: the last run under this name is unfinished and had another configuration or data set; the
    message lists the keys that differ.
    """
    parent = runs_of(exp)
    last = latest_run(parent)
    if last is not None and not last.finished and not fresh:
        changes = config.differences(_comparable(last.experiment()), _comparable(exp))
        if last.read()["data_digest"] != data_digest:
            changes.append(f"data set digest: {last.read()['data_digest'][:12]} -> {data_digest[:12]}")
        if changes:
            raise ConfigError(
                f"{last.path}: this run is unfinished and was started differently: {'; '.join(changes)}. Go on with "
                "the old values, start anew with --fresh, or choose another name with --set name=…"
            )
        return last, True
    run = RunFolder(parent / f"{last.number + 1 if last else 1:03d}")
    run.path.mkdir(parents=True, exist_ok=True)  # there already if a start was killed before run.json was written
    text = yaml.safe_dump(exp.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(run.path / CONFIG_FILE, text)
    run.update(status="running", name=exp.name, data_digest=data_digest)
    return run, False


def latest_run(parent: Path) -> RunFolder | None:
    """The run with the highest number under `parent` that has been set up completely."""
    numbered = [p for p in parent.glob("*") if p.name.isdigit()] if parent.is_dir() else []
    complete = [p for p in numbered if (p / RUN_FILE).exists()]
    return RunFolder(max(complete, key=lambda p: int(p.name))) if complete else None


def find_run(path: str | Path) -> RunFolder:
    """The run at a folder: a run's own, or the last one under a name's folder. Raises DataError."""
    path = Path(path).absolute()
    if (path / RUN_FILE).exists():
        return RunFolder(path)
    run = latest_run(path)
    if run is None:
        raise DataError(f"{path}: holds no run. `metapipe runs` lists them; give e.g. runs/NAME or runs/NAME/001.")
    return run


def _comparable(exp: Experiment) -> dict[str, Any]:
    content = exp.to_dict()
    del content["tracking"]  # where results go changes none of them
    return content
