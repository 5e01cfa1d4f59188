"""Prepare, train on Ray, evaluate, register, adapt: with real Ray, MLflow, Parquet and HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import launch, runs, serving, workflow
from pipeline.errors import DataError, TrackingError, TrainingStopped
from pipeline.experiment import check_fits
from pipeline.tasks import shards
from pipeline.training import journal
from pipeline.workflow import Outcome
from tests.integration.conftest import STEPS, images_experiment
from tests.servers import mlflow_server, process

pytestmark = pytest.mark.integration

CHAMPION = "models:/tiny@champion"


def test_the_run_is_in_mlflow_with_every_step(trained: Outcome, image_data: Path) -> None:
    client = mlflow.MlflowClient()
    run = client.get_run(trained.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == str(STEPS)
    assert run.data.params["algorithm.inner_lr"] == "0.4"
    digest = shards.read_manifest(image_data).digest
    assert run.data.tags["data_digest"] == digest
    if (Path(__file__).resolve().parents[2] / ".git").exists():
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert [d.dataset.digest for d in run.inputs.dataset_inputs] == [digest[:36]]
    for metric in ("meta_loss", "train_accuracy", "outer_lr", "tasks_per_second"):
        history = client.get_metric_history(trained.mlflow_run_id, metric)
        assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(1, STEPS + 1)), metric
    validations = client.get_metric_history(trained.mlflow_run_id, "val_accuracy_inductive")
    assert sorted(m.step for m in validations) == [STEPS // 2, STEPS]
    files = {f.path for f in client.list_artifacts(trained.mlflow_run_id, "evaluation")}
    wanted = (
        *("test.json", "test.parquet", "curves.png", "adaptation.png", "episodes.png"),
        *("movement.json", "movement.png"),
        *("classes.json", "classes.png", "confusions.png", "groups.png"),
    )
    assert files == {f"evaluation/{name}" for name in wanted}


def test_results_are_kept_per_episode(trained: Outcome, image_data: Path) -> None:
    table = pq.read_table(trained.run.evaluation / "test.parquet").to_pandas()
    assert len(table) == 12 * 2 * 3  # episodes, modes, adaptation steps 0…2
    final = table[(table["mode"] == "inductive") & (table["adaptation_step"] == 2)]["accuracy"]
    summary = json.loads((trained.run.evaluation / "test.json").read_text())
    assert summary["inductive"][2]["mean"] == pytest.approx(final.mean())
    assert summary["inductive"][2]["ci95"] == pytest.approx(1.959964 * final.std() / np.sqrt(12))
    assert summary["data_digest"] == shards.read_manifest(image_data).digest
    assert summary["split"] == "meta_test"


def test_ray_and_plain_processes_train_the_same_parameters(trained: Outcome, tmp_path: Path, image_data: Path) -> None:
    """Two workers each; bit-identical."""
    exp = images_experiment(tmp_path, image_data, backend="processes")
    run, _ = runs.open_run(exp, data_digest=check_fits(exp))
    launch.run_workers(exp, run)
    ours, theirs = (r.checkpoints.load_meta(STEPS).params for r in (trained.run, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_first_version_is_champion_and_an_equal_one_stays_candidate(trained: Outcome) -> None:
    assert trained.registration is not None
    assert trained.registration.decision.promote
    client = mlflow.MlflowClient()
    first = client.get_model_version_by_alias("tiny", "champion")
    assert first.tags["promotion.decision"] == "promoted"
    assert first.tags["promotion.reason"] == "there was no champion"

    again = workflow.register(trained.run.path)
    assert not again.decision.promote
    assert str(client.get_model_version_by_alias("tiny", "champion").version) == str(first.version)
    second = client.get_model_version_by_alias("tiny", "candidate")
    assert str(second.version) == again.version != str(first.version)
    assert second.tags["promotion.decision"] == "not promoted"
    assert float(second.tags["promotion.difference"]) == 0  # the same model on the same episodes
    assert second.tags["data_digest"] == first.tags["data_digest"]


def test_a_finished_run_is_followed_by_a_new_one(trained: Outcome, home: Path, image_data: Path) -> None:
    exp = images_experiment(home, image_data)
    run, resumed = runs.open_run(exp, data_digest=check_fits(exp))
    assert (run.path.name, resumed) == ("002", False)


def test_registered_model_loads_with_pickle_disallowed(trained: Outcome, image_data: Path) -> None:
    """In a fresh process, as README shows it."""
    program = f"""
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("{CHAMPION}")
x = np.random.default_rng(0).random((6, 1, 28, 28), dtype=np.float32)
answer = model.predict({{"support_x": x, "support_y": np.array([7, 7, 3, 3, 5, 5]), "query_x": x[:2]}})
assert answer.shape == (2, 3) and np.allclose(answer.sum(1), 1, atol=1e-5), answer
alone = model.predict({{"support_x": x, "support_y": np.array([7, 7, 3, 3, 5, 5]), "query_x": x[:1]}})
assert np.allclose(alone, answer[:1], atol=1e-5)
params = {{"adaptation_steps": 0, "normalization": "transductive"}}
other = model.predict({{"support_x": x, "support_y": np.array([7, 7, 3, 3, 5, 5]), "query_x": x[:2]}}, params=params)
assert not np.allclose(other, answer)
"""
    env = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=CHAMPION))
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert kinds <= {"", ".py", ".cpp", ".json", ".yaml", ".txt", ".safetensors"}


def test_adapting_to_picture_files(trained: Outcome, pictures: tuple[Path, Path]) -> None:
    support, query = pictures
    adapted = serving.load(CHAMPION).adapt_folder(support)
    assert adapted.labels == ["kind0", "kind1", "kind2"]  # fewer than the four it was trained for
    files = sorted(query.iterdir())
    probabilities = adapted.predict_pictures(files)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert [adapted.labels[row.argmax()] for row in probabilities] == [file.stem for file in files]


def test_what_cannot_be_adapted_to_is_refused(trained: Outcome, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    learner = serving.load(CHAMPION)
    x = np.zeros((5, 1, 28, 28), dtype=np.float32)
    with pytest.raises(DataError, match="5 classes, but tiny was trained for 4-way"):
        learner.adapt(x, [0, 1, 2, 3, 4])
    with pytest.raises(DataError, match="one class only"):
        learner.adapt(x, [1] * 5)
    with pytest.raises(DataError, match=r"expected an array \[N, 1, 28, 28\]"):
        learner.adapt(x[..., :20], [0, 1, 0, 1, 0])
    with pytest.raises(DataError, match="NaN"):
        learner.adapt(x * np.nan, [0, 1, 0, 1, 0])
    with pytest.raises(DataError, match="4 entries for 5 examples"):
        learner.adapt(x, [0, 1, 0, 1])
    (tmp_path / "one" / "kind").mkdir(parents=True)
    (tmp_path / "one" / "kind" / "a.png").write_bytes((pictures[0] / "kind0" / "a.png").read_bytes())
    with pytest.raises(DataError, match="one class only"):
        learner.adapt_folder(tmp_path / "one")
    (tmp_path / "one" / "other").mkdir()
    (tmp_path / "one" / "other" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"b\.png: not a picture"):
        learner.adapt_folder(tmp_path / "one")
    for uri in ("models:/tiny@nobody", "models:/nothing@champion", "models:/tiny/99", "nonsense"):
        with pytest.raises(TrackingError, match="no such model"):
            serving.load(uri)


def test_evaluation_of_a_registered_model_with_baselines(trained: Outcome, image_data: Path) -> None:
    result = workflow.evaluate_model(serving.load(CHAMPION), data=image_data, episodes=12, baselines=True)
    torch.testing.assert_close(result.evaluation.scores, trained.test.scores)  # the same fixed episodes
    names = [comparison.name for comparison in result.comparisons]
    assert names == ["same network, untrained, adapted", "nearest neighbour on pixels"]
    nearest = result.comparisons[1]
    assert nearest.score.mean > 0.9  # the tiny classes are patterns under noise
    difference = trained.test.score("inductive").mean - nearest.score.mean
    assert nearest.advantage.mean == pytest.approx(difference)


def test_served_over_http(trained: Outcome, home: Path, image_data: Path) -> None:
    """`mlflow models serve`, and adapt-and-predict with one POST."""
    port = process.free_port()
    mlflow_command = str(mlflow_server.BIN / "mlflow")
    command = [mlflow_command, "models", "serve", "-m", CHAMPION, "--env-manager", "local", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"

    def post(content: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    x = np.random.default_rng(1).random((6, 1, 28, 28), dtype=np.float32)
    inputs = {"support_x": x.tolist(), "support_y": [0, 0, 1, 1, 2, 2], "query_x": x[:2].tolist()}
    env = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    env["PATH"] = f"{mlflow_server.BIN}{os.pathsep}{env['PATH']}"  # mlflow looks for uvicorn there
    log = home / "serve.log"
    with process.running(command, answers=lambda: process.responds(f"{url}/ping"), log=log, env=env):
        status, answer = post({"inputs": inputs})
        assert status == 200, answer
        expected = serving.load(CHAMPION).adapt(x, [0, 0, 1, 1, 2, 2]).predict(x[:2])
        np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)
        _, alone = post({"inputs": {**inputs, "query_x": x[:1].tolist()}})
        np.testing.assert_allclose(alone["predictions"], expected[:1], atol=1e-5)
        _, unadapted = post({"inputs": inputs, "params": {"adaptation_steps": 0}})
        assert not np.allclose(unadapted["predictions"], expected)
        status, answer = post({"inputs": {**inputs, "support_y": [0, 1, 2, 3, 4, 5]}})
        assert status == 400
        assert "6 classes, but tiny was trained for 4-way" in answer["message"]


def test_a_real_mlflow_server(image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, artifacts and the registry over HTTP."""
    with mlflow_server.running(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            outcome = workflow.train(exp, say=lambda _: None)
        assert printed.getvalue() == ""  # standard output is for results
        assert outcome.registration is not None
        assert outcome.registration.decision.promote
        learner = serving.load(CHAMPION)
        saved = outcome.run.checkpoints.load_meta(learner.card.checkpoint["step"])
        assert all(torch.equal(learner.state.params[k], v) for k, v in saved.params.items())
        client = mlflow.MlflowClient(server.url, registry_uri=server.url)
        assert len(client.get_metric_history(outcome.mlflow_run_id, "meta_loss")) == STEPS


def test_an_unreachable_server_is_told_before_anything_starts(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(TrackingError, match="no MLflow server answers"):
        workflow.train(images_experiment(tmp_path, image_data))
    assert time.monotonic() - began < 30
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://somewhere")
    with pytest.raises(TrackingError, match="foo://somewhere"):
        workflow.train(images_experiment(tmp_path, image_data))


def test_training_refuses_a_damaged_data_set(tiny_data_set, tmp_path: Path) -> None:
    data = tiny_data_set(classes=24, per_class=8, size=28)
    shard = data / "shards" / "00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.parquet is damaged"):
        workflow.train(images_experiment(tmp_path, data))
    assert not (tmp_path / "runs").exists()


def test_killed_and_run_again_goes_on_in_the_same_mlflow_run(home: Path, image_data: Path, tmp_path: Path) -> None:
    """SIGKILL of `metapipe train`; the same command again; every step's metrics once."""
    import yaml

    exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1, steps=80, validate_every=10)
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump({**exp.to_dict(), "name": "killed"}))
    command = [sys.executable, "-m", "jobs.train", str(config), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = runs.RunFolder(tmp_path / "runs" / "killed" / "001")
    deadline = time.monotonic() + 120
    while (run.checkpoints.latest() or 0) < 30:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not run.finished
    run_id = run.read()["mlflow_run_id"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["resumed"]
    assert result["mlflow_run_id"] == run_id
    history = mlflow.MlflowClient().get_metric_history(run_id, "meta_loss")
    assert sorted(m.step for m in history) == list(range(1, 81))
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("backend", "number"), [("local", signal.SIGTERM), ("processes", signal.SIGINT)])
def test_an_interrupt_ends_everything_and_says_how_to_go_on(
    backend: str, number: int, home: Path, image_data: Path, tmp_path: Path
) -> None:
    """A signal to the whole process group, as Ctrl-C sends it."""
    import yaml

    workers = 1 if backend == "local" else 2
    exp = images_experiment(tmp_path, image_data, backend=backend, num_workers=workers, steps=100_000)
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump(exp.to_dict()))
    command = [sys.executable, "-m", "jobs.train", str(config)]
    training = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    run = runs.RunFolder(tmp_path / "runs" / "tiny" / "001")
    deadline = time.monotonic() + 120
    while run.checkpoints.latest() is None:
        assert training.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(training.pid, number)
    _, errors = training.communicate(timeout=60)
    assert training.returncode == 128 + number, errors
    assert "goes on from its last checkpoint" in " ".join(errors.split())
    assert "Traceback" not in errors
    steps = [record["step"] for record in journal.read(run.journal)]
    assert steps == list(range(1, (run.checkpoints.latest() or 0) + 1)), "nothing that was trained is lost"
    assert mlflow.MlflowClient().get_run(run.read()["mlflow_run_id"]).info.status == "KILLED"


