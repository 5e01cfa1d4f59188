"""`metapipe data prepare csv` and `parquet`: any table whose rows are labelled examples.

An example is what the columns beside the label and the group hold (numbers, categories, lists of numbers), or the one
column that is named as the text or the picture. A class is a label, or, with groups, a label within a group.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.datasets.labels import check_classes
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.datasets.source import Column, Examples, Modality, Problem, Put, RawClass, Source
from pipeline.datasets.sources import FolderOptions
from pipeline.datasets.splits import class_splits
from pipeline.datasets.tables import scanning, sorting
from pipeline.datasets.tables.batches import Batch, CsvFiles, ParquetFiles
from pipeline.datasets.tables.csv_blocks import delimiter_of
from pipeline.datasets.tables.scanning import MAX_CLASSES, ColumnScan, names_of
from pipeline.errors import ConfigError, DataError
from pipeline.types import Split

MAX_TEXT_BYTES = 1 << 20  # of an example; more is no sentence
DELIMITERS = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
REMARKS = 5  # of columns, each with its own words
HALF = 0.5  # of the rows; with more classes than that the label is none


class TableOptions(FolderOptions):
    """Of a table, in whatever file."""

    directory: Path | None = Field(None, description="A file, or a folder of files with the same columns.")
    label: str = Field("label", description="Column of the classes' names.")
    group: str | None = Field(None, description="Column of their groups (domain, clinic), which the split group keeps.")
    text: str | None = Field(None, description="Column of texts, which are the examples.")
    image: str | None = Field(None, description="Column of pictures (bytes, or a struct of bytes and path).")
    features: list[str] | None = Field(None, description="Columns that are the examples (default: all others).")
    leave_out: list[str] | None = Field(None, description="Columns that are not used.")
    numeric: list[str] | None = Field(None, description="Columns that are numbers, whatever they look like.")
    categorical: list[str] | None = Field(None, description="Columns that are categories, even if written as numbers.")
    decimal: Literal[".", ","] | None = Field(
        None, description="Sign before the fraction of numbers that are texts, as all are in CSV (default: a point)."
    )
    kind: Literal["drawing", "photo"] = Field("photo", description="Of pictures. drawing: grey, ink high. photo: RGB.")
    size: int = Field(84, ge=8, le=1024, description="Of pictures: height and width in pixels.")

    def table(self) -> CsvFiles | ParquetFiles:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What was asked for; pictures alone have a kind and a size."""
        of_pictures = {"kind", "size"} if self.image is None else set()
        return self.model_dump(mode="json", exclude_none=True, exclude={"directory", *of_pictures})

    def open(self, *, seed: int) -> Table:
        return Table(self, self.table())


class CsvOptions(TableOptions):
    """Of CSV files."""

    directory: Path | None = Field(
        None, description="A CSV file (also .gz), or a folder of them with the same columns."
    )
    delimiter: str = Field(",", description="Between cells: one character, or tab.")
    no_header: bool = Field(False, description="The first row is an example; columns are named f0, f1, …")

    def table(self) -> CsvFiles:
        return CsvFiles(self.folder(), delimiter=delimiter_of(self.delimiter), header=not self.no_header)


class ParquetOptions(TableOptions):
    """Of Parquet files."""

    directory: Path | None = Field(None, description="A Parquet file, or a folder of them with the same columns.")

    def table(self) -> ParquetFiles:
        return ParquetFiles(self.folder())


class _Scan(NamedTuple):
    classes: dict[str, tuple[str, str]]  # name -> (group, label), in the order of these
    problems: list[Problem]  # classes that are left out for their names, or look like another
    counts: list[int]  # rows of each, before any is found to be bad
    sizes: list[int]  # bytes of its texts or pictures
    columns: list[Column]  # of vectors
    scans: dict[str, ColumnScan]


