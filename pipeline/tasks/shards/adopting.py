"""Parquet files of another program -> where each class lies in them, found by reading them once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.source import Column, Examples, Modality, Problem
from pipeline.errors import DataError
from pipeline.storage import Location, ObjectPath
from pipeline.tasks.shards import bounds
from pipeline.tasks.shards.bounds import bounded_batches
from pipeline.tasks.shards.digests import file_sha256
from pipeline.tasks.shards.examples import DTYPE, FIXED, ExamplesDigest, from_arrow
from pipeline.tasks.shards.footer import row_groups
from pipeline.tasks.shards.foreign import (
    BETWEEN,
    check_row_groups,
    column_of,
    is_no_text,
    labels_of,
    normalized,
    usable,
)
from pipeline.tasks.shards.manifest import SHARD_FILE, Layout

MAX_RUNS = 1_000_000  # of rows of one class, in all files
MAX_DECODED = 8  # times the data's size that may be decoded to read every class once, where it does not fit in memory
KEPT_PROBLEMS = 50  # of rows; the others are counted
NO_LABEL = "has no label"
GUESSES = ("image", "img", "features", "embedding", "embeddings", "vector", "text", "sentence")


class CheckClasses(Protocol):
    """What `pipeline.datasets.labels.check_classes` does."""

    def __call__(
        self, members: Sequence[tuple[str, str]], *, label: str, group: str | None
    ) -> tuple[dict[str, tuple[str, str]], list[Problem]]: ...


class Found(NamedTuple):
    """What the files hold."""

    shape: tuple[int, ...]
    columns: list[Column]
    classes: list[dict[str, Any]]  # as in a manifest, without splits, in the order of their names
    shards: list[dict[str, Any]]
    num_problems: int  # rows that are no examples, and classes whose names are another's or look so
    problems: list[Problem]  # the first KEPT_PROBLEMS of them
    left_out: list[dict[str, Any]]  # classes with too few examples


class _Class:
    def __init__(self, group: str, label: str, name: str) -> None:
        self.group, self.label, self.name = group, label, name
        self.count = 0
        self.digest = ExamplesDigest()
        self.runs: list[dict[str, int]] = []

    def add(self, shard: int, row_group: int, start: int, examples: Examples) -> int:
        """Rows that follow on each other. Returns by how many runs there are more."""
        self.count += len(examples)
        self.digest.update(examples)
        last = self.runs[-1] if self.runs else {}
        if (last.get("shard"), last.get("row_group"), last.get("start", 0) + last.get("rows", 0)) == (
            *(shard, row_group),
            start,
        ):
            last["rows"] += len(examples)
            return 0
        self.runs.append({"shard": shard, "row_group": row_group, "rows": len(examples), "start": start})
        return 1


def parquet_files(folder: Location) -> list[Location]:
    """Parquet files in a folder and those below, by name; what Spark and others put beside them is left out.

    Raises DataError: there are none, or names that a manifest may not hold.
    """
    found: list[Location] = []
    if isinstance(folder, ObjectPath):
        found = [place for place in folder.iterdir() if place.name.endswith((".parquet", ".pq"))]
    elif folder.is_dir():
        below = sorted(place for place in folder.rglob("*") if place.suffix in (".parquet", ".pq"))
        found = [place for place in below if place.is_file()]
    found = [place for place in found if not _name(folder, place).startswith(("_", "."))]
    if not found:
        raise DataError(f"{folder}: holds no Parquet file (.parquet). Give the folder they lie in.")
    for place in found:
        if not SHARD_FILE.fullmatch(_name(folder, place)):
            remedy = "Rename it with letters, digits, '_', '-' and '.'."
            if "=" in _name(folder, place):
                remedy = "Columns in the names of folders are not read: write them into the files (not partitionBy)."
            raise DataError(f"{place}: a manifest cannot hold this path. {remedy}")
    return found


def guess_example(folder: Location, given: str | None, label: str, group: str | None) -> tuple[str, pa.DataType]:
    """The column of the examples (of a struct, the field) and its type. Raises DataError: none, or several may be."""
    schema = _open(parquet_files(folder)[0]).schema_arrow
    for name in filter(None, (label, group, given and given.split(".")[0])):
        if name not in schema.names:
            raise DataError(f"{folder}: no column {name!r}; there are: {', '.join(schema.names[:30])}.")
    others = [name for name in schema.names if name not in (label, group)]
    if given is None:
        named = [name for name in others if name.lower() in GUESSES]
        candidates = named if len(named) == 1 else others
        if len(candidates) != 1:
            raise DataError(f"{folder}: which column holds the examples? Say --example, one of {', '.join(others)}.")
        given = candidates[0]
    kind = schema.field(given.split(".")[0]).type
    if pa.types.is_struct(kind) and "." not in given:
        given += ".bytes"
    if "." in given:
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        if given.split(".", 1)[1] not in fields:
            raise DataError(f"{folder}: column {given.split('.')[0]!r} has no field {given.split('.', 1)[1]!r}.")
        kind = fields[given.split(".", 1)[1]]
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return given, kind.value_type if pa.types.is_dictionary(kind) else kind


def guess_modality(kind: pa.DataType, shape: Sequence[int] | None) -> Modality | None:
    """By a column's type; None where it holds no examples."""
    if pa.types.is_fixed_size_binary(kind) or (shape is not None and _is_binary(kind)):
        return "image"
    if _is_binary(kind):
        return "encoded_image"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "vector"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def index(
    folder: Location,
    layout: Layout,
    modality: Modality,
    shape: tuple[int, ...] | None,
    *,
    check: Callable[[Any], str | None],
    check_label: Callable[[str], str | None],
    check_classes: CheckClasses,
    min_examples: int,
    progress: Callable[[int, int], None],
) -> Found:
    """Read the files once and find their classes.

    shape: of an example; a vector's may be None. check: what is wrong with an encoded image or a text, if anything.
    check_label: the same of a label or a group. check_classes: names the classes, as `labels.check_classes` does.
    min_examples: a class with fewer is left out. progress: told of rows read and of all rows.

    Raises DataError: a file that cannot be read, row groups too large to be read at once, or classes scattered so
    widely that training would decode everything again and again; each says what to do.
    """
    files = parquet_files(folder)
    opened = [_open(file) for file in files]
    total = sum(file.metadata.num_rows for file in opened)
    classes: dict[str, _Class] = {}
    problems: list[Problem] = []
    runs = rows = num_problems = 0
    missing: set[int] = set()  # columns of vectors
    for shard, (place, file) in enumerate(zip(files, opened, strict=True)):
        name = _name(folder, place)
        try:
            footers = row_groups(place)
            check_row_groups(file, footers, layout)
            for row_group in range(len(footers)):
                start = 0
                for batch in bounded_batches(file, footers, row_group, layout.columns):
                    examples, labels = column_of(batch, layout.example), labels_of(batch, layout)
                    if modality == "vector" and shape is None and len(examples):
                        shape = _vector_shape(examples)
                    good, reasons = _usable(
                        modality, shape or (), examples, labels, check, check_label, grouped=layout.group is not None
                    )
                    num_problems += len(reasons)
                    for i in sorted(reasons)[: KEPT_PROBLEMS - len(problems)]:
                        value = is_no_text(batch, layout, i) if reasons[i] == NO_LABEL else None
                        why = reasons[i] if value is None else f"its label {value} is no text and no whole number"
                        problems.append(Problem(f"{name}: row {rows + i + 1}", why))
                    for first, end, key in _runs(labels, good):
                        group, label = key.split(BETWEEN) if layout.group else ("all", key)
                        unique = f"{group}/{label}" if layout.group else label
                        entry = classes.setdefault(key, _Class(group, label, unique))
                        part = normalized(modality, shape or (), examples[first:end])
                        values: Examples = (
                            from_arrow(modality, shape or (), part) if modality in FIXED else part.to_pylist()
                        )
                        if modality == "vector":
                            missing.update(np.flatnonzero(np.isnan(values).any(axis=0)).tolist())
                        runs += entry.add(shard, row_group, start + first, values)
                    if runs > MAX_RUNS:
                        raise DataError(f"{folder}: the classes lie in more than {MAX_RUNS} pieces. {_remedy(layout)}")
                    start += len(batch)
                    rows += len(batch)
                    progress(rows, total)
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{place}: {str(error).strip()[:200]}. {_remedy(layout)}") from error
    kept = sorted((c for c in classes.values() if c.count >= max(1, min_examples)), key=lambda c: c.name)
    left_out = [
        {"class": c.name, "examples": c.count, "problems": 0}
        for c in sorted(classes.values(), key=lambda c: c.name)
        if c.count < max(1, min_examples)
    ]
    named, odd = check_classes([(c.group, c.label) for c in kept], label=layout.label, group=layout.group)
    usable_names = set(named.items())
    kept = [c for c in kept if (c.name, (c.group, c.label)) in usable_names]
    problems = [*odd[:KEPT_PROBLEMS], *problems][:KEPT_PROBLEMS]
    num_problems += len(odd)
    _check_scattered(folder, kept, opened, layout)
    columns = [
        Column(name=str(number), missing=number in missing)
        for number in range(shape[0] if modality == "vector" and shape else 0)
    ]
    entries = [
        {
            "name": c.name,
            "group": c.group,
            "count": c.count,
            "sha256": c.digest.hexdigest(),
            "row_groups": c.runs,
            "label": c.label,
        }
        for c in kept
    ]
    described = [
        {
            "file": _name(folder, place),
            "bytes": place.size() if isinstance(place, ObjectPath) else place.stat().st_size,
            "sha256": file_sha256(place),
        }
        for place in files
    ]
    return Found(shape or (), columns, entries, described, num_problems, problems, left_out)