def test_a_run_that_stops_early_keeps_its_metrics(home: Path, image_data: Path, tmp_path: Path) -> None:
    exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1, max_nonfinite_steps=3)
    exp = exp.model_copy(update={"algorithm": exp.algorithm.model_copy(update={"inner_lr": 1e30})})
    with pytest.raises(TrainingStopped, match="not finite 3 times in a row"):
        workflow.train(exp, say=lambda _: None)
    run_id = runs.RunFolder(tmp_path / "runs" / "tiny" / "001").read()["mlflow_run_id"]
    client = mlflow.MlflowClient()
    assert [m.value for m in client.get_metric_history(run_id, "skipped_steps")] == [1, 2, 3]
    assert client.get_run(run_id).info.status == "FAILED"


def test_classes_that_were_trained_on_are_not_tested_on(trained: Outcome, image_data: Path, tmp_path: Path) -> None:
    """The same pictures under another class split."""
    manifest = shards.read_manifest(image_data)
    names = [entry.name for entry in manifest.classes]
    other = {name: manifest.classes[i - 1].splits["random"] for i, name in enumerate(names)}
    with shards.ShardReader(image_data, manifest) as reader:
        classes = [shards.ClassExamples(e.name, e.group, reader.read_class(i)) for i, e in enumerate(manifest.classes)]
    preprocessing = manifest.preprocessing
    shards.write(tmp_path / "other", classes, splits={"random": other}, source={}, preprocessing=preprocessing)
    learner = serving.load(CHAMPION)
    with pytest.raises(DataError, match="was trained on 8 of the 8 meta_test classes"):
        workflow.evaluate_model(learner, data=tmp_path / "other", episodes=4)
    assert not workflow.evaluate_model(
        learner, data=tmp_path / "other", part="meta_train", episodes=4
    ).trained_on_this_data


