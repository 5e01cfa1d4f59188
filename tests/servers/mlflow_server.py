"""A real `mlflow server`, and what this process tells MLflow."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import process
from tests.servers.postgres import HOST, USER, Postgres

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@contextmanager
def as_it_was() -> Iterator[None]:
    """What the block tells MLflow, in the environment and in this process, ends with it.

    A command that is run in this process keeps its server's address and login; `set_tracking_uri(None)` even deletes
    the variable.
    """
    import mlflow

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            del os.environ[name]
        os.environ.update(before)


@dataclass(frozen=True)
class Account:
    """A user of a server with basic auth. MLflow refuses passwords shorter than 12 characters."""

    name: str = "metapipe-admin"
    password: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


@dataclass(frozen=True)
class MlflowServer:
    """A server that answers."""

    url: str
    log: Path

    def env(self, account: Account | None = None) -> dict[str, str]:
        """What a client's environment needs to use it."""
        env = {"MLFLOW_TRACKING_URI": self.url}
        if account is not None:
            env |= {"MLFLOW_TRACKING_USERNAME": account.name, "MLFLOW_TRACKING_PASSWORD": account.password}
        return env


@contextmanager
def running(
    folder: Path,
    *,
    backend_store: str | None = None,
    artifacts: str | None = None,
    admin: Account | None = None,
    auth_database: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[MlflowServer]:
    """A server until the block ends; its files lie in `folder`, which may be one that an earlier server left.

    backend_store: a database's address, e.g. `Postgres.create_database("mlflow")`; sqlite in `folder` otherwise.
    artifacts: an address (`s3://…`, with the endpoint and keys in `env`); a folder in `folder` otherwise.
    admin: turns basic auth on; `auth_database` is the address of a database for its users, sqlite otherwise.
    prefix: words before the command, such as `ip netns exec NAME` to start it in another network namespace (then
    give a `port`: one that is free there).
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or process.free_port(host)
    command = [*prefix, str(BIN / "mlflow"), "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # by the environment, since everyone on a machine sees its processes' arguments
        "MLFLOW_BACKEND_STORE_URI": backend_store or f"sqlite:///{folder / 'mlflow.db'}",
    }
    if admin is not None:
        users = auth_database or f"sqlite:///{folder / 'users.db'}"
        config = folder / "basic_auth.ini"
        config.touch(mode=0o600)
        # as the server's own, but a password is hashed once, not for each of hundreds of requests
        lines = (
            "default_permission = READ",
            f"database_uri = {users.replace('%', '%%')}",
            "auth_cache_ttl_seconds = 60",
        )
        config.write_text("\n".join(("[mlflow]", *lines, "")))
        command += ["--app-name", "basic-auth"]
        settings |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), **_secrets(admin)}
    with _answering(f"http://{host}:{port}", command, folder / "server.log", {**settings, **(env or {})}) as server:
        yield server


@contextmanager
def shipped(
    folder: Path, *, postgres: Postgres, database: str, admin: Account, env: Mapping[str, str] | None = None
) -> Iterator[MlflowServer]:
    """`infra/mlflow/serve.sh` as it is shipped, on an existing, own database; artifacts lie in `folder`.

    `env` overrides its settings; an S3 store, for example.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = process.free_port()
    settings = {
        "PGHOST": HOST,
        "PGPORT": str(postgres.port),
        "PGDATABASE": database,
        "PGUSER": USER,
        "PGPASSWORD": postgres.password,
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_PORT": str(port),
        **_secrets(admin),
        **(env or {}),
        "MLFLOW_WORKERS": "1",
    }
    command = [str(REPOSITORY / "infra" / "mlflow" / "serve.sh")]
    with _answering(f"http://127.0.0.1:{port}", command, folder / "server.log", settings) as server:
        yield server


def _secrets(admin: Account) -> dict[str, str]:
    return {
        "MLFLOW_AUTH_ADMIN_USERNAME": admin.name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": admin.password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


@contextmanager
def _answering(url: str, command: list[str], log: Path, settings: Mapping[str, str]) -> Iterator[MlflowServer]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PG"))}
    env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # mlflow looks for uvicorn there
    with process.running(command, answers=lambda: process.responds(f"{url}/health"), log=log, env={**env, **settings}):
        yield MlflowServer(url, log)
