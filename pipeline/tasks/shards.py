"""The data set on disk: Parquet shards and a manifest. Write, open, verify, index.

    DATASET/dataset.json            the manifest (class `Manifest`)
    DATASET/shards/00000.parquet    columns class_id int32, class_name string, group string,
                                    image fixed_size_binary(H·W·C), row-major uint8

A row group holds one class and at most about 4 MB, so a large class has several; the manifest indexes them.
Images are fixed-size binary without dictionary or compression: a reader maps the file and takes rows without
decoding, and any Parquet reader opens it. Pages carry checksums, so a damaged page is found even when it is read
alone. The class splits live in the manifest, never in code that runs at training time.

The data set's own digest covers what a model can learn from (shape, classes, pixels, splits) and how a picture
becomes such an image (preprocessing), and not how the bytes were packed, so the same raw data gives the same digest
with any Parquet writer.
"""

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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from pipeline.config import Section, validate
from pipeline.datasets.source import RawClass
from pipeline.errors import ConfigError, DataError
from pipeline.files import sync
from pipeline.storage import Location, ObjectPath, copy_folder, location
from pipeline.types import Split

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
ROW_GROUP_BYTES = 4 << 20
SHARD_BYTES = 64 << 20
HASH_BYTES = 8 << 20  # read at once while hashing
MAX_ROW_GROUP_BYTES = 64 << 20  # decoded; a larger one is not of our writing
# Folders and a name without anything that a shell, a file system or an object store could take for more.
SHARD_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")


class RowGroup(Section):
    """Where `rows` examples of one class lie."""

    shard: int = Field(ge=0)
    row_group: int = Field(ge=0)
    rows: int = Field(ge=1)


class ClassEntry(Section):
    """One class. `sha256` is over its images in order; `row_groups` hold them in that order."""

    name: str
    group: str
    count: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    splits: dict[str, Split]  # name of a class split -> this class's part in it
    row_groups: list[RowGroup]

    @model_validator(mode="after")
    def _row_groups_hold_every_example(self) -> ClassEntry:
        rows = sum(group.rows for group in self.row_groups)
        if rows != self.count:
            raise ValueError(f"row groups of class {self.name} hold {rows} examples and not {self.count}")
        return self


class ShardEntry(Section):
    """One Parquet file, relative to the data set's folder."""

    file: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if not SHARD_FILE.fullmatch(value):
            raise ValueError(
                "must be a path inside the data set's folder, of letters, digits, '_', '-' and '.', such as "
                "shards/00000.parquet"
            )
        return value


