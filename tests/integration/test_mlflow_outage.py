"""MLflow's server is down for a while: training goes on, its metrics wait in the journal and arrive once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

from pipeline import experiment as experiments
from pipeline.runs import RunFolder
from pipeline.training import journal
from tests.faults import assert_same_end, run_to_end, wait_until
from tests.integration.conftest import images_experiment
from tests.servers import mlflow_server, process

pytestmark = pytest.mark.integration

STEPS = 600


def test_an_outage_delays_metrics_and_loses_none(tiny_data: Path, tmp_path: Path) -> None:
    port = process.free_port()
    exp = images_experiment(tmp_path, tiny_data, backend="local", num_workers=1, steps=STEPS, validate_every=50)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(exp.to_dict()))
    command = [sys.executable, "-m", "jobs.train", str(tmp_path / "experiment.yaml")]
    run = RunFolder(tmp_path / "runs" / "tiny" / "001")

    def last_step() -> int:
        return max((record["step"] for record in journal.read(run.journal)), default=0)

    said = tmp_path / "said.txt"

    def has_said(words: str) -> bool:
        return words in " ".join(said.read_text().split())

    with said.open("w") as stderr, mlflow_server.running(tmp_path / "server", port=port) as server:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": server.url}
        training = subprocess.Popen(command, env=environment, stderr=stderr)
        wait_until(lambda: last_step() > 20, watch=training)
        training.send_signal(signal.SIGSTOP)  # however long the server takes to end, training is not over by then
    down_at = last_step()
    training.send_signal(signal.SIGCONT)
    wait_until(lambda: last_step() > min(down_at + 100, STEPS - 1), watch=training)
    wait_until(lambda: has_said("MLflow does not answer; training goes on"), watch=training)
    with mlflow_server.running(tmp_path / "server", port=port):
        assert training.wait(timeout=200) == 0, said.read_text()
        assert has_said("MLflow answers again")
        client = mlflow.MlflowClient(server.url, registry_uri=server.url)
        run_id = run.read()["mlflow_run_id"]
        records = journal.read(run.journal)
        for name in ("meta_loss", "outer_lr", "val_accuracy_inductive"):
            delivered = [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
            assert sorted(delivered) == [(r["step"], r[name]) for r in records if name in r], name
        assert client.get_run(run_id).info.status == "FINISHED"
        assert client.get_model_version_by_alias("tiny", "champion").run_id == run_id
    (tmp_path / "undisturbed").mkdir()
    content = exp.to_dict() | {"tracking": {"runs": str(tmp_path / "undisturbed")}}
    assert_same_end(run, run_to_end(experiments.from_dict(content, source="test")))
