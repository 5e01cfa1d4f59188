"""Every algorithm of the registry in MLflow: registered from a run, loaded by its address, adapted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest

from pipeline import serving
from pipeline.learner import Learner, write_model
from pipeline.tracking import RunLog, Tracker
from tests.contract.entries import OTHER_MODALITIES, Case, card, observed, plain, raw
from tests.servers import mlflow_server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tracker, RunLog]]:
    """A store of their own and a run for all of them."""
    store = tmp_path_factory.mktemp("registered") / "mlflow.db"
    with mlflow_server.as_it_was():
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
        tracker = Tracker()
        folder = store.with_name("artifacts").as_uri()
        run = tracker.client.create_run(tracker.client.create_experiment("contract", artifact_location=folder))
        yield tracker, RunLog(tracker, run.info.run_id, resumed=False)


@pytest.mark.parametrize("parameter", plain())
def test_registered_and_adapted(
    parameter: tuple,
    log: tuple[Tracker, RunLog],
    tiny_data: Path,
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A version of its own, which answers as the learner in a folder does: in Python, and as MLflow serves it."""
    tracker, run = log
    case = Case(*parameter, tiny_data)
    state = observed(case)
    version = tracker.register(run.run_id, card(case), state, {"algorithm": case.name})
    address = f"models:/{version.name}/{version.version}"
    write_model(tmp_path, card(case), state)

    x, y, query = (part[0].numpy() for part in case.batch[:3])
    expected = Learner.from_folder(tmp_path).adapt(x, y).predict(query)
    learner = serving.load(address)
    assert learner.card.algorithm == case.experiment.algorithm
    np.testing.assert_array_equal(learner.adapt(x, y).predict(query), expected)
    monkeypatch.setattr(sys, "path", [*sys.path])  # MLflow adds the model's code
    served = mlflow.pyfunc.load_model(address).predict({"support_x": x, "support_y": y, "query_x": query})
    np.testing.assert_array_equal(served, expected)


@pytest.mark.parametrize("problem", OTHER_MODALITIES)
def test_texts_and_rows_by_mlflows_signature(
    problem: str,
    log: tuple[Tracker, RunLog],
    tiny_sets: dict[str, Path],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strings, and numbers with NaN where one is missing: what a learner takes, MLflow's pyfunc takes too."""
    tracker, run = log
    case = Case("protonet", {}, problem, tiny_sets)
    version = tracker.register(run.run_id, card(case), case.state, {"algorithm": case.name})
    address = f"models:/{version.name}/{version.version}"
    support, query = raw(case)
    labels = case.batch.support_y[0].numpy()
    expected = serving.load(address).adapt(support, labels).predict(query)
    monkeypatch.setattr(sys, "path", [*sys.path])  # MLflow adds the model's code
    model = mlflow.pyfunc.load_model(address)
    served = model.predict({"support_x": np.array(support), "support_y": labels, "query_x": np.array(query)})
    np.testing.assert_array_equal(served, expected)
