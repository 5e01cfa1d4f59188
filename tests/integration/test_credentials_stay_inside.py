"""A password in MLFLOW_TRACKING_URI opens a real server with basic auth, and is found nowhere afterwards."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
import yaml

from jobs import cli
from tests.integration.conftest import images_experiment
from tests.servers import mlflow_server
from tests.servers.mlflow_server import Account, MlflowServer

PASSWORD = "pa/ss:word@with#signs?" + "Zq7Zq7Zq7"  # must be percent-encoded in an address, as a whole
TRACES = (b"Zq7Zq7Zq7", quote(PASSWORD, safe="").encode()[:12])  # of it, plain or encoded


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowServer, Path, Account]]:
    folder = tmp_path_factory.mktemp("mlflow")
    admin = Account(password=PASSWORD)
    with mlflow_server.running(folder, admin=admin) as running:
        yield running, folder, admin


def shown_by(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and all output of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["metapipe", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        logging.captureWarnings(False)
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def holding_it(*folders: Path) -> list[str]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert files
    return [str(file) for file in files if any(trace in file.read_bytes() for trace in TRACES)]


def test_a_password_in_the_tracking_address(
    server: tuple[MlflowServer, Path, Account],
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running, folder, admin = server
    scheme, _, place = running.url.partition("://")
    uri = f"{scheme}://{quote(admin.name)}:{quote(PASSWORD, safe='')}@{place}"
    exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1, steps=4, validate_every=2)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(exp.to_dict()))
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # ours to change, and put back afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    command = [sys.executable, "-m", "jobs.cli", "train", "experiment.yaml", "--json"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert trained.returncode == 0, trained.stderr.decode()
    result = json.loads(trained.stdout)
    assert result["look"] == running.url
    assert result["registered"]["champion"]
    assert json.loads((tmp_path / "runs" / "tiny" / "001" / "run.json").read_text())["mlflow_uri"] == running.url

    outputs = [trained.stdout.decode() + trained.stderr.decode()]
    for changed, arguments, code in (
        (uri, ("runs", "--experiment", "none"), 0),  # it names the server
        (uri, ("adapt", "models:/none@champion", "--support", str(image_data), "--query", "experiment.yaml"), 2),
        (uri.replace("Zq7Zq7Zq7", "Zq8Zq7Zq7"), ("runs",), 2),  # a wrong password
        (uri.replace(place, "127.0.0.1:9"), ("runs",), 2),  # nobody there
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", changed)
        monkeypatch.chdir(tmp_path)
        ended, output = shown_by(capsys, monkeypatch, *arguments)
        assert ended == code, output
        assert (running.url if place in changed else "http://127.0.0.1:9") in output
        outputs.append(output)
    assert [output for output in outputs if any(trace.decode() in output for trace in TRACES)] == []
    assert set(holding_it(tmp_path, folder)) <= {str(folder / "basic_auth.ini")}  # the server's own


def test_a_run_folder_of_before_goes_on_in_its_mlflow_run(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json may hold the address with the password."""
    from pipeline import runs, workflow
    from pipeline.tracking import Tracker

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}?password=Zq7Zq7Zq7")
    tracker = Tracker()
    exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1)
    run, _ = runs.open_run(exp, data_digest="d" * 64)
    run_id = workflow._open_log(exp, run, tracker).run_id
    assert run.read()["mlflow_uri"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    run.update(mlflow_uri=os.environ["MLFLOW_TRACKING_URI"])
    assert workflow._open_log(exp, run, tracker).run_id == run_id
    assert "Zq7" not in (run.path / "run.json").read_text()
