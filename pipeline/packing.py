"""What travels to a cluster with a job: this package and the project folder, without data, as one zip file."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pipeline
from pipeline.errors import ConfigError

LIMIT_BYTES = 500 * 2**20  # Ray's for a working directory
LIMIT_FILES = 20_000
ROOMS = ("pipeline", "jobs")  # this package's own, which come from where they are installed
OUTSIDE = PurePosixPath("submitted")  # in the package: files that lie outside the project folder
NEVER = {"__pycache__", "venv", "node_modules"}
NEVER_ON_TOP = {"data", "runs", "mlruns", "mlartifacts", "demo", "build", "dist", "tests", "infra"}
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first day


class Package(NamedTuple):
    """A zip file. The same content gives the same bytes, so that a cluster keeps one copy of it."""

    file: Path
    files: int
    bytes: int  # unpacked
    names: frozenset[str]

    def __str__(self) -> str:
        return f"{self.files} files, {_mebibytes(self.bytes)}"


def packed_name(file: Path, project: Path) -> str:
    """Where a file lies in the package, which is the job's current folder."""
    file, project = file.absolute(), project.absolute()
    return (file.relative_to(project) if file.is_relative_to(project) else OUTSIDE / file.name).as_posix()


def pack(project: Path, target: Path, *, wanted: Iterable[Path] = ()) -> Package:
    """Write what a job needs of a project folder to the zip file `target`.

    That is: this package; of the project what git does not ignore (everything, where git does not keep it), without
    hidden files, environments, caches, and on top data, runs, MLflow's stores, tests and infra; and the files in
    `wanted` in any case.

    Raises ConfigError: more than 500 MiB or 20,000 files (it says which folders are large), or a project with a folder
    of its own under the name of one of this package's.
    """
    home = Path(pipeline.__file__).resolve().parents[1]
    for room in ROOMS:
        theirs = project / room
        if theirs.exists() and theirs.resolve() != home / room:
            raise ConfigError(
                f"{theirs}: in a job this name is metapipe's own. Rename the folder, or submit from another one."
            )
    content = {name: project / name for name in _files(project) if PurePosixPath(name).parts[0] not in ROOMS}
    content |= {packed_name(file, project): file for file in wanted}
    for room in ROOMS:
        content |= {f"{room}/{name}": home / room / name for name in _walk(home / room)}
    sizes = {name: file.stat().st_size for name, file in content.items()}
    _check_size(sizes, project)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(content.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (file.stat().st_mode & 0o777) << 16
            archive.writestr(entry, file.read_bytes())
    return Package(target, len(content), sum(sizes.values()), frozenset(content))


def _files(project: Path) -> Iterator[str]:
    """The project's files that may travel, as names relative to it."""
    for name in _of_git(project) or _walk(project, but_for=NEVER_ON_TOP):
        parts = PurePosixPath(name).parts
        unwanted = parts[0] in NEVER_ON_TOP or parts[0].startswith("mlflow.db") or any(map(_never, parts))
        if not unwanted and (project / name).is_file():  # git also names what was deleted, and links to folders
            yield name


def _never(name: str) -> bool:
    return name.startswith(".") or name in NEVER or name.endswith((".egg-info", ".pyc"))


def _of_git(project: Path) -> list[str]:
    """What git keeps or would keep; nothing where it keeps no part of the folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in done.stdout.split("\0") if name]


def _walk(folder: Path, *, but_for: Set[str] = frozenset()) -> Iterator[str]:
    """Names of files under a folder, without going into what never travels, nor into `but_for` on top."""
    for parent, folders, files in os.walk(folder):
        top = Path(parent) == folder
        folders[:] = [f for f in folders if not _never(f) and not (top and f in but_for)]
        yield from ((Path(parent) / file).relative_to(folder).as_posix() for file in files if not _never(file))


def _check_size(sizes: dict[str, int], project: Path) -> None:
    total = sum(sizes.values())
    if total <= LIMIT_BYTES and len(sizes) <= LIMIT_FILES:
        return
    by_bytes = total > LIMIT_BYTES
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        path = PurePosixPath(name)
        parts["/".join(path.parts[:2]) if len(path.parts) > 1 else name] += size if by_bytes else 1
    largest = [(n, _mebibytes(amount) if by_bytes else f"{amount} files") for n, amount in parts.most_common(3)]
    raise ConfigError(
        f"{project.absolute()}: holds {len(sizes)} files of {_mebibytes(total)} that would travel with the job, more "
        f"than the {LIMIT_FILES} files or {_mebibytes(LIMIT_BYTES)} that a working directory may have; most are in "
        + ", ".join(f"{name} ({amount})" for name, amount in largest)
        + ". Submit from the project's own folder, put data where every node reads it, or add it to .gitignore."
    )


def _mebibytes(amount: int) -> str:
    return f"{amount / 2**20:.1f} MiB"
