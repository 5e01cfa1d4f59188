"""Files that a user shows a model of texts or of tables: CSV files, or a text on each line."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError

MAX_BYTES = 100 << 20  # of a file that is shown; more is a data set


class Labelled(NamedTuple):
    examples: list[Any]  # texts, or rows as dicts
    labels: list[str]


def read_support(file: Path, *, label: str, text: str | None) -> Labelled:
    """A CSV file's rows and their labels. text: the column of the texts; None: the rows themselves.

    Raises DataError: no such file or column, or a row without a label.
    """
    rows = _rows(file, [label] if text is None else [label, text])
    for number, row in enumerate(rows, start=2):
        if not (row[label] or "").strip():
            raise DataError(f"{file}: row {number} has no label (column {label!r}). Give it one, or remove the row.")
    labels = [row[label].strip() for row in rows]
    return Labelled([row[text] if text else {k: v for k, v in row.items() if k != label} for row in rows], labels)


def read_queries(file: Path, *, text: str | None) -> list[Any]:
    """A CSV file's rows or texts; of any other file of texts, each line that is not empty. Raises DataError."""
    if text is None or file.suffix.lower() == ".csv":
        rows = _rows(file, [] if text is None else [text])
        return [row[text] for row in rows] if text else rows
    lines = [line.strip() for line in re.split(r"\r?\n", _read(file))]  # str.splitlines cuts within texts: at U+2028, …
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


def _rows(file: Path, needed: list[str]) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(_read(file), newline=""), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{file}: not a CSV file that can be read ({error}).") from error
    for name in needed:
        if name not in (reader.fieldnames or ()):
            known = ", ".join((reader.fieldnames or ())[:20])
            raise DataError(f"{file}: has no column {name!r}; it has: {known}. Name another with --label or --text.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DataError(f"{file}: row {number} has not {len(reader.fieldnames or ())} cells, as the header has.")
    if not rows:
        raise DataError(f"{file}: holds no row below its header.")
    return rows
