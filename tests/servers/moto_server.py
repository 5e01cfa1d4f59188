"""A real S3 endpoint: moto as a server of its own."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import process


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """An endpoint on loopback without buckets, until the block ends; what the environment of its clients needs."""
    port = process.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "--host", "127.0.0.1", "--port", str(port)]
    with process.running(command, answers=lambda: _answers(endpoint), log=folder / "moto.log"):
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
