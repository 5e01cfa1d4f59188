"""Sweeps on a real Ray cluster with a real MLflow store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline import sweep as sweeps
from pipeline import sweep_workflow
from pipeline.experiment import check_fits
from pipeline.runs import RunFolder
from pipeline.sweep_workflow import Outcome
from pipeline.training import journal
from tests.faults import wait_until
from tests.integration.conftest import images_experiment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]  # each starts Ray several times


def sweep_file(folder: Path, base: dict[str, Any], **settings: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "sweep", "experiment": "base.yaml", "fresh_episodes": 12, **settings}))
    return file


def sinusoid(folder: Path, **training: Any) -> dict[str, Any]:
    return {
        "name": "swept",
        "task": {"family": "sinusoid", "k_shot": 5, "n_query": 5, "eval_k_shot": 5, "eval_n_query": 10},
        "model": {"name": "mlp", "hidden": [16]},
        "algorithm": {"name": "maml", "inner_lr": 0.01},
        "training": {"steps": 20, "meta_batch_size": 4, "validate_every": 5, **training},
        "evaluation": {"validation_episodes": 10, "test_episodes": 10, "promotion_episodes": 10},
        "tracking": {"runs": str(folder / "runs")},
    }


def run(file: Path, said: list[str] | None = None) -> Outcome:
    return sweep_workflow.tune(sweeps.load(file), say=(said if said is not None else []).append)


def nothing_is_left() -> None:
    """On the cluster."""
    import ray
    from ray.util import placement_group_table

    assert [group for group in placement_group_table().values() if group["state"] != "REMOVED"] == []
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], seconds=30)


def test_a_grid_with_asha_and_a_trial_that_fails(
    ray_cluster: None, home: Path, image_data: Path, tmp_path: Path
) -> None:
    base = images_experiment(tmp_path, image_data, steps=36, validate_every=4).to_dict() | {"name": "swept-images"}
    file = sweep_file(
        tmp_path,
        base,
        search={"inner_lr": {"grid": [0.4, 0.003, 1e30]}, "outer_lr": {"grid": [3e-3, 1e-6]}},
        scheduler={"name": "asha", "grace_steps": 4, "reduction_factor": 2},
        max_concurrent=2,
        set={"training.max_nonfinite_steps": 2},  # fewer than to the first rung
    )
    outcome = run(file)
    assert len(outcome.trials) == 6
    statuses = {trial.params["algorithm.inner_lr"]: trial.status for trial in outcome.trials}
    assert statuses[1e30] == "failed", "and the others went on"
    assert any(trial.status == "stopped" and trial.step < 36 for trial in outcome.trials)
    assert outcome.best.status == "finished"
    assert outcome.best.step == 36
    scores = [trial.score for trial in outcome.trials if trial.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert outcome.best.score == scores[0]

    # every trial is a child run with its metrics, each once, and the same data
    client = mlflow.MlflowClient()
    parent = client.get_run(outcome.mlflow_run_id)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{outcome.mlflow_run_id}'")
    assert len(children) == 6
    assert {child.data.tags["data_digest"] for child in children} == {check_fits(sweeps.load(file).base)}
    by_name = {child.info.run_name.rsplit("/", 1)[1]: child for child in children}
    for trial in outcome.trials:
        child = by_name[trial.name]
        assert child.data.params["algorithm.inner_lr"] == str(trial.params["algorithm.inner_lr"])
        assert child.data.tags["sweep.status"] == trial.status
        assert child.info.status == ("FAILED" if trial.status == "failed" else "FINISHED")
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "meta_grad_norm")]
        assert sorted(steps) == [r["step"] for r in journal.read(trial.run.journal) if "meta_grad_norm" in r]
        if trial.status == "failed":
            assert "not finite 2 times in a row" in child.data.tags["sweep.error"]
            assert [a.path for a in client.list_artifacts(child.info.run_id)].count("error.txt") == 1

    # the winner: scored anew on other episodes, registered from its own run
    assert outcome.fresh.mean > 0.5, "chance is 0.25"
    assert parent.data.metrics["best_fresh"] == outcome.fresh.mean
    assert parent.data.tags["sweep.best_trial"] == outcome.best.name
    assert outcome.registration is not None
    version = client.get_model_version("swept-images", outcome.registration.version)
    assert version.run_id == by_name[outcome.best.name].info.run_id
    artifacts = {a.path for a in client.list_artifacts(outcome.mlflow_run_id, "sweep")}
    assert artifacts >= {"sweep/sweep.png", "sweep/trials.parquet", "sweep/trials.csv"}
    folder = Path(str(outcome.folder)) / "evaluation"
    assert pq.read_table(folder / "trials.parquet").num_rows == 6
    assert Image.open(folder / "sweep.png").size[0] > 1000

    nothing_is_left()


def test_killed_and_run_again_keeps_what_was_finished(home: Path, tmp_path: Path) -> None:
    """SIGTERM of the driver, then SIGKILL, its private cluster with it; TPE goes on with what it knew."""
    file = sweep_file(
        tmp_path,
        sinusoid(tmp_path, steps=400, validate_every=20),
        search={"inner_lr": {"log_uniform": [0.001, 0.05]}, "algorithm.adaptation_steps": {"choice": [1, 2]}},
        searcher="optuna",
        trials=3,
        max_concurrent=1,
    )
    command = [sys.executable, "-m", "jobs.tune", str(file), "--json"]
    folder = tmp_path / "runs" / "sweep" / "001"

    def statuses() -> dict[str, str]:
        return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("trials/*/run.json")}

    def part_of_the_second() -> bool:
        running = [name for name, status in statuses().items() if status == "running"]
        return "finished" in statuses().values() and any(
            (RunFolder(folder / "trials" / name).checkpoints.latest() or 0) >= 100 for name in running
        )

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    first = start()
    wait_until(
        lambda: any((RunFolder(folder / "trials" / name).checkpoints.latest() or 0) >= 20 for name in statuses()),
        watch=first,
    )
    first.terminate()
    _, messages = first.communicate(timeout=60)
    assert first.returncode == 143, messages
    assert set(statuses().values()) == {"running"}
    assert mlflow.MlflowClient().get_run(RunFolder(folder).read()["mlflow_run_id"]).info.status == "KILLED"

    second = start()
    wait_until(part_of_the_second, seconds=150, watch=second)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    finished = next(name for name, status in statuses().items() if status == "finished")
    interrupted = next(name for name, status in statuses().items() if status == "running")
    before = (folder / "trials" / finished / "metrics.jsonl").read_bytes()
    kept = (folder / "trials" / interrupted / "metrics.jsonl").read_text().splitlines()[:100]

    again = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["resumed"] is True
    assert len(result["trials"]) == 3
    assert {trial["status"] for trial in result["trials"]} == {"finished"}
    assert {finished, interrupted} <= {trial["trial"] for trial in result["trials"]}
    assert (folder / "trials" / finished / "metrics.jsonl").read_bytes() == before, "not trained again"
    assert (folder / "trials" / interrupted / "metrics.jsonl").read_text().splitlines()[:100] == kept
    client = mlflow.MlflowClient()
    found = client.search_runs(
        [client.get_run(result["mlflow_run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{result['mlflow_run_id']}'",
    )
    assert len(found) == 3
    for child in found:
        history = client.get_metric_history(child.info.run_id, "meta_loss")
        assert sorted(metric.step for metric in history) == list(range(1, 401))


def test_trials_on_several_workers(ray_cluster: None, home: Path, tmp_path: Path) -> None:
    """The workers of a trial that ASHA stops make room for the next one's; one that fails says why."""
    file = sweep_file(
        tmp_path,
        sinusoid(tmp_path),
        search={"outer_lr": {"grid": [1e-2, 1e-9, 1e30]}},
        scheduler={"name": "asha", "grace_steps": 5, "reduction_factor": 3},
        workers_per_trial=2,
        max_concurrent=1,
        set={"training.max_nonfinite_steps": 2},  # fewer than to the first rung
    )
    trials = {trial.name: trial for trial in run(file).trials}
    assert [trials[name].status for name in sorted(trials)] == ["finished", "stopped", "failed"]
    for trial in trials.values():
        assert {record["num_workers"] for record in journal.read(trial.run.journal)} == {2}
    assert "not finite 2 times in a row" in trials["0002"].error
    nothing_is_left()