class Table(Source):
    """Labelled rows. Raises ConfigError: a column is not there, or has two roles."""

    def __init__(self, options: TableOptions, table: CsvFiles | ParquetFiles) -> None:
        self._options = options
        self._table = table
        self._files = [table.shown[file] for file in table.files]
        self._number_of = {file: number for number, file in enumerate(table.files)}
        self._version = _version(table.files)  # before the first reading, so that an edit during it is told too
        self._content = options.text or options.image
        self._features = _features(options, table.names, table.index_columns)
        if options.image is not None:
            channels: Literal[1, 3] = 3 if options.kind == "photo" else 1
            self.preprocessing = Preprocessing(kind=options.kind, size=options.size, channels=channels)
        self.modality: Modality = "text" if options.text else "image" if options.image else "vector"
        self.copies = options.image is None
        self._folder: Path | None = None

    def __getstate__(self) -> dict[str, Any]:  # of a copy in another process, which only reads
        return {name: self.__dict__.get(name) for name in ("_folder", "_files", "copies", "modality", "preprocessing")}

    def work_in(self, folder: Path) -> None:
        self._folder = folder  # of the sorted rows

    @property
    def columns(self) -> Sequence[Column]:  # type: ignore[override]
        return self._scan.columns

    def class_groups(self) -> dict[str, str]:  # without sorting
        return {name: group for name, (group, _) in self._scan.classes.items()}

    def version(self) -> str:
        return self._version

    def remarks(self) -> list[str]:
        used = {*self._features, self._options.label, self._options.group, *(self._options.leave_out or ())}
        left = [name for name in self._table.index_columns if name not in used]
        found = [remark for scan in self._scan.scans.values() if (remark := scan.remark())]
        if len(found) > REMARKS:
            more = f"{len(found) - REMARKS} other columns have whole numbers that are rounded as well"
            found = [*found[:REMARKS], more]
        if self._content or not left:
            return found
        return [
            *found,
            f"{_listed(left, 'column')} left out, as an index that numbers the rows: in a sorted table it would tell "
            "the class. If it is a feature, name it and the other ones with --features.",
        ]

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return class_splits(self.class_groups(), seed=seed)

    def classes(self) -> Iterator[RawClass]:
        rows = self._sorted()
        told = [*self._scan.problems, *rows.problem_files]  # of rows without a class too, with the first one
        for class_id, (name, (group, _)) in enumerate(self._scan.classes.items()):
            yield RawClass(name, group, itertools.chain(told, rows.items(class_id)))
            told = []

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        return _read(self._folder, self.modality, self.preprocessing, items, self._files)

    def elsewhere(self, items: Sequence[Any], put: Put) -> Sequence[Any]:
        assert self._folder is not None
        found: list[Any] = []
        for item in items:
            if isinstance(item, sorting.RowRange):
                origins = sorting.read_origins(self._folder, item) if self.modality == "image" else []
                found.append(_Sent(item, put(_rows_of(self._folder, item)), origins))
            elif isinstance(item, sorting.ProblemFile):
                found += sorting.read_problems(self._folder, item)
            else:
                found.append(item)
        return found

    @cached_property
    def _scan(self) -> _Scan:
        """The first reading."""
        options = self._options
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        asked = dict.fromkeys(options.numeric or (), "numeric") | dict.fromkeys(
            options.categorical or (), "categorical"
        )
        scans = {
            name: ColumnScan(name, asked.get(name), options.decimal or ".")  # type: ignore[arg-type]
            for name in self._features
        }
        rows = 0
        first: list[Problem] = []  # of the first batch that has some
        types: dict[str, tuple[Path, pa.DataType]] = {}
        for batch in self._batches():
            self._check_types(batch, types)
            members, reasons = self._members(batch)
            first = first or [*batch.problems, *self._named(batch, reasons)][:1]
            counts.update(member for member in members if member is not None)
            rows += len(members)
            if len(counts) > MAX_CLASSES:
                raise DataError(f"column {options.label!r}: more than {MAX_CLASSES:,} classes. Is it the label?")
            if self._content:
                for member, content in zip(members, self._contents(batch)[0], strict=True):
                    if member is not None and content is not None:
                        sizes[member] += len(content)
            for name, scan in scans.items():
                with _naming(batch.file):
                    scan.add(batch.table.column(name))
        if not counts:
            told = f" ({first[0].item} {first[0].reason})" if first else ""
            group = "" if options.group is None else f" and a group in column {options.group!r}"
            raise DataError(f"{self._table.files[0]}: no row has a label in column {options.label!r}{group}{told}.")
        if len(counts) > HALF * rows and rows > 20:
            raise DataError(
                f"column {options.label!r}: {len(counts):,} different values in {rows:,} rows. That is no label of "
                "classes with several examples each; name another column with --label."
            )
        classes, problems = check_classes(sorted(counts), label=options.label, group=options.group)
        keys = list(classes.values())
        with _naming(self._table.files[0]):
            columns = [column for scan in scans.values() for column in scan.columns()]
            _check_different(columns)
        if not self._content and not columns:
            raise DataError(f"{self._table.files[0]}: no column beside the label is left to be the examples.")
        return _Scan(classes, problems, [counts[k] for k in keys], [sizes[k] for k in keys], columns, scans)

    def _sorted(self) -> sorting.SortedRows:
        """The rows class by class: by a second reading, or as an interrupted preparation left them."""
        assert self._folder is not None, "work_in comes first"
        scan = self._scan
        numbers = {member: i for i, member in enumerate(scan.classes.values())}
        width = 0 if self._content else len(scan.columns)
        decoded = 0
        if isinstance(self.preprocessing, Preprocessing):
            decoded = self.preprocessing.size**2 * self.preprocessing.channels
        asked = json.dumps([self._version, self._options.record()])
        rows = sorting.SortedRows(self._folder, scan.counts, of=asked, width=width, sizes=scan.sizes, decoded=decoded)
        if not rows.whole:
            with rows.writing():
                for batch in self._batches():
                    if _version(self._table.files) != self._version:  # its rows have no places
                        raise DataError(f"{self._options.directory}: was changed while it was read. Run it again.")
                    self._sort(batch, rows, numbers)
        return rows

    def _sort(self, batch: Batch, rows: sorting.SortedRows, numbers: Mapping[tuple[str, str], int]) -> None:
        """Put a batch's rows to the classes with these numbers; those of a class that has none are left out."""
        members, reasons = self._members(batch)
        if self._content:
            contents, bad = self._contents(batch)
        else:
            vectors, bad = self._vectors(batch)
        reasons = {**bad, **reasons}
        kept = [(i, numbers[m]) for i, m in enumerate(members) if m is not None and m in numbers and i not in reasons]
        chosen, classes = np.array(kept, dtype=np.int64).reshape(-1, 2).T
        if self._content:
            file = np.full(len(chosen), self._number_of[batch.file])
            origins = np.column_stack([file, batch.numbers[chosen]])
            rows.add_contents(classes, [contents[i] or b"" for i in chosen], origins)
        else:
            rows.add_vectors(classes, vectors[chosen])
        rows.add_problems([*batch.problems, *self._named(batch, reasons)])

    def _named(self, batch: Batch, reasons: Mapping[int, str]) -> list[Problem]:
        return [
            Problem(f"{self._table.shown[batch.file]}: row {batch.numbers[i]}", reasons[i]) for i in sorted(reasons)
        ]

    def _check_types(self, batch: Batch, types: dict[str, tuple[Path, pa.DataType]]) -> None:
        """Raises DataError: a column is of another kind than in the files before."""
        for name in (self._content, *self._features):
            if name is None or scanning.like(kind := batch.table.column(name).type) is None:
                continue
            file, before = types.setdefault(name, (batch.file, kind))
            if scanning.like(before) != scanning.like(kind):
                raise DataError(
                    f"{batch.file}: column {name!r} is of type {kind}, and of type {before} in {file.name}. Write them "
                    "of one type."
                )

    def _batches(self) -> Iterator[Batch]:
        options = self._options
        named = [options.label, options.group, self._content, *self._features]
        return self._table.batches(list(dict.fromkeys(name for name in named if name is not None)))

    def _members(self, batch: Batch) -> _Members:
        """(group, label) of each row, or None and what is wrong with it."""
        with _naming(batch.file, self._options.label):
            labels, reasons = names_of(batch.table.column(self._options.label), what="label")
        if self._options.group is None:
            return _Members([None if label is None else ("all", label) for label in labels], reasons)
        with _naming(batch.file, self._options.group):
            groups, others = names_of(batch.table.column(self._options.group), what="group")
        both = [None if a is None or b is None else (a, b) for a, b in zip(groups, labels, strict=True)]
        return _Members(both, {**others, **reasons})

    def _contents(self, batch: Batch) -> tuple[list[bytes | None], dict[int, str]]:
        """Texts or pictures of a batch, and what is wrong with rows that have none."""
        assert self._content is not None
        array = batch.table.column(self._content)
        reasons: dict[int, str] = {}
        if self._options.image is not None:
            with _naming(batch.file):
                contents = _pictures(array, self._content)
            reasons = {i: "has no picture" for i, content in enumerate(contents) if not content}
            return contents, reasons
        with _naming(batch.file, self._content):
            texts = scanning.texts_of(array)
        encoded: list[bytes | None] = []
        for i, text in enumerate(texts):
            content = text.encode() if text is not None else b""
            if text is None and scanning.is_not_utf8(array, i):
                reasons[i] = "its text is not UTF-8"
            elif text is None or not text.strip():
                reasons[i] = "has no text"
            elif len(content) > MAX_TEXT_BYTES:
                reasons[i] = f"its text is of {len(content):,} bytes; {MAX_TEXT_BYTES:,} are the most"
            encoded.append(None if i in reasons else content)
        return encoded, reasons

    def _vectors(self, batch: Batch) -> tuple[np.ndarray, dict[int, str]]:
        """float32 [rows, D] of a batch, and what is wrong with rows that are none."""
        parts: list[np.ndarray] = []
        reasons: dict[int, str] = {}
        for name, scan in self._scan.scans.items():
            array = batch.table.column(name)
            columns = scan.columns()
            if scan.width is not None:
                found = scanning.vectors_of(array, scan.width)
                what = f"column {name!r} holds no {scan.width} finite numbers"
            elif columns[0].kind == "categorical":
                codes = {category: float(code) for code, category in enumerate(columns[0].categories)}
                values = np.array([codes.get(c, np.nan) if c else np.nan for c in scanning.categories_of(array)])
                found, what = scanning.Numbers(values, scanning.undecodable(array)), f"column {name!r} is not UTF-8"
            else:
                found = scanning.numbers_of(array, scan.decimal)
                what = f"column {name!r} holds no finite number"
            reasons |= {int(i): what for i in np.flatnonzero(found.odd) if int(i) not in reasons}
            parts.append(found.values.reshape(len(array), len(columns)))
        return np.concatenate(parts, axis=1).astype(np.float32), reasons


