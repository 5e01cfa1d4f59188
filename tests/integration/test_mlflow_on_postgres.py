"""The MLflow server that infra/mlflow ships, on a real PostgreSQL, with basic auth on."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

from pipeline import serving, workflow
from pipeline.errors import TrackingError
from tests.conftest import REPOSITORY
from tests.integration.conftest import STEPS, images_experiment
from tests.servers import mlflow_server
from tests.servers.mlflow_server import Account, MlflowServer
from tests.servers.postgres import HOST, USER, Postgres

pytestmark = pytest.mark.integration

SEARCH = "/api/2.0/mlflow/experiments/search"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def status(url: str, account: Account | None = None, content: dict | None = None) -> int:
    """What the server answers to one request."""
    headers = {"Content-Type": "application/json"}
    if account is not None:
        words = base64.b64encode(f"{account.name}:{account.password}".encode()).decode()
        headers["Authorization"] = f"Basic {words}"
    data = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def use(server: MlflowServer, account: Account | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's client is `account`'s."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.env(account).items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(server.url)


def s3_client(object_store: dict[str, str]):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=object_store["AWS_ENDPOINT_URL"],
        region_name=object_store["AWS_REGION"],
        aws_access_key_id=object_store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=object_store["AWS_SECRET_ACCESS_KEY"],
    )


def prepare(server: MlflowServer, admin: Account, user: Account, object_store: dict[str, str]) -> None:
    """What compose runs once."""
    env = {
        **os.environ,
        **object_store,
        **server.env(user),
        "MLFLOW_ADMIN_USERNAME": admin.name,
        "MLFLOW_ADMIN_PASSWORD": admin.password,
        "BUCKET": "metapipe",
    }
    script = REPOSITORY / "infra" / "compose" / "prepare.py"
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert user.password not in done.stdout + done.stderr


def test_nobody_gets_in_without_a_password(mlflow_on_postgres: tuple[MlflowServer, Account]) -> None:
    server, admin = mlflow_on_postgres
    search = {"max_results": 1}
    assert status(f"{server.url}/health") == 200  # for health checks; it says nothing
    assert status(server.url + SEARCH, admin, search) == 200
    for stranger in (
        None,
        Account(admin.name, "not the password"),
        Account("admin", "password1234"),  # what older MLflow versions shipped
        Account(admin.name, "password1234"),
        Account("", ""),
    ):
        assert status(server.url + SEARCH, stranger, search) == 401, stranger
        assert status(f"{server.url}/api/2.0/mlflow/registered-models/search", stranger) == 401, stranger
        assert status(server.url + ARTIFACTS, stranger) == 401, stranger
        assert status(f"{server.url}/", stranger) == 401, stranger


def test_a_user_trains_and_registers(
    mlflow_on_postgres: tuple[MlflowServer, Account],
    postgres_server: Postgres,
    object_store: dict[str, str],
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket and the user are made by compose's `prepare` service."""
    server, admin = mlflow_on_postgres
    user, other = Account("ada"), Account("ben")
    for account in (Account("ada", "her first password"), user):  # the second time, another password
        prepare(server, admin, account, object_store)
    use(server, admin, monkeypatch)
    AuthServiceClient(server.url).create_user(other.name, other.password)
    assert status(f"{server.url}/api/2.0/mlflow/users/get?username=ben", user) == 403  # not an administrator

    use(server, user, monkeypatch)
    exp = images_experiment(tmp_path, image_data, backend="local", num_workers=1)
    exp = exp.model_copy(update={"name": "on-postgres"})
    outcome = workflow.train(exp, say=lambda _: None)
    assert outcome.registration is not None
    assert outcome.registration.decision.promote
    learner = serving.load("models:/on-postgres@champion")
    saved = outcome.run.checkpoints.load_meta(learner.card.checkpoint["step"])
    assert all(torch.equal(learner.state.params[k], v) for k, v in saved.params.items())

    run = f"run_uuid = '{outcome.mlflow_run_id}'"
    rows = postgres_server.query("mlflow", f"select step from metrics where key = 'meta_loss' and {run}")
    assert sorted(step for (step,) in rows) == list(range(1, STEPS + 1))
    versions = postgres_server.query("mlflow", "select version from model_versions where name = 'on-postgres'")
    assert versions == [(1,)]
    pages = s3_client(object_store).list_objects_v2(Bucket="metapipe", Prefix="mlflow/")
    assert any(entry["Key"].endswith(".safetensors") for entry in pages["Contents"])

    # another user reads, and changes nothing
    use(server, other, monkeypatch)
    client = mlflow.MlflowClient(server.url, registry_uri=server.url)
    assert client.get_run(outcome.mlflow_run_id).info.status == "FINISHED"
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_registered_model("on-postgres")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_run(outcome.mlflow_run_id)
    with pytest.raises(TrackingError, match="Permission denied"):
        workflow.register(outcome.run.path)
    assert postgres_server.query("mlflow", "select count(*) from model_versions") == [(1,)]

    # and its owner registers again; an equal model does not replace the champion
    use(server, user, monkeypatch)
    again = workflow.register(outcome.run.path)
    assert (again.version, again.decision.promote) == ("2", False)


def test_a_wrong_password_is_told_before_anything_starts(
    mlflow_on_postgres: tuple[MlflowServer, Account],
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, admin = mlflow_on_postgres
    wrong = Account(admin.name)
    use(server, wrong, monkeypatch)
    with pytest.raises(TrackingError, match="cannot be opened") as told:
        workflow.train(images_experiment(tmp_path, image_data, backend="local", num_workers=1))
    assert wrong.password not in str(told.value)
    assert not (tmp_path / "runs").exists()


def test_no_password_is_in_the_log_or_on_a_command_line(
    mlflow_on_postgres: tuple[MlflowServer, Account], postgres_server: Postgres
) -> None:
    server, admin = mlflow_on_postgres
    secrets = (admin.password, postgres_server.password)
    assert server.log.stat().st_size > 0
    assert not any(secret in server.log.read_text() for secret in secrets)
    lines = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
    assert "mlflow" in lines
    assert not any(secret in lines for secret in secrets)


def test_the_old_default_password_starts_no_server(postgres_server: Postgres, tmp_path: Path) -> None:
    postgres_server.create_database("refused")
    admin = Account("admin", "password1234")
    with (
        pytest.raises(AssertionError, match=r"(?s)ended.*insecure default password"),
        mlflow_server.shipped(tmp_path, postgres=postgres_server, database="refused", admin=admin),
    ):
        pass


def test_postgres_asks_for_its_password_too(postgres_server: Postgres) -> None:
    psycopg2 = pytest.importorskip("psycopg2")
    there = {"host": HOST, "port": postgres_server.port, "user": USER, "dbname": "postgres", "passfile": os.devnull}
    for password in ("", "wrong"):
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(**there, password=password)