def dtype_of(modality: Modality) -> str:
    return DTYPE[modality]


def _usable(
    modality: Modality,
    shape: Sequence[int],
    examples: pa.Array,
    labels: pa.Array,
    check: Callable[[Any], str | None],
    check_label: Callable[[str], str | None],
    *,
    grouped: bool,
) -> tuple[np.ndarray, dict[int, str]]:
    """Which rows can be examples, and what is wrong with the others, by row of the batch."""
    fit = usable(modality, shape, examples)
    reasons = {int(i): f"holds no {_wanted(modality, shape)}" for i in np.flatnonzero(~fit)}
    named = labels.is_valid().to_numpy(zero_copy_only=False)
    reasons |= {int(i): NO_LABEL for i in np.flatnonzero(~named)}
    for key in labels.unique().drop_null().to_pylist():
        names = key.split(BETWEEN, 1) if grouped else [key]
        wrong = next(filter(None, map(check_label, names)), None)
        if wrong:
            bare = " ".join(names)
            which = np.flatnonzero([each == key for each in labels.to_pylist()])
            reasons |= {int(i): f"its label {bare[:40]!a} is {wrong}" for i in which}
    if modality not in FIXED:
        for i in np.flatnonzero(fit):
            try:
                why = check(examples[int(i)].as_py())
            except UnicodeDecodeError:
                why = "is not UTF-8"
            if why:
                reasons.setdefault(int(i), why)
    good = fit & named
    good[list(reasons)] = False
    return good, reasons


