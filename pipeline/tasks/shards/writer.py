"""Raw classes -> shards and a manifest, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.source import Column, Examples, Modality
from pipeline.errors import DataError, Unfinished, UserError
from pipeline.files import sync, write_atomically
from pipeline.storage import Location, ObjectPath, copy_folder, location
from pipeline.tasks.shards.digests import file_sha256
from pipeline.tasks.shards.examples import (
    COLUMN,
    DTYPE,
    FIXED,
    ExamplesDigest,
    arrow_type,
    checked,
    concatenated,
    lengths,
    to_arrow,
)
from pipeline.tasks.shards.manifest import MANIFEST, Manifest
from pipeline.types import Split

ROW_GROUP_BYTES = 4 << 20
SHARD_BYTES = 64 << 20
# All that a data set's folder holds where we wrote it: the manifest, the shards and the card (`datasets/card.py`).
OWN_FILES = frozenset({MANIFEST, "shards", "DATASET.md", "DATASET.png", "DATASET-statistics.json"})
OWN_SHARD = re.compile(r"\d{5,}\.parquet")


class ClassExamples(NamedTuple):
    """All examples of one class."""

    name: str  # unique in the data set, e.g. "Greek/character01"
    group: str  # alphabet, script, domain, clinic
    examples: Examples  # of at least one


def write(
    out: str | Location,
    classes: Iterable[ClassExamples],
    *,
    splits: Mapping[str, Mapping[str, Split]],
    source: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    modality: Modality = "image",
    shape: tuple[int, ...] | None = None,
    columns: Sequence[Column] = (),
    overwrite: bool = False,
    row_group_bytes: int = ROW_GROUP_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write classes to the folder `out` as a data set, atomically: it appears whole, or not at all.

    splits: name of a class split -> class name -> part; every class must be in every split. shape: of one example;
    needed for encoded images alone (once they are preprocessed). columns: of vectors. One class is held in memory at a
    time.

    Raises DataError: `out` exists (and not `overwrite`), no classes, a duplicate name, examples of another modality or
    shape, or a class without a place in a split.
    """

    with staged(out, overwrite=overwrite) as place:
        writer = ShardWriter(
            place.folder,
            splits=splits,
            modality=modality,
            shape=shape,
            columns=columns,
            row_group_bytes=row_group_bytes,
            shard_bytes=shard_bytes,
        )
        for name, group, examples in classes:
            writer.begin(name, group)
            writer.add(examples)
            if not writer.end():
                raise DataError(f"class {name}: has no examples.")
        return place.publish(writer.close(), {"source": dict(source), "preprocessing": dict(preprocessing)})


