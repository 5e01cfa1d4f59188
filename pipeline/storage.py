"""Places where files lie: on this machine or a path that all nodes share (`Path`), or in an object store.

What is only read may also lie on a web server (`HttpPath`).

An object store is addressed as `s3://BUCKET/KEY` or `gs://BUCKET/KEY` and reached through `pyarrow.fs`, with the
credentials, region and endpoint of the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
`AWS_ENDPOINT_URL`, …). What is written appears whole or not at all in both.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import pyarrow.fs as pafs
from pydantic import BeforeValidator

from pipeline import http_path
from pipeline.attempts import repeated
from pipeline.errors import ConfigError
from pipeline.files import sync, write_atomically
from pipeline.http_path import HttpPath
from pipeline.ranged_file import RangedFile

SCHEMES = ("s3", "gs")
STORE_ATTEMPTS = 10  # of the store's own client for one request that failed in a way that may pass; ours are around it

Result = TypeVar("Result")


def _address(value: Any) -> Any:
    """For pydantic: what a configuration may say of a place to write. Raises ValueError."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and "://" in value:
        scheme, _, rest = value.partition("://")
        bucket = rest.split("/", 1)[0]
        if scheme in http_path.SCHEMES:
            raise ValueError(f"{scheme}:// can only be read, as task.data; use a path, or {SCHEMES[0]}://BUCKET/KEY")
        if scheme not in SCHEMES:
            raise ValueError(f"{scheme}:// is not known; use a path, or one of {', '.join(f'{s}://' for s in SCHEMES)}")
        if not bucket or "@" in rest or "?" in rest or ":" in bucket:
            raise ValueError(
                f"write it as {scheme}://BUCKET/KEY and nothing else; credentials, region and endpoint come from the "
                "environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …)"
            )
    return value


def _address_to_read(value: Any) -> Any:
    """For pydantic: what a configuration may say of a place that is only read. Raises ValueError."""
    scheme, separator, rest = value.partition("://") if isinstance(value, str) else ("", "", "")
    if not separator or scheme not in http_path.SCHEMES:
        return _address(value)
    if not rest.split("/", 1)[0] or any(sign in rest for sign in "@?#"):
        raise ValueError(
            f"write it as {scheme}://HOST/FOLDER and nothing else; a login is taken from ~/.netrc, proxies and "
            "certificates from HTTPS_PROXY and REQUESTS_CA_BUNDLE"
        )
    return value


Address = Annotated[str, BeforeValidator(_address)]
ReadAddress = Annotated[str, BeforeValidator(_address_to_read)]


