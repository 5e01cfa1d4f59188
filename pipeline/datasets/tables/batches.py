"""The rows of CSV and Parquet files, a batch at a time, and what cannot be read of them."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.datasets.source import Problem
from pipeline.datasets.tables import csv_blocks
from pipeline.datasets.tables.scanning import CONVERT, plain
from pipeline.errors import DataError

BATCH_ROWS = 16_384  # of a Parquet file, at most
BATCH_BYTES = 32 << 20  # that they take in the file before compression, about
BUFFER_BYTES = 1 << 20  # of each column of a Parquet file
SNIFFED = 4096  # bytes of a CSV file that tell whether it is text
CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".csv.bz2", ".csv.zst")
PARQUET_SUFFIXES = (".parquet", ".pq")
BLANK = re.compile(rb"\A[\r\n]|\n[\r\n]|\r\r")  # a line, or two in a quoted cell
LINE_END = re.compile(rb"\r\n|\r|\n")
INDEX = re.compile(r"Unnamed: 0(\.\d+)*|__index_level_\d+__")


class Batch(NamedTuple):
    """Some rows of a file, in order."""

    file: Path
    numbers: np.ndarray  # int64 [rows], of each in its file, from 1 on; a header is a row too, as a spreadsheet counts
    table: pa.RecordBatch  # columns of a CSV file are binary
    problems: list[Problem]  # rows that are left out


class CsvFiles:
    """CSV files with the same columns.

    shown: what problems call each file. index_columns: those that number the rows, as pandas
    writes them. Raises DataError: no such file, or its first row is none.
    """

    def __init__(self, place: Path, *, delimiter: str = ",", header: bool = True) -> None:
        self.files = files_at(place, CSV_SUFFIXES)
        self.shown = _shown(place, self.files)
        self._header = header
        self._delimiter = delimiter
        self._cut = csv_blocks.Cut.by(delimiter)
        first = next((block for _, block in self._blocks(self.files[0]) if block), b"")
        self.names = self._names(first, self.files[0])
        self.index_columns = [name for name in self.names if _is_index(name)]

    def batches(self, columns: list[str]) -> Iterator[Batch]:
        """Raises DataError: a file cannot be read, or has other columns than the first."""
        for file in self.files:
            names: list[str] = []
            ahead = 1
            for blanks, block in self._blocks(file):
                ahead += blanks
                if not names and block:
                    names = self._names(block, file)
                    _check_names(file, names, self.names)
                    if self._header:
                        block, ahead = block[len(self._first_row(block)) :], ahead + 1
                if not block:
                    continue
                skipped: list[Any] = []
                table = self._parsed(block, file, names, skipped, ahead).select(columns)
                places, rows = self._places(block, len(table) + len(skipped))
                problems = []
                for row in skipped:
                    reason = f"has {row.actual_columns} cells and not {row.expected_columns}"
                    problems.append(Problem(f"{self.shown[file]}: row {ahead + places[row.number - 1]}", reason))
                left = np.delete(places, [row.number - 1 for row in skipped])
                yield Batch(file, ahead + left, table, problems)
                ahead += rows

    def _blocks(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """The file's rows as bytes, without blank lines at the start of a block, and how many these are."""
        split = False  # whether \r\n may lie half in the block before
        try:
            with pa.input_stream(str(file)) as stream:  # a compressed file by its name
                for number, block in enumerate(csv_blocks.blocks(stream, self._cut)):
                    start = block[:SNIFFED]
                    if number == 0 and (b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):
                        raise DataError(f"{file}: its first row is not UTF-8 but UTF-16, or no text at all. {CONVERT}")
                    rest = block.lstrip(b"\r\n")
                    blank = block[: len(block) - len(rest)]
                    yield len(LINE_END.findall(blank)) - (split and blank.startswith(b"\n")), rest
                    split = block.endswith(b"\r")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file}: not a table that can be read ({_short(error)}).") from error

    def _places(self, block: bytes, count: int) -> tuple[np.ndarray, int]:
        """Which rows of a block the `count` ones are that are not blank, int64 [count] from 0 on; how many it has."""
        if BLANK.search(block):
            places: list[int] = []
            rows = at = 0
            while at < len(block):
                found = self._cut.row.match(block, at)
                assert found is not None, "it matches anything"
                if found.group().strip(b"\r\n"):
                    places.append(rows)
                rows, at = rows + 1, found.end()
            if len(places) == count:  # else Arrow takes quotation marks in other places for some
                return np.array(places, dtype=np.int64), rows
        return np.arange(count), count

    def _first_row(self, block: bytes) -> bytes:
        found = self._cut.row.match(block)
        return found.group() if found else b""

    def _names(self, block: bytes, file: Path) -> list[str]:
        if not block:
            raise DataError(f"{file}: not a table that can be read (it is empty).")
        first = self._first_row(block)
        names = self._parsed(first, file, None, [], 1).schema.names
        if not self._header:
            return names
        row = self._parsed(first, file, names, [], 1)
        try:
            return _unique(file, [value.as_py().decode() for (value,) in row.columns])
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: its first row is not UTF-8. {CONVERT}") from error

    def _parsed(
        self, block: bytes, file: Path, names: list[str] | None, skipped: list[Any], first: int
    ) -> pa.RecordBatch:
        """The block's rows, of binary columns; of any type and named f0, f1, … where `names` is None.

        skipped: gets the rows with another number of cells. first: number of the first row.
        """

        def skip(row: Any) -> str:
            skipped.append(row)
            return "skip"

        content = csv_blocks.marked(block)
        ended = content if b"\n" in content or b"\r" in content else content + b"\n"  # or Arrow takes a row for none
        try:
            table = pa_csv.read_csv(
                pa.BufferReader(ended),
                read_options=pa_csv.ReadOptions(
                    block_size=len(ended) + 1,
                    use_threads=False,
                    column_names=names,
                    autogenerate_column_names=names is None,
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=self._delimiter,
                    newlines_in_values=True,
                    invalid_row_handler=skip,
                ),
                convert_options=pa_csv.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(names or (), pa.binary()),
                    strings_can_be_null=False,
                    null_values=[],
                ),
            )
        except pa.ArrowException as error:
            raise DataError(f"{file}: cannot be read from row {first} on ({_short(error)}).") from error
        arrays = [pa.concat_arrays(column.chunks) if column.num_chunks else None for column in table.columns]
        if names is not None and len(content) > len(block):
            arrays = [csv_blocks.unmarked(array) for array in arrays]
        return pa.RecordBatch.from_arrays(arrays, table.schema.names)