def _wanted(modality: Modality, shape: Sequence[int]) -> str:
    if modality == "image":
        return f"{'×'.join(map(str, shape))} bytes"
    return f"{shape[0]} finite numbers" if modality == "vector" else modality.replace("_", " ")


def _runs(labels: pa.Array, good: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """(start, end, key) of rows in a row with one label, without those that are not good."""
    if not len(labels):
        return
    encoded = labels.dictionary_encode()
    codes = np.where(good, encoded.indices.fill_null(0).to_numpy(zero_copy_only=False), -1)
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for start, end in itertools.pairwise(edges):
        if codes[start] >= 0:
            yield start, end, encoded.dictionary[int(codes[start])].as_py()


def _vector_shape(examples: pa.Array) -> tuple[int, ...]:
    lists = examples.drop_null()
    if not len(lists) or not hasattr(lists[0], "values"):
        raise ValueError("no vector to tell the others' length by")
    return (max(1, len(lists[0])),)


def _check_scattered(folder: Location, classes: Sequence[_Class], files: Sequence[Any], layout: Layout) -> None:
    """Raises DataError: to read every class once, much more than the data would be decoded."""

    def size(shard: int, row_group: int) -> int:
        return int(files[shard].metadata.row_group(row_group).total_byte_size)

    everything = sum(size(s, g) for s, file in enumerate(files) for g in range(file.num_row_groups))
    decoded = sum(size(*at) for c in classes for at in {(run["shard"], run["row_group"]) for run in c.runs})
    if everything > bounds.MAX_ROW_GROUP_BYTES and decoded > MAX_DECODED * everything:
        raise DataError(
            f"{folder}: the rows of a class are scattered: to read each class once, {decoded // everything} times the "
            f"data would be decoded. {_remedy(layout)}"
        )


def _remedy(layout: Layout) -> str:
    by = f"{layout.group}, {layout.label}" if layout.group else layout.label
    return (
        f"Write the files sorted by {by}, with row groups of at most {bounds.MAX_ROW_GROUP_BYTES >> 20} MiB, or make a "
        "copy of our own with --rewrite OUT."
    )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _name(folder: Location, place: Location) -> str:
    if isinstance(place, Path) and isinstance(folder, Path):
        return place.relative_to(folder).as_posix()
    return place.name


def _open(place: Location) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            place.open_input() if isinstance(place, ObjectPath) else place, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{place}: not a Parquet file that can be read ({str(error).strip()[:120]}).") from error
