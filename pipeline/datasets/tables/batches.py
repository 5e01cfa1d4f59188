"""The rows of CSV and Parquet files, a batch at a time, and what cannot be read of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.datasets.source import Problem
from pipeline.errors import DataError

BATCH_ROWS = 16_384  # of a Parquet file, at most
BATCH_BYTES = 32 << 20  # that they take in the file before compression, about
BUFFER_BYTES = 1 << 20  # of each column of a Parquet file
BLOCK_BYTES = 2 << 20  # of a CSV file: a row may not be longer, and Arrow reads up to 32 blocks ahead
CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".csv.bz2", ".csv.zst")
PARQUET_SUFFIXES = (".parquet", ".pq")


class Batch(NamedTuple):
    """Some rows of a file, in order."""

    file: Path
    numbers: np.ndarray  # int64 [rows], of each in its file, from 1 on; a header is a row too, as a spreadsheet counts
    table: pa.RecordBatch  # columns of a CSV file are binary
    problems: list[Problem]  # rows that are left out


class CsvFiles:
    """CSV files with the same columns. Raises DataError: no such file."""

    def __init__(self, place: Path, *, delimiter: str = ",", header: bool = True) -> None:
        self.files = files_at(place, CSV_SUFFIXES)
        self._header = header
        self._delimiter = delimiter
        self.names = self._names(self.files[0])

    def _names(self, file: Path) -> list[str]:
        try:
            names = self._open(file, {}, lambda row: "skip").schema.names
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: its first row is not UTF-8. Convert the file to UTF-8: in Excel save it as 'CSV UTF-8', or "
                "use iconv -f LATIN1 -t UTF-8 (-f UTF-16 if Excel saved it as Unicode text)."
            ) from error
        return _unique(file, names)

    def _open(self, file: Path, types: dict[str, Any], invalid_row: Callable[[Any], str]) -> Any:
        try:
            return pa_csv.open_csv(
                file,
                read_options=pa_csv.ReadOptions(
                    block_size=BLOCK_BYTES, use_threads=False, autogenerate_column_names=not self._header
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=invalid_row
                ),
                convert_options=pa_csv.ConvertOptions(
                    check_utf8=False, column_types=types, strings_can_be_null=False, null_values=[]
                ),
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a table that can be read ({_short(error)}).") from error

    def batches(self, columns: list[str]) -> Iterator[Batch]:
        """Raises DataError: a file cannot be read, or has other columns than the first."""
        for file in self.files:
            names = self._names(file)
            _check_names(file, names, self.names)
            skipped: list[Any] = []

            def skip(row: Any, skipped: list[Any] = skipped) -> str:
                skipped.append(row)
                return "skip"

            # binary: texts are decoded where a bad one can be told by its row
            reader = self._open(file, dict.fromkeys(names, pa.binary()), skip)
            ahead = 1 + self._header
            while True:
                try:
                    table = reader.read_next_batch()
                except StopIteration:
                    table = table_of_nothing(columns)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{file}: cannot be read after row {ahead - 1} ({_short(error)}).") from error
                numbers: list[int] = []
                problems: list[Problem] = []
                while len(numbers) < len(table) or (len(table) == 0 and skipped):
                    if skipped and skipped[0].number == ahead:  # the reader is a block ahead of what it hands out
                        row = skipped.pop(0)
                        reason = f"has {row.actual_columns} cells and not {row.expected_columns}"
                        problems.append(Problem(f"{file.name}: row {row.number}", reason))
                    elif len(table) == 0:
                        ahead = skipped[0].number
                        continue
                    else:
                        numbers.append(ahead)
                    ahead += 1
                yield Batch(file, np.array(numbers, dtype=np.int64), table.select(columns), problems)
                if len(table) == 0:
                    break


class ParquetFiles:
    """Parquet files with the same columns. Raises DataError: no such file, or not Parquet."""

    def __init__(self, place: Path) -> None:
        self.files = files_at(place, PARQUET_SUFFIXES)
        self.names = _unique(self.files[0], self._open(self.files[0]).schema_arrow.names)

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
                            yield Batch(file, numbers, table.select(columns), [])
                            first += len(table)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{file}: cannot be read after row {first - 1} ({_short(error)}).") from error


def _batch_rows(parquet: pq.ParquetFile, columns: list[str]) -> list[int]:
    """How many rows of each row group are read at once, by what the columns take there."""
    found = []
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        parts = (group.column(i) for i in range(group.num_columns))
        size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] in columns)
        found.append(min(BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, size))))
    return found


def table_of_nothing(columns: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({name: pa.array([], pa.binary()) for name in columns})


def files_at(place: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file, or those with one of the suffixes in a folder, by name. Raises DataError."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder.")
    files = sorted(p for p in place.iterdir() if p.name.lower().endswith(suffixes) and not p.name.startswith("."))
    if not files:
        raise DataError(f"{place}: holds no file named *{', *'.join(suffixes)}.")
    return files


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
