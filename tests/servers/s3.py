"""A real S3 endpoint on this machine (moto), which can be told to fail a share of its requests."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from pipeline import storage

# Every other failure answers 503 before the request was carried out; the rest carry it out and lose the answer.
SERVER = """
import itertools, random, sys
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

control, log = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
backend = DomainDispatcherApplication(create_backend_app)
chance, kinds = random.Random(0), itertools.cycle(["refused", "lost"])

def application(environ, start_response):
    rate = float(control.read_text() or 0)
    if chance.random() >= rate:
        log.write("served\\n")
        return backend(environ, start_response)
    kind = next(kinds)
    log.write(kind + "\\n")
    if kind == "refused":
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
    b"".join(backend(environ, lambda *_: None))
    environ["werkzeug.socket"].shutdown(2)
    raise ConnectionAbortedError

class Quiet(WSGIRequestHandler):
    def log(self, *arguments):
        pass

server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
print(server.port, flush=True)
server.serve_forever()
"""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3(NamedTuple):
    """An endpoint with one bucket."""

    endpoint: str
    bucket: str
    control: Path
    log: Path

    def fail(self, rate: float) -> None:
        """The share of requests to fail from now on."""
        self.control.write_text(str(rate))

    def count(self, kind: str) -> int:
        """Requests so far that were served, refused, or carried out with their answer lost."""
        return self.log.read_text().splitlines().count(kind)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Serve while the block runs, with the environment set for it and a bucket named `bucket`."""
    control, log = folder / "failure-rate", folder / "requests"
    control.write_text("0")
    command = [sys.executable, "-c", SERVER, str(control), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            before = {name: os.environ.get(name) for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL")}
            os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint})
            storage._store.cache_clear()
            request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
            urllib.request.urlopen(request, timeout=30).close()
            try:
                yield S3(endpoint, "bucket", control, log)
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
                storage._store.cache_clear()
        finally:
            process.kill()
    pafs.ensure_s3_initialized()