DYING = """
import os
from torch import nn
def make_net(dies):
    class Net(nn.Linear):
        def forward(self, x):
            if dies:
                os._exit(9)
            return super().forward(x)
    return Net(1, 1)
"""


def test_a_trial_whose_process_dies(ray_cluster: None, home: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    base = sinusoid(tmp_path, max_failures=0)
    base["model"] = {"name": "module", "factory": "dying:make_net", "arguments": {"dies": False}}
    base["model"]["folder"] = str(tmp_path)
    file = sweep_file(tmp_path, base, search={"model.arguments.dies": {"grid": [False, True]}})
    outcome = run(file)
    assert [trial.status for trial in outcome.trials] == ["finished", "failed"]
    assert outcome.trials[1].error
    sweep_run = RunFolder(outcome.folder).read()
    child = mlflow.MlflowClient().get_run(sweep_run["children"][outcome.trials[1].name])
    assert child.info.status == "FAILED"
    assert child.data.tags["sweep.error"] == outcome.trials[1].error


def test_a_population_copies_its_best(ray_cluster: None, home: Path, tmp_path: Path) -> None:
    """Trials with a hopeless rate take over the parameters and, perturbed, the rate of those that do well."""
    file = sweep_file(
        tmp_path,
        sinusoid(tmp_path, steps=80, validate_every=20),
        search={"outer_lr": {"grid": [1e-2, 1e-9]}},
        scheduler={"name": "pbt", "interval_steps": 60, "quantile": 0.5},
        max_concurrent=2,
    )
    outcome = run(file)
    assert {trial.status for trial in outcome.trials} == {"finished"}
    assert {trial.step for trial in outcome.trials} == {80}
    hopeless = next(trial for trial in outcome.trials if trial.name == "0001")
    assert hopeless.run.experiment().training.outer.outer_lr == hopeless.params["training.outer.outer_lr"]
    assert hopeless.score is not None
    rates = [record["outer_lr"] for record in journal.read(hopeless.run.journal) if "outer_lr" in record]
    assert rates[:60] == [1e-9] * 60
    assert min(rates[60:]) > 1e-4


def test_a_population_goes_on_without_one_that_failed(ray_cluster: None, home: Path, tmp_path: Path) -> None:
    file = sweep_file(
        tmp_path,
        sinusoid(tmp_path, steps=80, validate_every=20),
        search={"outer_lr": {"grid": [1e-2, 1e30]}},
        scheduler={"name": "pbt", "interval_steps": 60, "quantile": 0.5},
        max_concurrent=1,  # the good one waits before the other begins
        set={"training.max_nonfinite_steps": 2},
    )
    outcome = run(file)
    assert [(trial.status, trial.step) for trial in outcome.trials] == [("finished", 80), ("failed", 3)]
