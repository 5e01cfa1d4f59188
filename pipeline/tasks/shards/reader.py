"""Rows of a data set by class, from memory-mapped shards, an object store or a web server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.source import Examples
from pipeline.errors import DataError
from pipeline.storage import Readable, readable
from pipeline.tasks.shards import bounds
from pipeline.tasks.shards.bounds import bounded_table
from pipeline.tasks.shards.examples import COLUMN, FIXED, arrow_type, concatenated, from_arrow
from pipeline.tasks.shards.footer import UNCOMPRESSED, RowGroupFooter, row_groups
from pipeline.tasks.shards.foreign import all_are, check_row_groups, column_of, labels_of, normalized
from pipeline.tasks.shards.manifest import MANIFEST, Manifest, RowGroup

KEPT_FOOTERS = 256  # of files that are not kept open
CACHE_BYTES = 64 << 20  # of decoded row groups that are kept, of those that cannot be read where they lie


_Stamp = tuple[int, int, int]
_Decoded: TypeAlias = np.ndarray | pa.Array  # of a fixed modality, of one of varying size


def _stamp(path: Readable) -> _Stamp | None:
    """What changes when a file is written to or replaced; None where it is not on this machine, or gone."""
    try:
        status = path.stat() if isinstance(path, Path) else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)


class ShardReader:
    """Rows of a data set by class. Files are opened at their first use.

    The first read of a row group decodes it and checks its pages; later ones copy rows from where they lie in the file,
    for as long as nobody has written to it. Where examples do not lie there as they are (texts, encoded images, several
    pages, an object store), the row groups decoded last are kept, CACHE_BYTES of them.

    Threads may share one; they take turns decoding. With `keep` False nothing is kept but some files' footers: for
    those who keep the examples themselves. Files are then read and not mapped, and threads read at the same time.
    """

    def __init__(self, folder: str | Readable, manifest: Manifest, *, keep: bool = True) -> None:
        self.folder = readable(folder)
        self.manifest = manifest
        self._keeps = keep
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._fixed = manifest.modality in FIXED
        self._files: dict[int, pq.ParquetFile] = {}
        self._maps: dict[int, np.memmap] = {}
        # (class, shard, row group, start) -> its checked examples, in the file; and the file as it was then
        self._in_place: dict[tuple[int, int, int, int], tuple[np.ndarray, _Stamp]] = {}
        # (shard, row group) -> its examples and labels, in memory; the one used last is the last
        self._decoded: OrderedDict[tuple[int, int], tuple[_Decoded, np.ndarray | pa.Array]] = OrderedDict()
        self._chunks: dict[int, list[RowGroupFooter]] = {}  # of files that were opened
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
            self._decoded.clear()
            self._footers.clear()

    def read_class(
        self, class_id: int, rows: Sequence[int] | np.ndarray | None = None, *, out: np.ndarray | None = None
    ) -> Examples:
        """Examples of one class: all of them, or those with the given numbers, in order.

        image: uint8 [rows, H, W, C] · vector: float32 [rows, D] · text: a list of str · encoded_image: a list of bytes.
        out: an array to put rows of a fixed modality into. Only the row groups that hold them are read. Raises
        DataError: a damaged page or index names its shard.
        """
        entry = self.manifest.classes[class_id]
        groups = entry.row_groups
        if rows is None:
            return concatenated(_rows(self._read_row_group(class_id, group)) for group in groups)
        wanted = np.asarray(rows, dtype=np.int64)
        if self._fixed:
            kind = np.float32 if self.manifest.modality == "vector" else np.uint8
            examples = np.empty((len(wanted), *self.manifest.shape), dtype=kind) if out is None else out
            if len(groups) == 1:
                examples[:] = self._read_row_group(class_id, groups[0])[wanted]
                return examples
        else:
            examples = np.empty(len(wanted), dtype=object)
        starts = np.cumsum([0, *(group.rows for group in groups)])
        which = np.searchsorted(starts, wanted, side="right") - 1
        for g in np.unique(which):
            inside = which == g
            examples[inside] = _rows(self._read_row_group(class_id, groups[g]), wanted[inside] - starts[g])
        return examples if self._fixed else examples.tolist()

    def parts(self, class_id: int) -> Iterator[Examples]:
        """All examples of one class in order, a row group at a time. Raises DataError as `read_class` does."""
        for group in self.manifest.classes[class_id].row_groups:
            yield _rows(self._read_row_group(class_id, group))

    def __iter__(self) -> Iterator[Examples]:
        return (self.read_class(class_id) for class_id in range(len(self.manifest.classes)))

    def _read_row_group(self, class_id: int, group: RowGroup) -> _Decoded:
        """The examples of one class in one row group."""
        name = self.manifest.shards[group.shard].file
        stamp = _stamp(self.folder / name)
        key = (class_id, group.shard, group.row_group, group.start)
        checked = self._in_place.get(key)
        if checked is not None and checked[1] == stamp:
            return checked[0]
        end = group.start + group.rows
        try:
            if self._keeps:
                with self._lock:
                    examples, labels = self._decode(group.shard, group.row_group)
            else:
                examples, labels = self._decode_once(group.shard, group.row_group)
            if len(examples) != len(labels):
                raise ValueError("its columns differ in length")
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            self._footers.pop(group.shard, None)
            here = isinstance(self.folder, Path)
            raise DataError(
                f"{self.folder / name}: row group {group.row_group} cannot be read "
                f"({str(error).strip()[: 120 if here else 500]}). "
                + ("" if here else "Run the same command again once the server answers; if the file is damaged: ")
                + "Restore this file, or prepare the data set again."
            ) from error
        # of version 1 a row group is of one class, and the index of the whole of it
        alone = self.manifest.format_version == 1 and len(labels) != group.rows
        if alone or end > len(labels) or not self._are_of(class_id, labels[group.start : end]):
            raise DataError(
                f"{self.folder / name}: row group {group.row_group} does not hold the {group.rows} examples of class "
                f"{self.manifest.classes[class_id].name} that {MANIFEST} says. Prepare the data set again."
            )
        own = examples[group.start : end]
        if self.manifest.layout is not None:
            if self._keeps:
                self._keep((group.shard, group.row_group), examples, labels)
            try:
                own = normalized(self.manifest.modality, self.manifest.shape, own)
                return from_arrow(self.manifest.modality, self.manifest.shape, own) if self._fixed else own
            except (pa.ArrowException, ValueError) as error:
                raise DataError(
                    f"{self.folder / name}: row group {group.row_group} holds no such examples "
                    f"({str(error).strip()[:120]}). Adopt the files again."
                ) from error
        if not self._keeps:
            return own
        if isinstance(examples, np.ndarray):
            in_place = self._view(group, len(labels))
            if stamp is not None and in_place is not None and _same_bytes(in_place, examples):
                self._in_place[key] = in_place[group.start : end], stamp
                return own
        self._keep((group.shard, group.row_group), examples, labels)
        return own

    def _are_of(self, class_id: int, labels: np.ndarray | pa.Array) -> bool:
        if self.manifest.layout is None:
            return bool((labels == class_id).all())
        entry = self.manifest.classes[class_id]
        return all_are(labels, entry.group if self.manifest.layout.group else None, entry.label or "")

    def _decode(self, shard: int, row_group: int) -> tuple[_Decoded, np.ndarray | pa.Array]:
        """The examples of a row group and their labels. Raises ValueError and pyarrow's errors: nothing to be read."""
        kept = self._decoded.get((shard, row_group))
        if kept is not None:
            self._decoded.move_to_end((shard, row_group))
            return kept
        return self._read(self._open(shard), shard, row_group)

    def _decode_once(self, shard: int, row_group: int) -> tuple[_Decoded, np.ndarray | pa.Array]:
        """As `_decode`, from a file that is opened for it."""
        with self._lock:
            footer = self._footers.get(shard)
        file = self._parquet(shard, footer)
        try:
            with self._lock:
                self._footers[shard] = file.metadata
                self._footers.move_to_end(shard)
                while len(self._footers) > KEPT_FOOTERS:
                    oldest, _ = self._footers.popitem(last=False)
                    self._chunks.pop(oldest, None)
            return self._read(file, shard, row_group)
        finally:
            file.close(force=True)

    def _read(self, file: pq.ParquetFile, shard: int, row_group: int) -> tuple[_Decoded, np.ndarray | pa.Array]:
        modality = self.manifest.modality
        layout = self.manifest.layout
        if layout is not None:
            table = bounded_table(file, self._chunks[shard], row_group, layout.columns)
            return column_of(table, layout.example), labels_of(table, layout)
        columns = ["class_id", COLUMN[modality]]
        if self._fixed:
            table = file.read_row_group(row_group, columns=columns, use_threads=self._keeps)
            examples = from_arrow(modality, self.manifest.shape, table.column(columns[1]))
        else:
            table = bounded_table(file, self._chunks[shard], row_group, columns)
            examples = table.column(columns[1]).combine_chunks()
            if examples.null_count:
                raise ValueError("an example is missing")
        return examples, table.column(columns[0]).to_numpy()

    def _keep(self, key: tuple[int, int], examples: _Decoded, labels: np.ndarray | pa.Array) -> None:
        with self._lock:
            self._decoded[key] = examples, labels
            self._decoded.move_to_end(key)
            while len(self._decoded) > 1 and sum(kept[0].nbytes for kept in self._decoded.values()) > CACHE_BYTES:
                self._decoded.popitem(last=False)

    def _view(self, group: RowGroup, rows: int) -> np.ndarray | None:
        """The end of the row group's column of examples in the mapped file: where they lie if they are in one page.

        None for an object store. A plain page of required fixed-size values is a header and the values.
        """
        path = self.folder / self.manifest.shards[group.shard].file
        if not isinstance(path, Path):
            return None
        size = self.manifest.example_bytes or 0
        kind = np.float32 if self.manifest.modality == "vector" else np.uint8
        try:
            with self._lock:
                self._open(group.shard)
                chunks = self._chunks[group.shard][group.row_group].chunks
                column = next(chunk for chunk in chunks if chunk.column == COLUMN[self.manifest.modality])
                end = column.data_page + column.compressed
                start = end - rows * size
                if group.shard not in self._maps:
                    self._maps[group.shard] = np.memmap(path, np.uint8, mode="r")
            return self._maps[group.shard][max(start, 0) : end].view(kind).reshape(rows, *self.manifest.shape)
        except (OSError, ValueError, StopIteration):  # not to be mapped, or a footer that points elsewhere
            return None

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self._parquet(shard, None)
        return self._files[shard]

    def _parquet(self, shard: int, footer: pq.FileMetaData | None) -> pq.ParquetFile:
        """A shard, opened. footer: its own, where it was read and checked before."""
        file = self.folder / self.manifest.shards[shard].file
        if leads_outside(self.folder, file):
            raise ValueError("it is a link to a place outside the data set's folder")
        parquet = pq.ParquetFile(
            file if isinstance(file, Path) else file.open_input(),
            metadata=footer,
            memory_map=isinstance(file, Path) and self._keeps,
            pre_buffer=not isinstance(file, Path),  # few and large requests
            page_checksum_verification=True,
        )
        if footer is None:
            footers = row_groups(file)
            if self.manifest.layout is not None:
                check_row_groups(parquet, footers, self.manifest.layout)
            else:
                _check_size(parquet, footers, self.manifest)
            self._chunks[shard] = footers
        return parquet