def test_a_users_own_network_in_the_current_folder(home: Path, image_data: Path, tmp_path: Path) -> None:
    """From the console script, and served by a process that has neither the file nor its folder on its path."""
    import yaml

    source = """
from torch import nn
def net(width):
    return nn.Sequential(nn.Conv2d(1, width, 3, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(49 * width, 4))
"""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "my_nets_of_a_test.py").write_text(source)
    exp = images_experiment(tmp_path, image_data, backend="processes", steps=4, validate_every=2).to_dict()
    exp["model"] = {"name": "module", "factory": "my_nets_of_a_test:net", "arguments": {"width": 4}}
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump({**exp, "name": "own-network"}))
    command = [str(Path(sys.executable).with_name("metapipe")), "train", str(config), "--json"]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tasks go through the network" in done.stderr  # by loop or by vmap: what was chosen is said
    assert json.loads(done.stdout)["registered"]["champion"]
    program = """
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/own-network@champion")
x = np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32)
inputs = {"support_x": x, "support_y": np.arange(4), "query_x": x}
assert (model.predict(inputs) == model.predict(inputs)).all()
from pipeline import serving
serving.load("models:/own-network@champion").adapt(x, [0, 1, 2, 3])
"""
    (tmp_path / "work" / "my_nets_of_a_test.py").rename(tmp_path / "gone.py")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registering_a_run_with_another_tracking_store(
    trained: Outcome, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = Path(shutil.copytree(trained.run.path, tmp_path / "tiny" / "001"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    registration = workflow.register(copy)
    assert (registration.version, registration.decision.promote) == ("1", True)
    run_id = runs.RunFolder(copy).read()["mlflow_run_id"]
    assert run_id != trained.mlflow_run_id
    history = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'other.db'}").get_metric_history(run_id, "meta_loss")
    assert sorted(m.step for m in history) == list(range(1, STEPS + 1))
