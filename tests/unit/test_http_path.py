"""Files on a web server: read by ranges, repeatedly where that helps, with errors that say what to do."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import attempts, http_path, storage
from pipeline.errors import ConfigError
from pipeline.http_path import HttpPath
from tests.servers.web import WebServer, serving

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.001)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.bin").write_bytes(CONTENT)
    (tmp_path / "folder" / "empty").write_bytes(b"")
    with serving(tmp_path) as server:
        yield server


def test_it_reads_what_is_there(server: WebServer) -> None:
    folder = HttpPath(f"{server.address}/folder/")
    file = folder / "file.bin"
    assert (str(file), file.name, file.parent) == (f"{server.address}/folder/file.bin", "file.bin", folder)
    assert file.read_bytes() == CONTENT
    assert (file.exists(), (folder / "other").exists()) == (True, False)
    assert (file.size(), (folder / "empty").size()) == (len(CONTENT), 0)
    with pytest.raises(FileNotFoundError, match="folder/other: the server has no such file"):
        (folder / "other").read_bytes()


def test_random_access_is_a_request_for_a_range(server: WebServer) -> None:
    with HttpPath(f"{server.address}/folder/file.bin").open_input() as file:
        before = len(server.requests)
        file.seek(-6, 2)
        assert file.read(100) == CONTENT[-6:]
        assert file.read(5) == b""
        file.seek(1000)
        assert file.read(24) == CONTENT[1000:1024]
        assert file.tell() == 1024
        assert server.requests[before:] == [f"/folder/file.bin bytes={span}" for span in ("10234-10239", "1000-1023")]
        file.seek(0)
        assert file.read() == CONTENT
    with HttpPath(f"{server.address}/folder/empty").open_input() as file:
        assert file.read() == b""


@pytest.mark.parametrize("failure", [503, 429, "cut", "drop"])
def test_what_may_pass_is_tried_again(server: WebServer, failure: str | int) -> None:
    server.fail = lambda number, path: failure if number % 2 == 0 else None
    file = HttpPath(f"{server.address}/folder/file.bin")
    assert file.read_bytes() == CONTENT
    with file.open_input() as stream:
        assert stream.read() == CONTENT
    server.fail = lambda number, path: failure
    before = len(server.requests)
    with pytest.raises(OSError, match=r"folder/file\.bin"):
        file.read_bytes()
    assert len(server.requests) - before == attempts.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (403, PermissionError, "the server refuses it"),
        (404, FileNotFoundError, "no such"),
        (400, OSError, "status 400"),
    ],
)
def test_what_will_not_pass_is_asked_once(server: WebServer, status: int, error: type[OSError], words: str) -> None:
    server.fail = lambda number, path: status
    with pytest.raises(error, match=words):
        HttpPath(f"{server.address}/folder/file.bin").open_input()
    assert len(server.requests) == 1


def test_a_silent_server_and_none(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_path, "SILENT_SECONDS", 0.05)
    released = threading.Event()
    server.fail = lambda number, path: 500 if released.wait(5) else None
    with pytest.raises(OSError, match="timed out"):
        HttpPath(f"{server.address}/folder/file.bin").read_bytes()
    assert len(server.requests) == attempts.ATTEMPTS
    released.set()
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        HttpPath("http://127.0.0.1:9/data").exists()


def test_a_server_without_ranges_is_told(server: WebServer) -> None:
    server.ranges = False
    file = HttpPath(f"{server.address}/folder/file.bin")
    assert file.size() == len(CONTENT)
    with pytest.raises(OSError, match="does not answer requests for a range of bytes"):
        file.open_input()


def test_a_file_that_changes_is_told(server: WebServer) -> None:
    with HttpPath(f"{server.address}/folder/file.bin").open_input() as file:
        assert file.read(10) == CONTENT[:10]
        (server.folder / "folder" / "file.bin").write_bytes(CONTENT[::-1])
        with pytest.raises(OSError, match="changed while it is being read"):
            file.read(10)


@pytest.mark.parametrize("address", ["https://me:secret@host/data", "https://host/data?key=1", "https:///data"])
def test_addresses_are_a_host_and_a_folder(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST/FOLDER"):
        storage.readable(address)


def test_web_servers_are_only_read() -> None:
    assert storage.readable("https://host/data") == HttpPath("https://host/data")
    assert storage.absolute("https://host/data/") == "https://host/data"
    with pytest.raises(ConfigError, match="can only be read"):
        storage.location("https://host/data")
