"""A real S3 endpoint on this machine (moto), which can be told to fail a share of its requests."""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from tests.servers import process

# A failure answers 503 before the request was carried out, or carries it out and loses the answer, or half of it.
SERVER = """
import itertools, random, sys
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

control, log = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
backend = DomainDispatcherApplication(create_backend_app)
chance, kinds = random.Random(0), itertools.cycle(["refused", "lost", "half"])

def application(environ, start_response):
    rate = float(control.read_text() or 0)
    if chance.random() >= rate:
        log.write("served\\n")
        yield from backend(environ, start_response)
        return
    kind = next(kinds)
    log.write(kind + "\\n")
    if kind == "refused":
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        yield b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
        return
    begin = start_response if kind == "half" else lambda *_: None
    content = b"".join(backend(environ, begin))
    if kind == "half":
        yield content[: len(content) // 2]
    environ["werkzeug.socket"].shutdown(2)
    raise ConnectionAbortedError

class Quiet(WSGIRequestHandler):
    def log(self, *arguments):
        pass

server = make_server("127.0.0.1", int(sys.argv[3]), application, threaded=True, request_handler=Quiet)
server.serve_forever()
"""


class S3(NamedTuple):
    """An endpoint on loopback, with no bucket yet."""

    endpoint: str
    control: Path
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def fail(self, rate: float) -> None:
        """The share of requests to fail from now on."""
        self.control.write_text(str(rate))

    def count(self, kind: str) -> int:
        """Requests so far that were served, refused, or carried out with their answer or the half of it lost."""
        return self.log.read_text().splitlines().count(kind)


@contextmanager
def running(folder: Path) -> Iterator[S3]:
    """A server of its own, until the block ends."""
    port = process.free_port()
    server = S3(f"http://127.0.0.1:{port}", folder / "failure-rate", folder / "requests")
    server.control.write_text("0")
    command = [sys.executable, "-c", SERVER, str(server.control), str(server.log), str(port)]
    with process.running(
        command, answers=lambda: process.responds(f"{server.endpoint}/moto-api/"), log=folder / "moto.log"
    ):
        yield server


@contextmanager
def as_our_own(server: S3) -> Iterator[None]:
    """This process's environment, and that of those it starts, set for the server."""
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    storage._store.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        storage._store.cache_clear()
