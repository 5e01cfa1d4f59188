"""The rows of a table in the order of their classes, in files beside the data set that is being made.

How many rows each class has is known, so every row has a place before it is read: a class's rows lie together, in the
order of the table. Texts and pictures are of any length, so what lies in order is where they begin and end.

The files' whole room is taken before the first row is written. They are written and never mapped: a disk that is full
all the same is an error then, and no signal that ends the process. A preparation that goes on finds them whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.datasets import room
from pipeline.datasets.source import Problem
from pipeline.files import write_atomically

ITEM_BYTES = 64 << 10  # of the examples that an item stands for: dozens of items are read at once
PROBLEMS_PER_FILE = 1000
ROWS, SPANS, CONTENT, WHOLE = "rows.f32", "spans.i64", "content.bin", "whole.json"
SPAN_BYTES = 32  # where a content begins and ends, and its file's number and row, for whoever has to mend it


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
    """Places for the rows of classes with `counts` rows, and `sizes` bytes if they are contents.

    of: tells the table and its reading from others. decoded: bytes that a content becomes when it is read, at least.
    `whole` where an earlier process has written them.
    """

    def __init__(
        self, folder: Path, counts: Sequence[int], *, of: str, width: int, sizes: Sequence[int] = (), decoded: int = 0
    ) -> None:
        self.folder = folder
        self.width = width
        self._most = max(1, ITEM_BYTES // max(1, decoded))  # contents of an item
        self._starts = _starts(counts)
        self._written = np.zeros(len(counts), dtype=np.int64)
        self._next_byte = _starts(sizes)[:-1]
        total = int(self._starts[-1])
        self._files = (
            {ROWS: 4 * total * width} if width else {CONTENT: int(sum(sizes)), SPANS: SPAN_BYTES * total}
        )  # name -> bytes
        self._layout = [of, width, list(map(int, counts)), list(map(int, sizes))]
        self._open: dict[str, int] = {}
        self._problems: list[Problem] = []
        self.problem_files: list[ProblemFile] = []
        self.whole = self._find()

    @property
    def size(self) -> int:
        """That the files take."""
        return sum(self._files.values())

    def _find(self) -> bool:
        """Whether the files are there, and whole."""
        try:
            layout, written, problems = json.loads((self.folder / WHOLE).read_text())
            same = layout == self._layout and all(
                (self.folder / name).stat().st_size == size for name, size in self._files.items()
            )
        except (OSError, ValueError, TypeError):
            return False
        if same:
            self._written[:] = written
            self.problem_files = [_problem_file(number) for number in range(problems)]
        return same

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The block adds all rows. Raises Unfinished: the disk is full."""
        shutil.rmtree(self.folder, ignore_errors=True)  # what is not whole is of no use
        with (
            room.told(self.folder, lambda: self.size, what="the table's rows sorted by class, beside the data set"),
            contextlib.ExitStack() as undo,
        ):
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with contextlib.ExitStack() as closing:
                for name, size in self._files.items():
                    self._open[name] = os.open(self.folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
                    closing.callback(os.close, self._open[name])
                    room.reserve(self._open[name], size)
                    os.ftruncate(self._open[name], size)
                yield
                if self._problems:
                    self._write_problems(self._problems)
                for descriptor in self._open.values():
                    os.fsync(descriptor)
            whole = [self._layout, self._written.tolist(), len(self.problem_files)]
            write_atomically(self.folder / WHOLE, json.dumps(whole))
            undo.pop_all()

    def add_vectors(self, classes: np.ndarray, rows: np.ndarray) -> None:
        """Rows float32 [n, width] of classes int64 [n]."""
        for class_id, members in _by_class(classes):
            first = int(self._starts[class_id] + self._written[class_id])
            self._write(ROWS, 4 * self.width * first, rows[members].astype(np.float32).tobytes())
            self._written[class_id] += len(members)

    def add_contents(self, classes: np.ndarray, contents: Sequence[bytes], origins: np.ndarray) -> None:
        """Texts or files of classes int64 [n]. origins int64 [n, 2]: each one's file, by number, and row."""
        for class_id, members in _by_class(classes):
            new = [contents[i] for i in members]
            edges = self._next_byte[class_id] + _starts([len(content) for content in new])
            first = int(self._starts[class_id] + self._written[class_id])
            self._write(CONTENT, int(edges[0]), b"".join(new))
            spans = np.column_stack([edges[:-1], edges[1:], origins[members]])
            self._write(SPANS, SPAN_BYTES * first, spans.tobytes())
            self._next_byte[class_id] = edges[-1]
            self._written[class_id] += len(new)

    def _write(self, name: str, offset: int, content: bytes) -> None:
        left = memoryview(content)
        while left:
            written = os.pwrite(self._open[name], left, offset)
            left, offset = left[written:], offset + written

    def add_problems(self, problems: Sequence[Problem]) -> None:
        self._problems += problems
        while len(self._problems) >= PROBLEMS_PER_FILE:
            self._write_problems(self._problems[:PROBLEMS_PER_FILE])
            del self._problems[:PROBLEMS_PER_FILE]

    def _write_problems(self, problems: Sequence[Problem]) -> None:
        file = _problem_file(len(self.problem_files))
        (self.folder / file.name).write_text(json.dumps(problems))
        self.problem_files.append(file)

    def items(self, class_id: int) -> Iterator[RowRange]:
        """The rows of a class, in ranges of about ITEM_BYTES, both as they are stored and decoded."""
        start = int(self._starts[class_id])
        stop = start + int(self._written[class_id])
        while start < stop:
            if self.width:
                end = min(stop, start + max(1, ITEM_BYTES // (4 * self.width)))
            else:
                spans = _spans(self.folder, start, min(stop, start + self._most))
                sizes = (spans[:, 1] - spans[:, 0]).cumsum()
                end = start + max(1, int(np.searchsorted(sizes, ITEM_BYTES, side="right")))
            yield RowRange(start, end, self.width)
            start = end


def read_vectors(folder: Path, rows: RowRange) -> np.ndarray:
    """float32 [rows, width]."""
    count, offset = (rows.stop - rows.start) * rows.width, rows.start * rows.width * 4
    return np.fromfile(folder / ROWS, np.float32, count, offset=offset).reshape(-1, rows.width)


def read_contents(folder: Path, rows: RowRange) -> list[bytes]:
    """The contents of some rows, in order."""
    spans = _spans(folder, rows.start, rows.stop)[:, :2]
    begin = int(spans[0, 0])  # a class's contents lie together
    with (folder / CONTENT).open("rb") as file:
        file.seek(begin)
        content = file.read(int(spans[-1, 1]) - begin)
    return [content[start:stop] for start, stop in (spans - begin).tolist()]


def read_origins(folder: Path, rows: RowRange) -> list[list[int]]:
    """The number of the file and the row that each of these contents is from."""
    return _spans(folder, rows.start, rows.stop)[:, 2:].tolist()


def read_problems(folder: Path, file: ProblemFile) -> list[Problem]:
    return [Problem(*entry) for entry in json.loads((folder / file.name).read_text())]


def _problem_file(number: int) -> ProblemFile:
    return ProblemFile(f"problems{number:06d}.json")


def _spans(folder: Path, start: int, stop: int) -> np.ndarray:
    """int64 [stop - start, 4]: where the contents begin and end, and what they are from."""
    return np.fromfile(folder / SPANS, np.int64, 4 * (stop - start), offset=SPAN_BYTES * start).reshape(-1, 4)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """int64 [n + 1]: where each begins that lie one after another, and the last one's end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _by_class(classes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class of a batch and its rows there, in their order."""
    order = np.argsort(classes, kind="stable")
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    for members in np.split(order, borders):
        if len(members):
            yield int(classes[members[0]]), members
