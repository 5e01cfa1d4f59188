"""Files that a user shows a model of texts or of tables: CSV files, or a text on each line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError

MAX_BYTES = 100 << 20  # of a file that is shown; more is a data set


class Rows(NamedTuple):
    """Of a CSV file, by the names in its header."""

    file: Path
    columns: list[str]
    rows: list[dict[str, str]]
    numbers: list[int]  # of each row in the file: the header is row 1

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.file}: row {self.numbers[index]}"

    def with_points(self, columns: Collection[str], decimal: str) -> list[dict[str, str]]:
        """The rows, where numbers in these columns that have another decimal sign have a point.

        Raises DataError: a number has a point already, which may part thousands.
        """
        if decimal == ".":
            return self.rows
        for index, row in enumerate(self.rows):
            for name in columns:
                if "." in (value := row.get(name, "")) and re.search(r"\d", value):
                    raise DataError(
                        f"{self.place(index)}: column {name!r} holds {value!r}, and --decimal {decimal} says that "
                        "points are not decimal. Write the number without them."
                    )
        return [{k: v.replace(decimal, ".") if k in columns else v for k, v in row.items()} for row in self.rows]

    def cells(self, column: str, *, option: str) -> list[str]:
        """Of the column that an option names. Raises DataError: it is not there, or empty in a row."""
        if column not in self.columns:
            known = ", ".join(self.columns[:20])
            raise DataError(f"{self.file}: has no column {column!r}; it has: {known}. Name another with {option}.")
        for index, row in enumerate(self.rows):
            if not row[column].strip():
                what = option.removeprefix("--")
                raise DataError(
                    f"{self.place(index)} has no {what} (column {column!r}). Give it one, or remove the row."
                )
        return [row[column] for row in self.rows]


class Labelled(NamedTuple):
    """Rows and the label of each."""

    rows: Rows
    labels: list[str]


def read_support(file: Path, *, label: str, delimiter: str = ",") -> Labelled:
    """A CSV file's rows and their labels, from the column of this name. Raises DataError as `read_rows`; no label."""
    rows = read_rows(file, delimiter=delimiter)
    return Labelled(rows, [cell.strip() for cell in rows.cells(label, option="--label")])


def read_rows(file: Path, *, delimiter: str = ",") -> Rows:
    """A CSV file's rows, of which it has one or more. Raises DataError: it cannot be read, or a row has other cells."""
    # StringIO cuts at line ends alone; str.splitlines cuts within texts: at U+2028, form feeds, …
    reader = csv.reader(io.StringIO(_read(file), newline=""), delimiter=delimiter, strict=True)
    try:
        filled = [(number, cells) for number, cells in enumerate(reader, start=1) if cells]
    except csv.Error as error:
        raise DataError(f"{file}: not a CSV file that can be read (line {reader.line_num}: {error}).") from error
    (_, columns), *numbered = filled or [(1, [])]
    for number, cells in numbered:
        if len(cells) != len(columns):
            raise DataError(f"{file}: row {number} has not {len(columns)} cells, as the header has.")
    if not numbered:
        raise DataError(f"{file}: holds no row below its header.")
    rows = [dict(zip(columns, cells, strict=True)) for _, cells in numbered]
    return Rows(file, columns, rows, [number for number, _ in numbered])


def read_lines(file: Path) -> list[str]:
    """Each line of a file of texts that is not empty, without blanks around it. Raises DataError: there is none."""
    lines = [line.strip() for line in re.split(r"\r?\n", _read(file))]
    if not any(lines):
        raise DataError(f"{file}: holds no text.")
    return [line for line in lines if line]


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{file}: has more than {MAX_BYTES >> 20} MB. Show a part of it.")
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return opened.read()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Give a CSV file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error