def check_free(out: str | Location, *, overwrite: bool, source: Path | None = None) -> None:
    """Raises DataError where something stands at `out` that may not be replaced, or an object store does not answer.

    Only what we wrote may go: no adopted files, which are the user's own, and no folder with others' files in it.
    source: the folder of the raw data, which must not go with `out`.
    """
    out = location(out)
    try:
        if not out.exists():
            return
    except OSError as error:
        raise DataError(f"{out}: the object store cannot be asked ({error}).") from error
    if not overwrite:
        if (out / MANIFEST).exists():
            raise DataError(
                f"{out}: already exists. Keep the data set that is there with --reuse, replace it with --overwrite, or "
                "choose another --out."
            )
        raise DataError(f"{out}: already exists and is not a data set. Choose another --out.")
    if not (out / MANIFEST).exists():
        raise DataError(f"{out}: exists and is not a data set, so --overwrite leaves it alone. Choose another --out.")
    if source is not None and isinstance(out, Path):
        here, there = out.resolve(), source.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise DataError(
                f"{out}: is the folder of the raw data {source}, lies inside it or contains it, so --overwrite leaves "
                "it alone. Choose another --out."
            )
    try:
        _check_own(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be looked into ({error}). Choose another --out.") from error


def _check_own(out: Location) -> None:
    """Raises DataError: a folder with a manifest holds more than we wrote. OSError: it cannot be read."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise DataError(
            f"{out / MANIFEST}: is no manifest that can be read, so --overwrite leaves the folder alone. Choose "
            "another --out, or remove the folder yourself."
        )
    if manifest.get("layout") is not None:
        raise DataError(
            f"{out}: its Parquet files are your own (`data adopt` gave them a manifest), so --overwrite leaves them "
            "alone. Choose another --out."
        )
    others = [place.name for place in out.iterdir() if place.name not in OWN_FILES]
    others += [f"shards/{name}" for name in _names_in(out / "shards") if not OWN_SHARD.fullmatch(name)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise DataError(
            f"{out}: holds files that are not the data set's ({', '.join(sorted(others)[:3])}{more}), so --overwrite "
            "leaves it alone. Move them away, or choose another --out."
        )


def _names_in(folder: Location) -> list[str]:
    return [place.name for place in folder.iterdir()] if folder.is_dir() else []


class Staging(NamedTuple):
    """A folder to write a data set in, before it appears at its place."""

    folder: Path
    out: Location

    def publish(self, content: Mapping[str, Any], about: Mapping[str, Any]) -> Manifest:
        """Add the manifest and put the data set in its place.

        content: what `ShardWriter.close` gave. about: source and preprocessing.
        """
        manifest = Manifest.model_validate({**content, **about, "digest": "0" * 64})
        manifest = manifest.model_copy(update={"digest": manifest.compute_digest()})
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if isinstance(self.out, ObjectPath):
            try:
                (self.out / MANIFEST).unlink()  # what is left of an old one is none without it
                self.out.remove_tree()
                copy_folder(self.folder, self.out, last=MANIFEST)
            except OSError as error:
                raise DataError(f"{self.out}: cannot be written ({error}). Choose another --out.") from error
        else:
            sync(self.folder / MANIFEST)
            _replace_folder(self.folder, self.out)
        return manifest


@contextlib.contextmanager
def staged(out: str | Location, *, overwrite: bool, key: str | None = None) -> Iterator[Staging]:
    """A folder beside `out` to write a data set in.

    It goes if the block fails. With a `key` it stays if the block is interrupted or killed, and whoever comes with the
    same key gets it as it was left; a UserError other than Unfinished removes it. For an object store it lies on this
    machine (with a key: in the user's cache), and is copied when it is published, the manifest last.

    Raises DataError: something is at `out` already (and not `overwrite`), it cannot be written, or another process has
    the folder of this key.
    """
    out = location(out).absolute()
    check_free(out, overwrite=overwrite)
    if isinstance(out, ObjectPath) and key is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Staging(Path(scratch), out)
        return
    beside = out if isinstance(out, Path) else _cache_of(out)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        kept = beside.parent / f".{beside.name}.partial-{key}" if key else None
        _sweep(beside, but=kept)
        folder, lock = _new_folder(beside) if kept is None else _locked(kept)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error
    try:
        yield Staging(folder, out)
    except BaseException as error:
        if key is None or (isinstance(error, UserError) and not isinstance(error, Unfinished)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        if isinstance(out, ObjectPath):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _cache_of(out: ObjectPath) -> Path:
    """Where on this machine a data set for an object store is made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "metapipe" / "prepare" / hashlib.sha256(str(out).encode()).hexdigest()[:16] / out.name


def _locked(folder: Path) -> tuple[Path, int]:
    """A folder of its own name, and its lock. Raises DataError: another process has it."""
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DataError(
            f"{folder}: another process is preparing the same data set. Wait until it ends, or end it first."
        ) from None
    except OSError:  # a file system without locks
        pass
    return folder, lock


def _new_folder(out: Path) -> tuple[Path, int]:
    """A new folder beside `out` to write in, and its lock: a descriptor to close at the end."""
    unlocked = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    unlocked.chmod(0o755)  # mkdtemp makes 0700; other users and workers read the data set as well
    lock = os.open(unlocked, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep there either
        fcntl.flock(lock, fcntl.LOCK_EX)
    folder = out.parent / f".{out.name}.partial-{unlocked.name.rsplit('-', 1)[1]}"
    return unlocked.rename(folder), lock  # locked before it has the name that others sweep


def _sweep(out: Path, *, but: Path | None = None) -> None:
    """Remove what killed writers of `out` left beside it; the lock of one at work cannot be taken."""
    for left in out.parent.glob(f"{glob.escape(f'.{out.name}.partial-')}*"):
        if left == but:
            continue
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


class ShardWriter:
    """Examples, class by class -> shards in a folder, row groups written as they are full.

    What is written depends on the classes and their examples alone, and not on how many are added at once. At most a
    row group, and what was added last, is in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        splits: Mapping[str, Mapping[str, Split]],
        modality: Modality = "image",
        shape: tuple[int, ...] | None = None,
        columns: Sequence[Column] = (),
        min_examples: int = 1,
        row_group_bytes: int = ROW_GROUP_BYTES,
        shard_bytes: int = SHARD_BYTES,
        whole: int = 0,
    ) -> None:
        """min_examples: a class with fewer is left out. whole: shards that the same examples gave before, and stay."""
        self.files: list[Path] = []
        self.in_shards = 0  # examples that whole shards hold
        self._folder = folder / "shards"
        self._folder.mkdir(exist_ok=True)
        self._whole = whole
        self._splits = splits
        self._modality = modality
        self._shape = tuple(shape) if shape is not None else (() if modality == "text" else None)
        self._columns = columns
        self._min_examples = min_examples
        self._row_group_bytes = row_group_bytes
        self._shard_bytes = shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._written = self._groups_in_shard = self._rows = 0  # of the shard that is open: bytes, row groups, examples
        self._entries: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._name = self._group = ""  # of the class that is open

    def begin(self, name: str, group: str) -> None:
        """A class. Raises DataError: its name is taken, or no name, or it is in no part of a class split."""
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name + group):
            raise DataError(
                f"class {name!a}: its name or its group {group!a} has control characters or is not UTF-8. Rename it."
            )
        if name in self._names:
            raise DataError(f"class {name}: two classes have this name; names must be unique.")
        missing = [split for split, members in self._splits.items() if name not in members]
        if missing:
            raise DataError(f"class {name}: has no place in the class split {missing[0]}.")
        self._names.add(name)
        self._name, self._group = name, group
        self._digest, self._count, self._row_groups = ExamplesDigest(), 0, list[dict[str, int]]()
        self._pending: list[Examples] = []  # not yet in a row group
        self._pending_bytes = 0

    def add(self, examples: Examples) -> None:
        """Some examples of the class, after those before. Raises DataError: not of this modality, or another shape."""
        examples = checked(self._modality, examples, name=self._name, shape=self._fixed_shape)
        if not len(examples):
            return
        if isinstance(examples, np.ndarray):
            self._shape = examples.shape[1:]
        self._digest.update(examples)
        self._count += len(examples)
        self._pending.append(examples)
        self._pending_bytes += int(lengths(examples).sum())
        if self._pending_bytes >= self._row_group_bytes and self._count >= self._min_examples:
            self._write_pending(last=False)

    def end(self) -> int:
        """The class is whole. Returns how many examples it has; 0 where it is left out."""
        if self._count < self._min_examples:
            return 0
        self._write_pending(last=True)
        self._entries.append(
            {
                "name": self._name,
                "group": self._group,
                "count": self._count,
                "sha256": self._digest.hexdigest(),
                "splits": {name: members[self._name] for name, members in self._splits.items()},
                "row_groups": self._row_groups,
            }
        )
        return self._count

    def close(self) -> dict[str, Any]:
        """End the last shard. Returns the manifest's content save for source, preprocessing and digest.

        Raises DataError: there was no class.
        """
        if not self.files:
            raise DataError("the source has no classes; nothing was written.")
        self._end_shard()
        if self._shape is None:
            raise DataError(f"the shape of {self._modality} examples was not given.")
        columns = list(self._columns)
        if self._modality == "vector" and not columns:
            columns = [Column(name=str(number)) for number in range(self._shape[0])]
        return {
            "format_version": 1 if self._modality == "image" else 2,
            "modality": self._modality,
            "shape": self._shape,
            "dtype": DTYPE[self._modality],
            "columns": columns,
            "classes": self._entries,
            "splits": list(self._splits),
            "shards": [self._shard(file) for file in self.files],
        }

    def _shard(self, file: Path) -> dict[str, Any]:
        sha256 = _digest_of(file).read_text()
        _digest_of(file).unlink()
        return {"file": f"shards/{file.name}", "bytes": file.stat().st_size, "sha256": sha256}

    @property
    def _fixed_shape(self) -> tuple[int, ...] | None:
        return self._shape if self._modality in FIXED else None

    def _write_pending(self, *, last: bool) -> None:
        """Write the row groups that are full, and, of a class that is whole, the last one."""
        pending = concatenated(self._pending)
        start = 0
        for stop in self._cuts(lengths(pending), last=last):
            self._write_row_group(pending[start:stop])
            start = stop
        rest = pending[start:]
        self._pending = [rest.copy() if isinstance(rest, np.ndarray) else rest] if len(rest) else []
        self._pending_bytes = int(lengths(rest).sum())

    def _cuts(self, sizes: np.ndarray, *, last: bool) -> Iterator[int]:
        """Where row groups end: each as long as fits into `row_group_bytes`, and of at least one example."""
        group = 0
        for position, size in enumerate(sizes.tolist()):
            if group and group + size > self._row_group_bytes:
                yield position
                group = 0
            group += size
        if last and len(sizes):
            yield len(sizes)

    def _write_row_group(self, examples: Examples) -> None:
        size = int(lengths(examples).sum())
        schema = _schema(self._modality, self._shape or ())
        if not self.files or (self._written and self._written + size > self._shard_bytes):
            if self.files:
                self._end_shard()
            self.files.append(self._folder / f"{len(self.files):05d}.parquet")
            if len(self.files) > self._whole:
                self._writer = _open_writer(_unfinished(self.files[-1]), schema)
            self._written = self._groups_in_shard = self._rows = 0
        if self._writer is not None:
            table = _table(schema, self._modality, len(self._entries), self._name, self._group, examples)
            self._writer.write_table(table, row_group_size=len(examples))
        self._row_groups.append(
            {"shard": len(self.files) - 1, "row_group": self._groups_in_shard, "rows": len(examples)}
        )
        self._groups_in_shard += 1
        self._written += size
        self._rows += len(examples)

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            sync(_unfinished(self.files[-1]))
            write_atomically(_digest_of(self.files[-1]), file_sha256(_unfinished(self.files[-1])))
            _unfinished(self.files[-1]).rename(self.files[-1])
        self.in_shards += self._rows


def whole_shards(folder: Path) -> list[Path]:
    """The shards of a data set in the making that are whole, in order. What comes after a damaged one is removed."""
    found: list[Path] = []
    for number, file in enumerate(sorted((folder / "shards").glob("*.parquet"))):
        expected = _digest_of(file).read_text() if _digest_of(file).is_file() else ""
        if len(found) == number and file.name == f"{number:05d}.parquet" and file_sha256(file) == expected:
            found.append(file)
        else:
            file.unlink()
    return found


def _digest_of(file: Path) -> Path:
    """Holds a shard's sha256 until the manifest does."""
    return file.with_suffix(".sha256")


def _unfinished(file: Path) -> Path:
    """The name of a shard as long as it has no footer."""
    return file.with_suffix(".open")


def _schema(modality: Modality, shape: tuple[int, ...]) -> pa.Schema:
    fields = [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field(COLUMN[modality], arrow_type(modality, shape), nullable=False),
    ]
    return pa.schema(fields, metadata={"shape": json.dumps(list(shape)), "dtype": DTYPE[modality]})


def _open_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        file,
        schema,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=["class_id"],
    )


def _table(schema: pa.Schema, modality: Modality, class_id: int, name: str, group: str, examples: Examples) -> pa.Table:
    rows = len(examples)
    columns = [
        pa.array(np.full(rows, class_id, dtype=np.int32)),
        pa.array([name] * rows, pa.string()),
        pa.array([group] * rows, pa.string()),
        to_arrow(modality, examples),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _replace_folder(staging: Path, out: Path) -> None:
    """Put `staging` in the place of `out`; at every moment one whole data set or none stands there."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / "old"
        os.rename(out, old)
        os.rename(staging, out)
        shutil.rmtree(old.parent, ignore_errors=True)
    else:
        os.rename(staging, out)
    sync(out.parent)