def _rows(decoded: _Decoded, rows: np.ndarray | None = None) -> Examples:
    """Rows of what was decoded, or all of it, as `read_class` gives them."""
    if isinstance(decoded, np.ndarray):
        return decoded if rows is None else decoded[rows]
    return (decoded if rows is None else decoded.take(pa.array(rows))).to_pylist()


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Of float32 too: a missing value is one however it is compared."""
    return np.array_equal(one.view(np.uint8), np.ascontiguousarray(other).view(np.uint8))


def leads_outside(folder: Readable, file: Readable) -> bool:
    """Whether a symbolic link takes a shard out of its data set's folder. The folder itself may be one."""
    return isinstance(folder, Path) and isinstance(file, Path) and not file.resolve().is_relative_to(folder.resolve())


def _check_size(parquet: pq.ParquetFile, footers: Sequence[RowGroupFooter], manifest: Manifest) -> None:
    """Raises ValueError where reading could take much more memory than the file is long.

    Compressed pages and dictionaries unfold to thousands of times their size; ours have neither, and examples of a
    fixed size bound what a row group decodes to. Looks only at the footer.
    """
    schema = parquet.schema_arrow
    size = manifest.example_bytes
    if not _is_type(schema.field(COLUMN[manifest.modality]).type, manifest) or schema.field("class_id").type != (
        pa.int32()
    ):
        what = f"images are not of {size} bytes" if manifest.modality == "image" else f"{manifest.modality} is not that"
        raise ValueError(f"its {what} each")
    for number, footer in enumerate(footers):
        longest = max((chunk.uncompressed for chunk in footer.chunks), default=0)
        if footer.rows * max(size or 0, 4) > max(bounds.MAX_ROW_GROUP_BYTES, size or 0) or (
            size is None and longest > bounds.MAX_ROW_GROUP_BYTES
        ):
            what = "images" if manifest.modality == "image" else "examples"
            raise ValueError(f"row group {number} is of {footer.rows} {what}, too many to be read at once")
        if any(chunk.codec != UNCOMPRESSED or chunk.has_dictionary for chunk in footer.chunks):
            raise ValueError(f"row group {number} is compressed, which our shards never are")


def _is_type(given: pa.DataType, manifest: Manifest) -> bool:
    if manifest.modality == "vector":
        return (
            pa.types.is_fixed_size_list(given)
            and given.list_size == manifest.shape[0]
            and given.value_type == pa.float32()
        )
    return given == arrow_type(manifest.modality, manifest.shape)
