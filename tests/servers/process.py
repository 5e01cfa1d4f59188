"""A server as a process in a session of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0
STOP_SECONDS = 30.0


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nothing listens on, and that the system gives to nobody who does not ask for it.

    One of those that it hands out (32768 and up) may be some connection's before the server has started.
    """
    while True:
        port = secrets.randbelow(10_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port


def responds(url: str) -> bool:
    """Whether a GET is answered with success."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


@contextmanager
def running(
    command: Sequence[str],
    *,
    answers: Callable[[], bool],
    log: Path,
    env: Mapping[str, str] | None = None,
    user: int | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[subprocess.Popen[bytes]]:
    """`command` from when `answers()` is true until the block ends; then its whole process group gets `stop`.

    `user` is the user id it runs as, where that is not this process's. AssertionError, with the log: it ended, or did
    not answer within two minutes.
    """
    identity = {} if user is None else {"user": user, "group": _group_of(user), "extra_groups": []}
    # where this process is killed, the kernel sends the signal in its place
    tied = [shutil.which("setpriv"), "--pdeathsig", stop.name.removeprefix("SIG"), "--"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*(word for word in tied if tied[0]), *command],
            env=dict(os.environ if env is None else env),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            **identity,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            assert process.poll() is None, f"{command[0]} ended:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer:\n{log.read_text(errors='replace')}"
            time.sleep(0.2)
        yield process
    finally:
        _end(process, stop)


def _end(process: subprocess.Popen[bytes], stop: signal.Signals) -> None:
    for signum in (stop, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):  # what outlived its parent
        os.killpg(process.pid, signal.SIGKILL)


def _group_of(user: int) -> int:
    import pwd

    return pwd.getpwuid(user).pw_gid