class ObjectPath:
    """A place in an object store, with the part of `pathlib.Path` that this package uses.

    Its methods raise FileNotFoundError where nothing is there, and another OSError where the store does not answer
    as it should after several attempts.
    """

    def __init__(self, address: str) -> None:
        self.scheme, _, key = address.partition("://")
        self.key = key.strip("/")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(f"{self.scheme}://{self.key.rpartition('/')[0]}")

    def absolute(self) -> ObjectPath:
        return self

    def exists(self) -> bool:
        return self._kind() != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._kind() == pafs.FileType.Directory

    def is_file(self) -> bool:
        return self._kind() == pafs.FileType.File

    def size(self) -> int:
        info = self._ask(lambda store: store.get_file_info(self.key))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self}: no such object")
        return int(info.size)

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly under it, sorted by name; nothing where there is no such folder."""
        selector = pafs.FileSelector(self.key, allow_not_found=True, recursive=False)
        found = self._ask(lambda store: store.get_file_info(selector))
        names = sorted(info.path.rstrip("/").rsplit("/", 1)[-1] for info in found)
        return iter([self / name for name in names])

    def read_bytes(self) -> bytes:
        def read(store: pafs.FileSystem) -> bytes:
            with store.open_input_stream(self.key) as stream:
                return bytes(stream.read())

        return self._ask(read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """An object appears when its upload is complete, so a reader sees the old content or the new one."""

        def write(store: pafs.FileSystem) -> None:
            stream = store.open_output_stream(self.key)
            stream.write(content)
            stream.close()  # not in a `with`: after a failed write that would publish half of it

        self._ask(write)

    def unlink(self) -> None:
        def delete(store: pafs.FileSystem) -> None:
            with suppress(FileNotFoundError):  # an attempt before this one may have done it
                store.delete_file(self.key)

        self._ask(delete)

    def remove_tree(self) -> None:
        def delete(store: pafs.FileSystem) -> None:
            with suppress(FileNotFoundError):
                store.delete_dir(self.key)

        self._ask(delete)

    def open_input(self) -> ObjectFile:
        """For random access, by pyarrow."""
        return ObjectFile(self)

    def _kind(self) -> pafs.FileType:
        return self._ask(lambda store: store.get_file_info(self.key)).type

    def _ask(self, request: Callable[[pafs.FileSystem], Result]) -> Result:
        """Every request here may be made twice, so one that failed in a way that may pass is made again."""
        return repeated(lambda: request(_store(self.scheme, self.key.split("/", 1)[0])), is_final=_is_final)


class ObjectFile(RangedFile):
    """An object, each read of which is one request.

    The store's own client gives up where a refusal ("slow down") is longer than the bytes that were asked for.
    """

    def __init__(self, place: ObjectPath) -> None:
        self._place = place
        self._file = place._ask(lambda store: store.open_input_file(place.key))
        super().__init__(self._file.size())

    def _range(self, start: int, size: int) -> bytes:
        def read(_: pafs.FileSystem) -> bytes:
            content = self._file.read_at(size, start)
            if len(content) != size:
                raise OSError(f"{self._place}: the store sent {len(content)} bytes of {size} that were asked for")
            return bytes(content)

        return self._place._ask(read)


Location: TypeAlias = Path | ObjectPath
Readable: TypeAlias = Path | ObjectPath | HttpPath  # where what is only read may lie


def location(address: str | Location) -> Location:
    """The place at an address. Raises ConfigError: an unknown scheme, or more in it than a bucket and a key."""
    if not isinstance(address, str):
        return address
    _checked(address, _address)
    return ObjectPath(address) if "://" in address else Path(address)


def readable(address: str | Readable) -> Readable:
    """The place at an address that is only read. Raises ConfigError: see `location`."""
    if not isinstance(address, str):
        return address
    _checked(address, _address_to_read)
    return HttpPath(address) if address.startswith(http_path.PREFIXES) else location(address)


def _checked(address: str, check: Callable[[str], object]) -> None:
    """Raises ConfigError: what `check` finds wrong with it."""
    try:
        check(address)
    except ValueError as error:
        raise ConfigError(f"{address}: {error}.") from None


def absolute(address: str) -> str:
    """The address as another process, in another folder, must be given it."""
    return str(readable(address).absolute())


def write(place: Location, content: str | bytes) -> None:
    """Replace a file: a reader sees the old content or the new one."""
    if isinstance(place, ObjectPath):
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        write_atomically(place, content)


def make_folder(place: Location) -> None:
    """A folder, with those above it. An object store has none."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)


def write_folder(place: Location, files: Mapping[str, bytes]) -> None:
    """Replace a folder of files; it appears whole. In an object store its last file comes last, as the mark of it."""
    if isinstance(place, ObjectPath):
        place.remove_tree()
        for name, content in files.items():
            (place / name).write_bytes(content)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(".partial-*"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    try:
        staging.chmod(0o755)  # mkdtemp makes 0700
        for name, content in files.items():
            (staging / name).write_bytes(content)
            sync(staging / name)
        sync(staging)
        if place.exists():
            shutil.rmtree(place)
        os.rename(staging, place)
        sync(place.parent)  # the rename too survives a power cut
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def remove_folder(place: Location) -> None:
    """Remove a folder and all in it, if it is there."""
    if isinstance(place, ObjectPath):
        place.remove_tree()
    else:
        shutil.rmtree(place, ignore_errors=True)


def copy_folder(source: Path, place: Location, *, last: str | None = None) -> None:
    """Copy a folder of this machine to a place. last: the file to copy last, as the mark that all is there."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    files.sort(key=lambda file: file.relative_to(source).as_posix() == last)
    for file in files:
        target = place / file.relative_to(source).as_posix()
        make_folder(target.parent)
        if isinstance(target, ObjectPath):
            target.write_bytes(file.read_bytes())
        else:
            shutil.copyfile(file, target)


def check_store(address: str, *, key: str) -> None:
    """Raises ConfigError where `address`, given as the configuration's `key`, is in a store that cannot be written."""
    place = location(address)
    if isinstance(place, Path):
        return
    probe = place / f".probe-{os.getpid()}-{time.time_ns()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={address}: cannot be written ({_first_line(error)}). Check that the bucket exists and that "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL are set for it."
        ) from error


@functools.cache
def _store(scheme: str, bucket: str) -> pafs.FileSystem:
    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if region is None:
            region = "us-east-1" if endpoint else pafs.resolve_s3_region(bucket)  # a store of one's own does not mind
        return pafs.S3FileSystem(
            region=region,
            endpoint_override=endpoint,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=STORE_ATTEMPTS),
            connect_timeout=5,
            request_timeout=20,
            background_writes=False,
            allow_delayed_open=True,  # a small object is one request
        )
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]


def _is_final(error: OSError) -> bool:
    """The store's own refusal: asking again changes nothing."""
    return any(word in str(error) for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE"))


def _first_line(error: OSError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