class Manifest(Section):
    """`dataset.json`."""

    format_version: Literal[1]
    modality: Literal["image"]
    shape: tuple[int, int, int]  # H, W, C
    dtype: Literal["uint8"]
    classes: list[ClassEntry] = Field(min_length=1)
    splits: list[str] = Field(min_length=1)  # names of the class splits; each class is in every one of them
    shards: list[ShardEntry] = Field(min_length=1)
    source: dict[str, Any]  # how it was made: source name, options, seed, warnings
    preprocessing: dict[str, Any]  # turns a user's picture into one of these images (see datasets/preprocessing.py)
    digest: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _row_groups_lie_in_listed_shards(self) -> Manifest:
        for entry in self.classes:
            if any(group.shard >= len(self.shards) for group in entry.row_groups):
                raise ValueError(f"class {entry.name} has a row group in a shard that is not listed")
        return self

    @model_validator(mode="after")
    def _every_class_is_in_every_split(self) -> Manifest:
        for entry in self.classes:
            if sorted(entry.splits) != sorted(self.splits):
                raise ValueError(f"class {entry.name} is not in exactly the class splits {', '.join(self.splits)}")
        return self

    @property
    def num_examples(self) -> int:
        return sum(entry.count for entry in self.classes)

    @property
    def image_bytes(self) -> int:
        height, width, channels = self.shape
        return height * width * channels

    def members(self, split_name: str, split: Split) -> list[int]:
        """Indices into `classes` of one part of a class split."""
        return [i for i, entry in enumerate(self.classes) if entry.splits.get(split_name) == split]

    def compute_digest(self) -> str:
        """sha256 over format, shape, preprocessing and, per class, name, group, count, pixels and splits."""
        content = {
            "format_version": self.format_version,
            "modality": self.modality,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "preprocessing": self.preprocessing,
            "classes": [[c.name, c.group, c.count, c.sha256, dict(sorted(c.splits.items()))] for c in self.classes],
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def write(
    out: str | Location,
    classes: Iterable[RawClass],
    *,
    splits: Mapping[str, Mapping[str, Split]],
    source: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    findings: Callable[[], Mapping[str, Any]] = dict,
    overwrite: bool = False,
    row_group_bytes: int = ROW_GROUP_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write a data set to the folder `out`, atomically: it appears whole, or not at all.

    splits: name of a class split -> class name -> part; every class must be in every split.
    findings: called once all classes are written; what it returns is recorded beside `source`.
    One class is held in memory at a time. For an object store the data set is written on this machine first and copied,
    its manifest last.

    Raises DataError: `out` exists (and not `overwrite`), no classes, a duplicate name, images of another shape or
    dtype, or a class without a place in a split.
    """
    out = location(out).absolute()
    check_free(out, overwrite=overwrite)
    if isinstance(out, ObjectPath):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            content, _ = _write_shards(folder, classes, splits, row_group_bytes, shard_bytes)
            manifest = _write_manifest(folder, _described(content, source, findings, preprocessing))
            try:
                (out / MANIFEST).unlink()  # what is left of an old one is none without it
                out.remove_tree()
                copy_folder(folder, out, last=MANIFEST)
            except OSError as error:
                raise DataError(f"{out}: cannot be written ({error}). Choose another --out.") from error
        return manifest
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        staging, lock = _staging(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error
    try:
        content, files = _write_shards(staging, classes, splits, row_group_bytes, shard_bytes)
        manifest = _write_manifest(staging, _described(content, source, findings, preprocessing))
        for file in [*files, staging / MANIFEST]:
            sync(file)
        _replace_folder(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return manifest


def _described(
    content: dict[str, Any],
    source: Mapping[str, Any],
    findings: Callable[[], Mapping[str, Any]],
    preprocessing: Mapping[str, Any],
) -> dict[str, Any]:
    return {**content, "source": {**source, **findings()}, "preprocessing": dict(preprocessing)}


def check_free(out: str | Location, *, overwrite: bool) -> None:
    """Raises DataError where something stands at `out` that may not be replaced, or an object store does not answer."""
    out = location(out)
    try:
        if not out.exists():
            return
    except OSError as error:
        raise DataError(f"{out}: the object store cannot be asked ({error}).") from error
    if not overwrite:
        raise DataError(f"{out}: already exists. Choose another --out, or replace it with --overwrite.")
    if not (out / MANIFEST).exists():
        raise DataError(f"{out}: exists and is not a data set, so --overwrite leaves it alone. Choose another --out.")


def _staging(out: Path) -> tuple[Path, int]:
    """A new folder beside `out` to write in, and its lock: a descriptor to close at the end."""
    unlocked = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    unlocked.chmod(0o755)  # mkdtemp makes 0700; other users and workers read the data set as well
    lock = os.open(unlocked, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep there either
        fcntl.flock(lock, fcntl.LOCK_EX)
    staging = out.parent / f".{out.name}.partial-{unlocked.name.rsplit('-', 1)[1]}"
    return unlocked.rename(staging), lock  # locked before it has the name that others sweep


def _sweep(out: Path) -> None:
    """Remove what killed writers of `out` left beside it; the lock of one at work cannot be taken."""
    for left in out.parent.glob(f"{glob.escape(f'.{out.name}.partial-')}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _write_shards(
    folder: Path,
    classes: Iterable[RawClass],
    splits: Mapping[str, Mapping[str, Split]],
    row_group_bytes: int,
    shard_bytes: int,
) -> tuple[dict[str, Any], list[Path]]:
    (folder / "shards").mkdir()
    entries: list[dict[str, Any]] = []
    shape: tuple[int, ...] | None = None
    schema: pa.Schema | None = None
    writer: pq.ParquetWriter | None = None
    files: list[Path] = []
    written = 0
    names: set[str] = set()
    for raw in classes:
        if raw.images.dtype != np.uint8 or raw.images.ndim != 4 or len(raw.images) == 0:
            raise DataError(
                f"class {raw.name}: expected uint8 images [count, H, W, C], got {raw.images.dtype} "
                f"{list(raw.images.shape)}."
            )
        if raw.name in names:
            raise DataError(f"class {raw.name}: two classes have this name; names must be unique.")
        shape = shape or raw.images.shape[1:]
        if raw.images.shape[1:] != shape:
            raise DataError(f"class {raw.name}: images of {raw.images.shape[1:]}, the others of {shape}.")
        missing = [name for name, members in splits.items() if raw.name not in members]
        if missing:
            raise DataError(f"class {raw.name}: has no place in the class split {missing[0]}.")
        names.add(raw.name)
        example_bytes = int(np.prod(shape))
        schema = schema or _schema(shape)
        rows_per_group = max(1, row_group_bytes // example_bytes)
        row_groups = []
        for start in range(0, len(raw.images), rows_per_group):
            images = raw.images[start : start + rows_per_group]
            if writer is None or (written and written + images.nbytes > shard_bytes):
                if writer is not None:
                    writer.close()
                files.append(folder / "shards" / f"{len(files):05d}.parquet")
                writer = _open_writer(files[-1], schema)
                written, groups_in_shard = 0, 0
            writer.write_table(_table(schema, len(entries), raw, images), row_group_size=len(images))
            row_groups.append({"shard": len(files) - 1, "row_group": groups_in_shard, "rows": len(images)})
            groups_in_shard += 1
            written += images.nbytes
        entries.append(
            {
                "name": raw.name,
                "group": raw.group,
                "count": len(raw.images),
                "sha256": _pixels_sha256(raw.images),
                "splits": {name: members[raw.name] for name, members in splits.items()},
                "row_groups": row_groups,
            }
        )
    if writer is None or shape is None:
        raise DataError("the source has no classes; nothing was written.")
    writer.close()
    content = {
        "format_version": FORMAT_VERSION,
        "modality": "image",
        "shape": shape,
        "dtype": "uint8",
        "classes": entries,
        "splits": list(splits),
        "shards": [{"file": f"shards/{f.name}", "bytes": f.stat().st_size, "sha256": _file_sha256(f)} for f in files],
    }
    return content, files


def _write_manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    manifest = Manifest.model_validate({**content, "digest": "0" * 64})
    manifest = manifest.model_copy(update={"digest": manifest.compute_digest()})
    text = json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _schema(shape: tuple[int, ...]) -> pa.Schema:
    image = pa.field("image", pa.binary(int(np.prod(shape))), nullable=False)
    fields = [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        image,
    ]
    return pa.schema(fields, metadata={"shape": json.dumps(list(shape)), "dtype": "uint8"})


def _open_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        file,
        schema,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=["class_id"],
    )


def _table(schema: pa.Schema, class_id: int, raw: RawClass, images: np.ndarray) -> pa.Table:
    rows = len(images)
    pixels = pa.py_buffer(np.ascontiguousarray(images))
    columns = [
        pa.array(np.full(rows, class_id, dtype=np.int32)),
        pa.array([raw.name] * rows, pa.string()),
        pa.array([raw.group] * rows, pa.string()),
        pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, rows, [None, pixels]),
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


def _pixels_sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def _file_sha256(file: Location) -> str:
    with file.open_input() if isinstance(file, ObjectPath) else file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(HASH_BYTES):
            digest.update(block)
        return digest.hexdigest()


def read_manifest(folder: str | Location) -> Manifest:
    """The manifest of a data set, checked against its own digest.

    Raises DataError: no such folder, no manifest in it, not JSON, a field missing or wrong, another format
    version, or a digest that disagrees with the classes, splits and preprocessing.
    """
    folder = location(folder)
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such data set. Prepare one first, e.g. `metapipe data prepare glyphs --out {folder}`."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {MANIFEST}, so it is not a prepared data set. Make one with `metapipe data prepare`."
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}). Prepare the data set again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if isinstance(content, dict) and content.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {content.get('format_version')!r}; this version reads {FORMAT_VERSION}. "
            "Prepare the data set again."
        )
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a manifest. Prepare the data set again.")
    try:
        manifest = validate(Manifest, content, source=str(path))
    except ConfigError as error:
        raise DataError(f"{error} Prepare the data set again.") from None
    if manifest.compute_digest() != manifest.digest:
        raise DataError(
            f"{path}: the digest {manifest.digest[:12]}… disagrees with the classes, splits and preprocessing "
            "listed; the manifest was changed after it was written. Prepare the data set again."
        )
    return manifest


def verify(folder: str | Location, manifest: Manifest | None = None) -> Manifest:
    """Check every digest, footer and index of a data set against its bytes. Returns the manifest.

    Raises DataError: names every damaged, truncated or missing shard, or the class that disagrees.
    """
    folder = location(folder)
    manifest = manifest or read_manifest(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        problems = [p for p in pool.map(lambda shard: _shard_problem(folder, shard), manifest.shards) if p]
    if problems:
        raise DataError(f"{folder}: " + "; ".join(problems) + ". Restore these files, or prepare the data set again.")
    with ShardReader(folder, manifest) as reader:
        for class_id, entry in enumerate(manifest.classes):
            images = reader.read_class(class_id)
            if len(images) != entry.count or _pixels_sha256(images) != entry.sha256:
                raise DataError(
                    f"{folder / MANIFEST}: class {entry.name} disagrees with its shards. Prepare the data set again."
                )
    return manifest


def _shard_problem(folder: Location, shard: ShardEntry) -> str | None:
    file = folder / shard.file
    try:
        if _leads_outside(folder, file):
            return f"{shard.file} is a link to a place outside this folder, which is not read (copy the file into it)"
        size = file.size() if isinstance(file, ObjectPath) else file.stat().st_size
        if size != shard.bytes:
            return f"{shard.file} has {size} bytes instead of {shard.bytes} (truncated or replaced)"
        if _file_sha256(file) != shard.sha256:
            return f"{shard.file} is damaged (its sha256 differs from the manifest's)"
    except FileNotFoundError:
        return f"{shard.file} is missing"
    except OSError as error:
        return f"{shard.file} cannot be read ({error.strerror or error})"
    return None


def _leads_outside(folder: Location, file: Location) -> bool:
    """Whether a symbolic link takes a shard out of its data set's folder. The folder itself may be one."""
    return isinstance(folder, Path) and isinstance(file, Path) and not file.resolve().is_relative_to(folder.resolve())


def _check_size(parquet: pq.ParquetFile, image_bytes: int) -> None:
    """Raises ValueError where reading could take much more memory than the file is long.

    Compressed pages and dictionaries unfold to thousands of times their size; ours have neither, and images of a
    fixed size bound what a row group decodes to. Looks only at the footer.
    """
    schema = parquet.schema_arrow
    if schema.field("image").type != pa.binary(image_bytes) or schema.field("class_id").type != pa.int32():
        raise ValueError(f"its images are not of {image_bytes} bytes each")
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        if group.num_rows * image_bytes > max(MAX_ROW_GROUP_BYTES, image_bytes):
            raise ValueError(f"row group {number} is of {group.num_rows} images, too many to be read at once")
        for column in (group.column(index) for index in range(group.num_columns)):
            if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
                raise ValueError(f"row group {number} is compressed, which our shards never are")


_Stamp = tuple[int, int, int]


def _stamp(path: Location) -> _Stamp | None:
    """What changes when a file is written to or replaced; None in an object store, or where it is gone."""
    try:
        status = path.stat() if isinstance(path, Path) else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)


class ShardReader:
    """Rows of a data set by class, from memory-mapped shards or an object store. Files are opened at their first use.

    The first read of a row group decodes it and checks its pages; later ones copy rows from where they lie in the file,
    for as long as nobody has written to it.

    Threads may share one; they take turns decoding.
    """

    def __init__(self, folder: str | Location, manifest: Manifest) -> None:
        self.folder = location(folder)
        self.manifest = manifest
        self._files: dict[int, pq.ParquetFile] = {}
        self._maps: dict[int, np.memmap] = {}
        # (shard, row group) -> its checked images, in the file; and the file as it was then
        self._in_place: dict[tuple[int, int], tuple[np.ndarray, _Stamp]] = {}
        self._lock = threading.Lock()  # a ParquetFile is not thread-safe; sampling ahead and validation share it

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._maps.clear()
            self._in_place.clear()

    def read_class(
        self, class_id: int, rows: Sequence[int] | np.ndarray | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """uint8 [rows, H, W, C] of one class: all its examples, or those with the given numbers, in order.

        out: an array to put these rows into. Only the row groups that hold them are read. Raises DataError: a damaged
        page or index names its shard.
        """
        entry = self.manifest.classes[class_id]
        groups = entry.row_groups
        if rows is None:
            return np.concatenate([self._read_row_group(class_id, group) for group in groups])
        wanted = np.asarray(rows, dtype=np.int64)
        images = np.empty((len(wanted), *self.manifest.shape), dtype=np.uint8) if out is None else out
        if len(groups) == 1:
            images[:] = self._read_row_group(class_id, groups[0])[wanted]
            return images
        starts = np.cumsum([0, *(group.rows for group in groups)])
        which = np.searchsorted(starts, wanted, side="right") - 1
        for g in np.unique(which):
            inside = which == g
            images[inside] = self._read_row_group(class_id, groups[g])[wanted[inside] - starts[g]]
        return images

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.read_class(class_id) for class_id in range(len(self.manifest.classes)))

    def _read_row_group(self, class_id: int, group: RowGroup) -> np.ndarray:
        name = self.manifest.shards[group.shard].file
        stamp = _stamp(self.folder / name)
        checked = self._in_place.get((group.shard, group.row_group))
        if checked is not None and checked[1] == stamp:
            return checked[0]
        try:
            with self._lock:
                file = self._open(group.shard)
                table = file.read_row_group(group.row_group, columns=["class_id", "image"])
            chunk = table.column("image").combine_chunks()
            pixels = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
            start = chunk.offset * self.manifest.image_bytes
            pixels = pixels[start : start + len(chunk) * self.manifest.image_bytes]
            images = pixels.reshape(len(chunk), *self.manifest.shape)
            labels = table.column("class_id").to_numpy()
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            raise DataError(
                f"{self.folder / name}: row group {group.row_group} cannot be read ({str(error).strip()[:120]}). "
                "Restore this file, or prepare the data set again."
            ) from error
        if len(images) != group.rows or not (labels == class_id).all():
            raise DataError(
                f"{self.folder / name}: row group {group.row_group} does not hold the {group.rows} examples of class "
                f"{self.manifest.classes[class_id].name} that {MANIFEST} says. Prepare the data set again."
            )
        in_place = self._view(file, group)
        if stamp is not None and in_place is not None and np.array_equal(in_place, images):
            self._in_place[group.shard, group.row_group] = in_place, stamp
        return images

    def _view(self, file: pq.ParquetFile, group: RowGroup) -> np.ndarray | None:
        """The end of the row group's column of images in the mapped file: where they lie if they are in one page.

        None for an object store. A plain page of required fixed-size values is a header and the values.
        """
        path = self.folder / self.manifest.shards[group.shard].file
        if not isinstance(path, Path):
            return None
        columns = file.metadata.row_group(group.row_group)
        column = columns.column(file.schema_arrow.get_field_index("image"))
        end = column.data_page_offset + column.total_compressed_size
        start = end - group.rows * self.manifest.image_bytes
        try:
            with self._lock:
                if group.shard not in self._maps:
                    self._maps[group.shard] = np.memmap(path, np.uint8, mode="r")
            return self._maps[group.shard][max(start, 0) : end].reshape(group.rows, *self.manifest.shape)
        except (OSError, ValueError):  # not to be mapped, or a footer that points elsewhere
            return None

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            file = self.folder / self.manifest.shards[shard].file
            if _leads_outside(self.folder, file):
                raise ValueError("it is a link to a place outside the data set's folder")
            parquet = pq.ParquetFile(
                file.open_input() if isinstance(file, ObjectPath) else file,
                memory_map=isinstance(file, Path),
                page_checksum_verification=True,
            )
            _check_size(parquet, self.manifest.image_bytes)
            self._files[shard] = parquet
        return self._files[shard]
