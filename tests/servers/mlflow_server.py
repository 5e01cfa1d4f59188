"""A real `mlflow server`."""

from __future__ import annotations

import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import process


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
    server = MlflowServer(f"http://{host}:{port}", folder / "server.log")
    command = [*prefix, str(Path(sys.executable).with_name("mlflow")), "server", "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", artifacts or str(folder / "artifacts")]
    settings = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # mlflow looks for uvicorn there
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # by the environment, since everyone on a machine sees its processes' arguments
        "MLFLOW_BACKEND_STORE_URI": backend_store or f"sqlite:///{folder / 'mlflow.db'}",
    }
    if admin is not None:
        users = auth_database or f"sqlite:///{folder / 'users.db'}"
        config = folder / "basic_auth.ini"
        config.touch(mode=0o600)
        config.write_text(f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {users.replace('%', '%%')}\n")
        command += ["--app-name", "basic-auth"]
        settings |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_USERNAME": admin.name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": admin.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }
    with process.running(
        command, answers=lambda: _answers(f"{server.url}/health"), log=server.log, env={**settings, **(env or {})}
    ):
        yield server


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
