"""Raw classes -> shards and a manifest, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.source import RawClass
from pipeline.errors import DataError
from pipeline.files import sync
from pipeline.storage import Location, ObjectPath, copy_folder, location
from pipeline.tasks.shards.digests import file_sha256, pixels_sha256
from pipeline.tasks.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest
from pipeline.types import Split

ROW_GROUP_BYTES = 4 << 20
SHARD_BYTES = 64 << 20


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
                "sha256": pixels_sha256(raw.images),
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
        "shards": [{"file": f"shards/{f.name}", "bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files],
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
