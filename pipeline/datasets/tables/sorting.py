"""The rows of a table in the order of their classes, in files on this machine's disk.

How many rows each class has is known, so every row has a place before it is read: a class's rows lie together, in the
order of the table. Texts and pictures are of any length, so what lies in order is where they begin and end.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.datasets.source import Problem

ITEM_BYTES = 1 << 20  # of the examples that are read at once
PROBLEMS_PER_FILE = 1000
ROWS, SPANS, CONTENT = "rows.f32", "spans.i64", "content.bin"


class RowRange(NamedTuple):
    """Some examples of a class. width: numbers of a row; 0: they are contents of any length."""

    start: int
    stop: int
    width: int


class ProblemFile(NamedTuple):
    """Rows that have no class, or that could not be read."""

    name: str


Item = RowRange | ProblemFile


class SortedRows:
    """Being written: places for the rows of classes with `counts` rows, and `sizes` bytes if they are contents.

    decoded: bytes that a content becomes when it is read, at least.
    """

    def __init__(
        self, folder: Path, counts: Sequence[int], *, width: int, sizes: Sequence[int] = (), decoded: int = 0
    ) -> None:
        self.folder = folder
        self._most = max(1, ITEM_BYTES // max(1, decoded))  # contents of an item
        self.width = width
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._written = np.zeros(len(counts), dtype=np.int64)
        total = int(self._starts[-1])
        self._problems: list[Problem] = []
        self._problem_files: list[ProblemFile] = []
        if width:
            self._rows = _new(folder / ROWS, np.float32, (total, width))
        else:
            self._next_byte = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)[:-1]
            self._content = _new(folder / CONTENT, np.uint8, (int(sum(sizes)),))
            self._spans = _new(folder / SPANS, np.int64, (total, 2))

    def add_vectors(self, classes: np.ndarray, rows: np.ndarray) -> None:
        """Rows float32 [n, width] of classes int64 [n]."""
        for class_id, members in _by_class(classes):
            first = self._starts[class_id] + self._written[class_id]
            self._rows[first : first + len(members)] = rows[members]
            self._written[class_id] += len(members)
        _let_go(self._rows)

    def add_contents(self, classes: np.ndarray, contents: Sequence[bytes]) -> None:
        """Texts or files of classes int64 [n]."""
        for class_id, content in zip(classes.tolist(), contents, strict=True):
            start = int(self._next_byte[class_id])
            stop = start + len(content)
            self._content[start:stop] = np.frombuffer(content, dtype=np.uint8)
            self._spans[self._starts[class_id] + self._written[class_id]] = start, stop
            self._next_byte[class_id] = stop
            self._written[class_id] += 1
        _let_go(self._content)
        _let_go(self._spans)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        self._problems += problems
        while len(self._problems) >= PROBLEMS_PER_FILE:
            self._write_problems(self._problems[:PROBLEMS_PER_FILE])
            del self._problems[:PROBLEMS_PER_FILE]

    def _write_problems(self, problems: Sequence[Problem]) -> None:
        file = ProblemFile(f"problems{len(self._problem_files):06d}.json")
        (self.folder / file.name).write_text(json.dumps(problems))
        self._problem_files.append(file)

    def finish(self) -> list[ProblemFile]:
        """Everything on disk; returns where the problems are."""
        if self._problems:
            self._write_problems(self._problems)
            self._problems = []
        for array in [self._rows] if self.width else [self._content, self._spans]:
            if isinstance(array, np.memmap):
                array.flush()
        return self._problem_files

    def items(self, class_id: int) -> Iterator[RowRange]:
        """The rows of a class, in ranges of about ITEM_BYTES, both as they are stored and decoded."""
        start = int(self._starts[class_id])
        stop = start + int(self._written[class_id])
        while start < stop:
            if self.width:
                end = min(stop, start + max(1, ITEM_BYTES // (4 * self.width)))
            else:
                spans = self._spans[start : min(stop, start + self._most)]
                sizes = (spans[:, 1] - spans[:, 0]).cumsum()
                end = start + max(1, int(np.searchsorted(sizes, ITEM_BYTES, side="right")))
            yield RowRange(start, end, self.width)
            start = end


def read_vectors(folder: Path, rows: RowRange) -> np.ndarray:
    """float32 [rows, width], a copy."""
    place = np.memmap(folder / ROWS, np.float32, "r", offset=rows.start * rows.width * 4, shape=_size(rows))
    return np.array(place)


def read_contents(folder: Path, rows: RowRange) -> list[bytes]:
    """The contents of some rows, in order."""
    spans = np.memmap(folder / SPANS, np.int64, "r", offset=rows.start * 16, shape=(rows.stop - rows.start, 2))
    with (folder / CONTENT).open("rb") as file:
        contents = []
        for start, stop in spans.tolist():
            file.seek(start)
            contents.append(file.read(stop - start))
    return contents


def read_problems(folder: Path, file: ProblemFile) -> list[Problem]:
    return [Problem(*entry) for entry in json.loads((folder / file.name).read_text())]


def _size(rows: RowRange) -> tuple[int, int]:
    return rows.stop - rows.start, rows.width


def _new(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # cannot be mapped
        path.touch()
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "w+", shape=shape)


def _let_go(array: np.ndarray) -> None:
    """What was written is the file's: its pages need not stay in this process's memory."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def _by_class(classes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class of a batch and its rows there, in their order."""
    order = np.argsort(classes, kind="stable")
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    for members in np.split(order, borders):
        if len(members):
            yield int(classes[members[0]]), members