@contextlib.contextmanager
def _naming(file: Path, column: str | None = None) -> Iterator[None]:
    """An error in the block tells the file too, and the column where the block does not know it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{file}: {'' if column is None else f'column {column!r} is '}{error}") from error


def _check_different(columns: Sequence[Column]) -> None:
    """Raises DataError: two columns of vectors have one name, as a list's own and one that is named like it."""
    names = [column.name for column in columns]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise DataError(f"two columns of vectors would be named {twice!r}. Leave one out (--leave-out), or rename it.")


class _Members(NamedTuple):
    classes: list[tuple[str, str] | None]
    reasons: dict[int, str]


class _Sent(NamedTuple):
    """Rows on their way to another machine."""

    rows: sorting.RowRange
    get: Callable[[], Any]  # what `_rows_of` gives of them
    origins: list[list[int]]  # of pictures: what `read_origins` gives of them


def _rows_of(folder: Path | None, rows: sorting.RowRange) -> Any:
    """float32 [rows, width], or the contents."""
    assert folder is not None
    return sorting.read_vectors(folder, rows) if rows.width else sorting.read_contents(folder, rows)


def _read(
    folder: Path | None, modality: Modality, preprocessing: Any, items: Sequence[Any], files: Sequence[str]
) -> tuple[Examples, list[Problem]]:
    problems: list[Problem] = []
    vectors: list[np.ndarray] = []
    texts: list[str] = []
    for item in items:
        if isinstance(item, sorting.ProblemFile):
            assert folder is not None
            problems += sorting.read_problems(folder, item)
            continue
        rows, content = (item.rows, item.get()) if isinstance(item, _Sent) else (item, _rows_of(folder, item))
        if modality == "vector":
            vectors.append(content)
        elif modality == "text":
            texts += [text.decode() for text in content]
        else:
            assert folder is not None
            origins = item.origins if isinstance(item, _Sent) else sorting.read_origins(folder, rows)
            for (number, row), picture in zip(origins, content, strict=True):
                name = f"{files[number]}: row {row}"
                try:
                    vectors.append(preprocessing(decode_picture(io.BytesIO(picture), name=name))[None])
                except DataError as error:
                    problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    if modality == "text":
        return texts, problems
    return (np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)), problems


