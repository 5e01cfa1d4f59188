"""Jobs on a Ray cluster, from outside it: submit, list, follow, stop, over the job server's HTTP interface."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.errors import ClusterError, ConfigError, TrainingStopped
from pipeline.job_environment import refuse_password
from pipeline.packing import Package

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PROGRAM = "python -m jobs.cli"  # in the job's folder, with the `python` of the head's PATH
CONNECT_SECONDS = 5
ANSWER_SECONDS = 120  # an upload of 500 MiB is answered once it is stored
CHECK_SECONDS = 10  # of silence in the logs, then the head is asked how the job is
LOST_SECONDS = 60  # that the head may not answer while a job is followed
STOP_SECONDS = 60  # that a job may take to write its last checkpoint, after SIGTERM and before SIGKILL
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's default is 3


def server_address(given: str | None, surroundings: Mapping[str, str] = os.environ) -> str:
    """The job server's address: the one given, else RAY_API_SERVER_ADDRESS or RAY_ADDRESS where that is http.

    Raises ConfigError: none, or one that is not http.
    """
    candidates = [surroundings.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    address = given or next((a for a in candidates if a.startswith(("http://", "https://"))), None)
    if not address:
        raise ConfigError("--address: which cluster? Give its job server, e.g. http://HEAD:8265, or set RAY_ADDRESS.")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"--address {address}: is not the address of a job server. That is Ray's dashboard on the head node, "
            "e.g. http://HEAD:8265."
        )
    refuse_password("--address", address)
    return address.rstrip("/")


class Job(NamedTuple):
    """One job that was submitted to the cluster."""

    id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    command: str
    message: str
    started: float | None  # seconds since 1970
    seconds: float | None  # up to its end, or until now
    driver_exit_code: int | None

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def exit_code(self) -> int | None:
        """What the command would have exited with here: its own code; 3 where it was stopped; None while it runs."""
        if not self.ended:
            return None
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return TrainingStopped.exit_code
        code = self.driver_exit_code or 1  # none: it never started, or its node was lost
        return 128 - code if code < 0 else code

    @classmethod
    def of(cls, details: JobDetails) -> Job:
        started = details.start_time / 1000 if details.start_time else None
        until = details.end_time / 1000 if details.end_time else time.time()
        return cls(
            id=details.submission_id or "",
            status=str(details.status),
            command=details.entrypoint.removeprefix(f"{PROGRAM} "),
            message=details.message or "",
            started=started,
            seconds=max(0.0, until - started) if started else None,
            driver_exit_code=details.driver_exit_code,
        )


class Cluster:
    """A Ray cluster's job server that answers, and takes this environment's token."""

    def __init__(self, address: str) -> None:
        """Raises ClusterError: nothing answers there within seconds, it is no job server, or the token is refused."""
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise Ray leaves the token at home
        self.address = address
        with self._telling():
            self._client = _client(address)
            answer = self._client._do_request("GET", "/api/version").json()
        self._session = str(answer.get("session_name", ""))

    # where it is

    @property
    def shares_files(self) -> bool:
        """Whether the head's files are this machine's: its session's folder is here."""
        from ray._common.utils import get_default_ray_temp_dir

        return bool(self._session) and (Path(get_default_ray_temp_dir()) / self._session).is_dir()

    @property
    def shares_network(self) -> bool:
        """Whether the head is this machine. A loopback address alone may be the end of a tunnel to it."""
        return self.shares_files and is_own_address(urlsplit(self.address).hostname or "")

    # jobs

    def submit(
        self,
        words: Sequence[str],
        package: Package,
        environment: Mapping[str, str],
        *,
        cpus: int = 0,
        gpus: int = 0,
    ) -> str:
        """Run `metapipe WORDS` there; the job's id. cpus, gpus: what the command itself needs, besides its workers."""
        with self._telling():
            return self._client.submit_job(
                entrypoint=f"{PROGRAM} {shlex.join(words)}",
                runtime_env={
                    "working_dir": str(package.file),
                    "env_vars": {GRACE_VARIABLE: str(STOP_SECONDS), **environment},
                },
                entrypoint_num_cpus=cpus or None,
                entrypoint_num_gpus=gpus or None,
            )

    def jobs(self) -> list[Job]:
        """Every submitted job the cluster remembers, newest first."""
        with self._telling():
            found = [Job.of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def job(self, job_id: str) -> Job:
        """Raises ClusterError: there is no such job."""
        with self._telling(job_id):
            return Job.of(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that the job has printed so far. Raises ClusterError: there is no such job."""
        self.job(job_id)
        with self._telling(job_id):
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> Job:
        """End a job and wait for its end: SIGTERM, and SIGKILL a minute later. Raises ClusterError."""
        with self._telling(job_id):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + STOP_SECONDS + CHECK_SECONDS
        while not (job := self.job(job_id)).ended and time.monotonic() < deadline:
            time.sleep(0.5)
        return job

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Give `write` what the job prints, from its start until it ends; connections may break in between.

        A job that does not start soon is given a line that says what it may be waiting for.

        Raises ClusterError: there is no such job, or the head has not answered for a minute.
        """
        self.job(job_id)
        return asyncio.run(self._follow(job_id, write))

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        from aiohttp import ClientError  # Ray's client speaks through it

        log = Once(write)
        waiting: set[str] = set()

        def silence() -> None:
            job = self._still(job_id)
            if job.status == "PENDING" and job.message not in waiting:
                waiting.add(job.message)
                write(f"{job.message}\n")

        while True:
            log.begin()
            with suppress(RuntimeError, OSError, ClientError):  # the connection broke
                tail = self._client.tail_job_logs(job_id)
                while (chunk := await _next(tail, silence)) is not None:
                    log.take(chunk)
            job = self._still(job_id)
            if job.ended:
                return job
            await asyncio.sleep(1)

    def _still(self, job_id: str) -> Job:
        """The job, from a head that may be away for a while."""
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return self.job(job_id)
            except ClusterError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{self.address}: has not answered for {LOST_SECONDS} s ({error}). The job {job_id} may be "
                        f"going on; look again with: {look_again(self.address, job_id)}"
                    ) from error
                time.sleep(2)

    @contextmanager
    def _telling(self, job_id: str | None = None) -> Iterator[None]:
        """Turns what Ray's client raises into a ClusterError that says what to do."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            wrong = "Forbidden" in str(error)
            raise ClusterError(
                f"{self.address}: the cluster "
                + ("refuses this token. " if wrong else "asks for a token, and none was found here. ")
                + "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it; it is "
                "the one that the head was started with."
            ) from error
        except OSError as error:  # requests' and aiohttp's as well
            raise ClusterError(
                f"{self.address}: no Ray job server answers there. It is the dashboard of the head node (port 8265), "
                "started with --dashboard-host=0.0.0.0 or reached through a tunnel to it."
            ) from error
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            if job_id and "404" in text:
                raise ClusterError(
                    f"{job_id}: there is no such job at {self.address}. `metapipe jobs list` names them."
                ) from error
            raise ClusterError(f"{self.address}: the job server did not do as asked ({text[:300]}).") from error


class Once:
    """Passes a text on once, though each new connection tells it from its start."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen = 0  # characters, on this connection
        self._written = 0

    def begin(self) -> None:
        """A new connection."""
        self._seen = 0

    def take(self, chunk: str) -> None:
        self._seen += len(chunk)
        new = self._seen - self._written
        if new > 0:
            self._write(chunk[-new:])
            self._written = self._seen


async def _next(tail: Any, silence: Callable[[], None]) -> str | None:
    """The next piece of the logs; None at their end. `silence` is called now and then while nothing comes."""
    coming = asyncio.ensure_future(anext(tail, None))
    while not (await asyncio.wait({coming}, timeout=CHECK_SECONDS))[0]:
        silence()
    return coming.result()


def look_again(address: str, job_id: str) -> str:
    """The command that shows a job's logs."""
    return f"metapipe jobs logs {job_id} --follow --address {address}"


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            # Ray's own has no limit: a head behind a firewall would be waited for for minutes
            return super()._do_request(*args, **{"timeout": (CONNECT_SECONDS, ANSWER_SECONDS), **kwargs})

    logging.getLogger("ray.dashboard").propagate = False  # says what it uploads, and when a connection closes
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the environment would override the argument
    try:
        return Client(address)
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def is_own_address(host: str) -> bool:
    """Whether a host's address is one of this machine's: only those can be bound to."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
