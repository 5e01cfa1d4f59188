"""A real PostgreSQL with a data folder, a port and a password of its own; loopback only."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import process

USER = "metapipe"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Postgres:
    """A server that answers."""

    port: int
    password: str = field(repr=False)

    def uri(self, database: str) -> str:
        """SQLAlchemy's address of one of its databases, password and all."""
        return f"postgresql+psycopg2://{USER}:{self.password}@{HOST}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """A new empty database; its address."""
        with _connected(self) as cursor:
            cursor.execute(f'CREATE DATABASE "{name}"')
        return self.uri(name)

    def query(self, database: str, statement: str) -> list[tuple]:
        """The rows that a statement answers with."""
        with _connected(self, database) as cursor:
            cursor.execute(statement)
            return cursor.fetchall()


def find() -> Path | None:
    """The folder of `initdb` and `postgres`: the PATH's, else Debian's newest. None: there is no PostgreSQL here."""
    on_path = shutil.which("postgres")
    folders = [] if on_path is None else [Path(on_path).resolve().parent]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda f: _number(f.parent.name), reverse=True)
    complete = (f for f in folders if (f / "initdb").is_file() and (f / "postgres").is_file())
    return next(complete, None)


def why_not() -> str | None:
    """Why no PostgreSQL can be started here; None where one can. A reason to skip."""
    if find() is None:
        return "no PostgreSQL here: neither `initdb` and `postgres` on the PATH nor Debian's package postgresql"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody` to run it as"
    return None


@contextmanager
def running() -> Iterator[Postgres]:
    """A new, empty server, until the block ends. Only where `why_not()` is None."""
    programs = find()
    assert programs is not None, why_not()
    user = _other_user() if os.geteuid() == 0 else None
    # pytest's own folders are closed to other users, so the data lies in a folder of its own
    with tempfile.TemporaryDirectory(prefix="metapipe-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        server = Postgres(process.free_port(), secrets.token_hex(16))
        (folder / "password").write_text(server.password)
        (folder / "password").chmod(0o600)
        if user is not None:
            os.chown(folder, user, -1)
            os.chown(folder / "password", user, -1)
        _initialize(programs, folder, user)
        command = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(server.port)]
        # no socket file, and no fsync: the data is thrown away
        for setting in (f"listen_addresses={HOST}", "unix_socket_directories=", "fsync=off", "max_connections=50"):
            command += ["-c", setting]
        with process.running(
            command,
            answers=lambda: _answers(server),
            log=folder / "server.log",
            user=user,
            stop=signal.SIGINT,  # "fast": ends open connections
        ):
            yield server


def _initialize(programs: Path, folder: Path, user: int | None) -> None:
    command = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync"]
    command += ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    if user is None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    else:
        group = pwd.getpwuid(user).pw_gid
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, user=user, group=group, extra_groups=[]
        )
    assert done.returncode == 0, done.stdout + done.stderr


def _other_user() -> int | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    return None


@contextmanager
def _connected(server: Postgres, database: str = "postgres") -> Iterator:
    import psycopg2

    connection = psycopg2.connect(
        host=HOST, port=server.port, user=USER, password=server.password, dbname=database, connect_timeout=5
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def _answers(server: Postgres) -> bool:
    import psycopg2

    try:
        with _connected(server):
            return True
    except psycopg2.OperationalError:
        return False


def _number(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return 0