class ParquetFiles:
    """Parquet files with the same columns.

    shown: what problems call each file. index_columns: those that number the rows, as pandas
    writes them. Raises DataError: no such file, or not Parquet.
    """

    def __init__(self, place: Path) -> None:
        self.files = files_at(place, PARQUET_SUFFIXES)
        self.shown = _shown(place, self.files)
        schema = self._open(self.files[0]).schema_arrow
        self.names = _unique(self.files[0], schema.names)
        declared = _declared_index(schema)
        self.index_columns = [name for name in self.names if name in declared or _is_index(name)]

    def _open(self, file: Path) -> pq.ParquetFile:
        try:
            # not mapped, or a file that is cut short meanwhile ends the process; buffered, or row groups are read whole
            return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a Parquet file that can be read ({_short(error)}).") from error

    def batches(self, columns: list[str]) -> Iterator[Batch]:
        """Raises DataError: a file cannot be read, or has other columns than the first."""
        for file in self.files:
            with self._open(file) as parquet:
                _check_names(file, parquet.schema_arrow.names, self.names)
                first = 1
                try:
                    rows_of = _batch_rows(parquet, columns)
                    for rows, row_groups in itertools.groupby(range(len(rows_of)), key=rows_of.__getitem__):
                        for table in parquet.iter_batches(rows, list(row_groups), columns=columns, use_threads=False):
                            numbers = np.arange(first, first + len(table))
                            arrays = [plain(table.column(name)) for name in columns]
                            yield Batch(file, numbers, pa.RecordBatch.from_arrays(arrays, columns), [])
                            first += len(table)
                except (pa.ArrowException, OSError) as error:
                    names = ", ".join(map(repr, _unreadable(file, columns))) or "all columns together"
                    raise DataError(
                        f"{file}: {names} cannot be read after row {first - 1} ({_short(error)}). Leave it out "
                        "(--leave-out), or write the file anew."
                    ) from error


def _is_index(name: str) -> bool:
    """Whether a column's name is what pandas writes, or reads, for an index without a name."""
    return not name.strip() or INDEX.fullmatch(name) is not None


def _declared_index(schema: pa.Schema) -> set[str]:
    """The columns that pandas has noted in the file as its index."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        return {each for each in noted["index_columns"] if isinstance(each, str)}
    except (ValueError, TypeError, KeyError):  # another program's note, or none
        return set()


def _unreadable(file: Path, columns: list[str]) -> list[str]:
    """The columns that cannot be read, each alone."""
    found = []
    for name in columns:
        try:
            with pq.ParquetFile(file) as parquet:
                for table in parquet.iter_batches(BATCH_ROWS, columns=[name], use_threads=False):
                    plain(table.column(name))
        except (pa.ArrowException, OSError):
            found.append(name)
    return found


def _batch_rows(parquet: pq.ParquetFile, columns: list[str]) -> list[int]:
    """How many rows of each row group are read at once, by what the columns take there."""
    found = []
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        parts = (group.column(i) for i in range(group.num_columns))
        size = sum(p.total_uncompressed_size for p in parts if _is_of(p.path_in_schema, columns))
        found.append(min(BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, size))))
    return found


def _is_of(path: str, columns: list[str]) -> bool:
    """Whether a leaf of the file is, or lies in, one of the columns; names may hold dots."""
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def files_at(place: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file, or those with one of the suffixes in a folder, by name; if it has none, those below. Raises DataError."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder.")
    files = sorted(p for p in place.iterdir() if _is_table(p.relative_to(place), suffixes) and not p.is_dir())
    if not files:  # a hub has them in data/, Spark and others in folders of their own
        files = sorted(p for p in place.rglob("*") if _is_table(p.relative_to(place), suffixes) and p.is_file())
    if not files:
        raise DataError(f"{place}: holds no file named *{', *'.join(suffixes)}, nor do the folders in it.")
    return files


def _is_table(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes) and not any(part.startswith(".") for part in path.parts)


def _shown(place: Path, files: list[Path]) -> dict[Path, str]:
    """The path of each file in the folder that was given."""
    return {file: file.name if file == place else file.relative_to(place).as_posix() for file in files}


def _unique(file: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: two columns are named {twice[0]!r}. Rename one.")
    return list(names)


def _check_names(file: Path, names: list[str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{file}: has no column {missing[0]!r}, as the first file has.")


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