def _version(files: Sequence[Path]) -> str:
    """Of all the files: items are ranges of sorted rows, which say nothing of what the rows hold."""
    status = [(file, file.stat()) for file in files]
    described = [(str(file.absolute()), each.st_size, each.st_mtime_ns) for file, each in status]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _delimiter_hint(options: TableOptions, names: Sequence[str]) -> str:
    """What to try where the only column's name looks like a whole header."""
    signs = [sign for sign in DELIMITERS if len(names) == 1 and sign in names[0]]
    if not isinstance(options, CsvOptions) or not signs:
        return ""
    most = max(signs, key=names[0].count)
    given = "tab" if most == "\t" else shlex.quote(most)
    return f" If {DELIMITERS[most]} stands between the cells, say --delimiter {given}."


def _listed(names: Sequence[str], what: str) -> str:
    """ "column 'a' is", "columns 'a', 'b' are"."""
    shown = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
    return f"{what} {shown} is" if len(names) == 1 else f"{what}s {shown} are"


def _features(options: TableOptions, names: list[str], index_columns: list[str]) -> list[str]:
    """The columns that make vectors; none where the examples are texts or pictures. Raises ConfigError."""
    roles: dict[str, str] = {}
    named = [("--label", options.label), ("--group", options.group), ("--text", options.text)]
    named += [("--image", options.image)]
    for flag in ("features", "leave_out", "numeric", "categorical"):
        named += [(f"--{flag.replace('_', '-')}", name) for name in getattr(options, flag) or ()]
    for flag, name in named:
        if name is None:
            continue
        if name not in names:
            known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            hint = _delimiter_hint(options, names)
            raise ConfigError(f"{flag} {name}: there is no such column; there are: {known}.{hint}")
        role = "--features" if flag in ("--numeric", "--categorical") else flag
        if roles.setdefault(name, role) != role:
            raise ConfigError(f"{flag} {name}: this column is {roles[name]} already. Give it one role.")
    if options.text is not None and options.image is not None:
        raise ConfigError("--text and --image: an example is one of them. Leave one out.")
    if options.text is not None or options.image is not None:
        return []
    if options.features:
        return list(dict.fromkeys(options.features))
    unasked = set(index_columns) - roles.keys()
    return [name for name in names if roles.get(name, "--features") == "--features" and name not in unasked]


def _pictures(array: pa.Array, name: str) -> list[bytes | None]:
    """The files in a column. Raises DataError: it holds something else."""
    if pa.types.is_struct(array.type):
        fields = [field.name for field in array.type]
        if "bytes" not in fields:
            raise DataError(f"column {name!r}: a struct without bytes ({', '.join(fields)}), so it holds no pictures.")
        array = scanning.plain(array.flatten()[fields.index("bytes")])
    if not scanning.is_binary(array.type):
        raise DataError(f"column {name!r}: of type {array.type}. Pictures are bytes, or a struct of bytes and path.")
    return array.to_pylist()
