"""A static file server on this machine that answers ranges of bytes, and can be told to fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """The files below `folder`."""

    folder: Path
    address: str = ""
    ranges: bool = True  # False: as servers that know no ranges answer
    fail: Callable[[int, str], str | int | None] = lambda number, path: None
    # of a request's number and path: a status, "cut" (half of the answer), "drop" (none); None: as it should
    requests: list[str] = field(default_factory=list)  # the method and path of each, and its range


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """A server of its own, until the block ends."""
    server = WebServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = len(server.requests)
            server.requests.append(f"{self.path} {self.headers.get('Range', '')}".strip())
            failure = server.fail(number, self.path)
            if failure == "drop":
                self.close_connection = True
                return
            if isinstance(failure, int):
                self._answer(failure, b"")
                return
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self._answer(404, b"")
                return
            content = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not asked or not server.ranges:
                self._answer(200, content, cut=failure == "cut")
                return
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            told = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", "ETag": str(file.stat().st_mtime_ns)}
            self._answer(206, content[start:end], told, cut=failure == "cut")

        def _answer(
            self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that no longer waits for its answer

    with Server(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
