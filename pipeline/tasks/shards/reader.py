"""Rows of a data set by class, from memory-mapped shards or an object store."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.storage import Location, ObjectPath, location
from pipeline.tasks.shards.manifest import MANIFEST, Manifest, RowGroup

MAX_ROW_GROUP_BYTES = 64 << 20  # decoded; a larger one is not of our writing


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
            if leads_outside(self.folder, file):
                raise ValueError("it is a link to a place outside the data set's folder")
            parquet = pq.ParquetFile(
                file.open_input() if isinstance(file, ObjectPath) else file,
                memory_map=isinstance(file, Path),
                page_checksum_verification=True,
            )
            _check_size(parquet, self.manifest.image_bytes)
            self._files[shard] = parquet
        return self._files[shard]


def leads_outside(folder: Location, file: Location) -> bool:
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
