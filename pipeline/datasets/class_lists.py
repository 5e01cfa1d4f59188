"""Class splits given as lists: one file of names and parts, or a file of names for each part.

    lists.csv                             a row for each: birds,test (or with a tab; after class,part, if need be)
    lists/train.txt, val.txt, test.txt    a name a line; of .csv files with a column label, that column

A name is a class's, or a group's for all the classes in it.
"""

from __future__ import annotations

import csv
import difflib
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pipeline.errors import DataError
from pipeline.types import Split

PARTS: dict[str, Split] = {
    **dict.fromkeys(("meta_train", "train", "training"), "meta_train"),
    **dict.fromkeys(("meta_val", "val", "valid", "validation", "dev"), "meta_val"),
    **dict.fromkeys(("meta_test", "test", "testing"), "meta_test"),
}
SUFFIXES = (".txt", ".csv")
MAX_BYTES = 64 << 20

Row = TypeVar("Row")


def read_class_lists(path: Path) -> dict[str, Split]:
    """Name of a class or group -> its part.

    Raises DataError: no such file, an unknown part, a name in two parts, or nothing in it.
    """
    found: dict[str, Split] = {}
    for where, name, part in _by_part(path) if path.is_dir() else _with_parts(path):
        if found.setdefault(name, part) != part:
            raise DataError(f"{where}: {name} is in {found[name]} already. A class belongs to one part.")
    if not found:
        raise DataError(f"{path}: names no classes.")
    return found


def by_lists(groups: Mapping[str, str], lists: Mapping[str, Split], *, source: str) -> dict[str, Split]:
    """Class name -> part, of the classes that are listed by themselves or by their group. groups: class name -> group.

    Names may be in another Unicode form than there, as those of files on macOS are.

    Raises DataError: a name that is neither a class nor a group (a slip would move the class to nowhere), or that may
    be one of two; or a class in two parts.
    """
    known = groups.keys() | set(groups.values())
    forms: dict[str, list[str]] = {}
    for name in sorted(known):
        forms.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    listed: dict[str, Split] = {}
    for name, part in lists.items():
        found = [name] if name in known else forms.get(unicodedata.normalize("NFC", name), [])
        if not found:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "there is neither a class nor a group of this name"
            raise DataError(f"{source}: {name}: not in the raw data ({hint}).")
        if len(found) > 1:
            codes = " and ".join(map(ascii, found))
            raise DataError(f"{source}: {name}: may be {codes} of the raw data. Write it in one of these forms.")
        if listed.setdefault(found[0], part) != part:
            raise DataError(f"{source}: {name} is in {listed[found[0]]} already. A class belongs to one part.")
    parts = {name: listed.get(name, listed.get(group)) for name, group in groups.items()}
    return {name: part for name, part in parts.items() if part is not None}


def _with_parts(path: Path) -> Iterator[tuple[str, str, Split]]:
    lines = _lines(path)
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    for number, row in enumerate(_rows(path, csv.reader(lines, delimiter=delimiter)), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells[-1].lower() in ("part", "split")):
            continue
        if len(cells) != 2 or cells[1] not in PARTS or not cells[0]:
            raise DataError(
                f"{path}, line {number}: write a class and its part (train, val or test), as in: birds,test"
            )
        yield f"{path}, line {number}", cells[0], PARTS[cells[1]]


def _by_part(folder: Path) -> Iterator[tuple[str, str, Split]]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.stem in PARTS)
    if not files:
        raise DataError(f"{folder}: holds no train.txt, val.txt or test.txt (or .csv) of class names.")
    for file in files:
        lines = _lines(file)
        if file.suffix == ".csv" and lines and "label" in lines[0].split(","):
            lines = [row["label"] or "" for row in _rows(file, csv.DictReader(lines))]
        for name in dict.fromkeys(line.strip() for line in lines):
            if name:
                yield str(file), name, PARTS[file.stem]


def _rows(path: Path, reader: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}: not a list of classes ({error}).") from error


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, so it is no list of classes.")
        return path.read_text(encoding="utf-8-sig").split("\n")  # splitlines cuts names too, at U+2028 and others
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder of class lists.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}).") from error
