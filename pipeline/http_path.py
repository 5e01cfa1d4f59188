"""Files that a web server has: `http://HOST/PATH`, `https://HOST/PATH`. They are only read, and by ranges of bytes.

Proxies, certificates and logins come from where `requests` looks for them: HTTPS_PROXY, REQUESTS_CA_BUNDLE, ~/.netrc.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

from pipeline.attempts import ATTEMPTS, repeated
from pipeline.ranged_file import RangedFile

SCHEMES = ("http", "https")
PREFIXES = tuple(f"{scheme}://" for scheme in SCHEMES)  # of addresses
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # without a byte
MAY_PASS = (408, 425, 429, 500, 502, 503, 504)  # statuses of which another attempt may know better

_of_thread = threading.local()  # a session is not thread-safe


class _Refused(OSError):
    """The server's own answer; asking again changes nothing."""


class HttpPath:
    """A place on a web server, with the reading part of `pathlib.Path` that this package uses.

    A web server tells no folders: every place may be one. Its methods raise FileNotFoundError where nothing is there,
    PermissionError where the server wants a login, and another OSError where it does not answer as it should after
    several attempts.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"HttpPath({self.address!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HttpPath) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __truediv__(self, name: str) -> HttpPath:
        return HttpPath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]

    @property
    def parent(self) -> HttpPath:
        return HttpPath(self.address.rpartition("/")[0])

    def absolute(self) -> HttpPath:
        return self

    def is_dir(self) -> bool:
        return True

    def exists(self) -> bool:
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        return _Part.of(self.address, 0, 1).total

    def read_bytes(self) -> bytes:
        return repeated(lambda: _get(self.address)[2], is_final=_is_final)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open_input(self) -> HttpFile:
        """For random access, by pyarrow. Raises OSError also where the server does not answer ranges of bytes."""
        return HttpFile(self.address)


class HttpFile(RangedFile):
    """A file on a web server, each read of which is one request. It must stay as it was when it was opened."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._first = _Part.of(address, 0, 1)
        if not self._first.by_range:
            raise _Refused(
                f"{address}: the server does not answer requests for a range of bytes, which shards are read by. Serve "
                "the folder with one that does (nginx, Caddy, Apache, an object store)"
            )
        super().__init__(self._first.total)

    def _range(self, start: int, size: int) -> bytes:
        part = _Part.of(self._address, start, size)
        if (part.total, part.version) != (self._first.total, self._first.version):
            raise _Refused(f"{self._address}: was changed while it is being read")
        return part.content


class _Part:
    """Some bytes of a file, and what the server told of the whole."""

    def __init__(self, content: bytes, *, total: int, version: str, by_range: bool) -> None:
        self.content = content
        self.total = total
        self.version = version
        self.by_range = by_range

    @classmethod
    def of(cls, address: str, start: int, size: int) -> _Part:
        return repeated(lambda: cls._ask(address, start, size), is_final=_is_final)

    @classmethod
    def _ask(cls, address: str, start: int, size: int) -> _Part:
        status, headers, content = _get(address, range_of=(start, size))
        version = headers.get("ETag", "") or headers.get("Last-Modified", "")
        told = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
        if status == 416 and told:  # nothing at this place: the file is shorter
            return cls(b"", total=int(told[1]), version=version, by_range=True)
        if status == 206 and told:
            if len(content) != min(size, int(told[1]) - start):
                raise OSError(f"{address}: the server sent {len(content)} bytes of {size} that were asked for")
            return cls(content, total=int(told[1]), version=version, by_range=True)
        length = headers.get("Content-Length", "")
        if status != 200 or not length.isdigit():
            raise _Refused(f"{address}: the server does not tell how long it is (status {status})")
        return cls(b"", total=int(length), version=version, by_range=False)


def _get(address: str, range_of: tuple[int, int] | None = None) -> tuple[int, Mapping[str, str], bytes]:
    """One request, without another attempt: status, headers, content. Raises OSError.

    Where a range was asked for and the server would send all, the content is left there.
    """
    import requests  # here: it takes a while, and most commands need none

    if not hasattr(_of_thread, "session"):
        _of_thread.session = requests.Session()
    headers = {"Accept-Encoding": "identity"}  # a range is one of the file, not of its compression
    if range_of is not None:
        headers["Range"] = f"bytes={range_of[0]}-{sum(range_of) - 1}"
    try:
        with _of_thread.session.get(
            address, headers=headers, timeout=(CONNECT_SECONDS, SILENT_SECONDS), stream=True
        ) as response:
            status = response.status_code
            wanted = status == 206 or (status == 200 and range_of is None)
            content = response.content if wanted else b""
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise _Refused(f"{address}: not an address ({error})") from None
    except requests.exceptions.RequestException as error:
        raise OSError(f"{address}: the server did not answer, or not to the end ({error})") from error
    if status in (200, 206) or (status == 416 and range_of is not None):
        return status, response.headers, content
    if status in (404, 410):
        raise FileNotFoundError(f"{address}: the server has no such file (status {status})")
    if status in (401, 403):
        raise PermissionError(f"{address}: the server refuses it (status {status}); a login is taken from ~/.netrc")
    if status in MAY_PASS:
        raise OSError(f"{address}: the server answered with status {status}, {ATTEMPTS} times")
    raise _Refused(f"{address}: the server answered with status {status}")


def _is_final(error: OSError) -> bool:
    return isinstance(error, _Refused)
