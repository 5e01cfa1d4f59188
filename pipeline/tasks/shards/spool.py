"""What was read so far, beside the shards in the making: an interrupted preparation goes on from it.

    FOLDER/shards/00000.parquet   shards that are whole
    FOLDER/journal.jsonl          a line per chunk: what was asked for, how many examples there are, its problems
    FOLDER/spool/00000.bin        the examples of the latest chunks, in segments; one goes when shards hold all of it

A process that is killed loses the shard it was writing, which cannot be read without its footer; its rows are still in
the spool. Chunks are replayed from whole shards first and from the spool then.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.source import Examples, Modality, Problem
from pipeline.tasks.shards.examples import COLUMN, concatenated, from_arrow, to_arrow

SEGMENT_BYTES = 64 << 20
JOURNAL, SPOOL = "journal.jsonl", "spool"


class SpoolError(Exception):
    """What is there is damaged, or of other raw data: it has to be read again."""


class Record(NamedTuple):
    """One chunk."""

    mark: str  # tells what was asked for
    ends: list[bool]  # whether a class ends with it, of each of its parts
    rows: list[int]  # examples of each of its parts
    problems: list[list[list[str]]]  # of each of its parts: item and reason
    shape: list[int]  # of one example
    segment: int
    offset: int  # of its examples in the segment
    length: int
    crc: int


class Spool:
    """The journal and the examples of a folder. Its modality is that of all its examples."""

    def __init__(self, folder: Path, modality: Modality) -> None:
        self._folder = folder
        self._modality = modality
        (folder / SPOOL).mkdir(exist_ok=True)
        self.records = self._read_journal()
        self._ends: list[tuple[int, int]] = []  # of the segments that are there: number, rows that went before its end
        self._segment = -1
        self._rows = 0  # of all chunks, at most; those of classes that are left out are among them
        for record in self.records:
            self._count(record)
        self._journal = (folder / JOURNAL).open("a", encoding="utf-8")

    def close(self) -> None:
        self._journal.close()

    def discard(self) -> None:
        """Remove it: the data set is whole."""
        self.close()
        (self._folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self._folder / SPOOL, ignore_errors=True)

    def add(
        self, mark: str, ends: list[bool], parts: Sequence[tuple[Examples, list[Problem]]], *, in_shards: int
    ) -> None:
        """Note a chunk. in_shards: examples that whole shards hold by now."""
        content, shape = b"", [0]
        if any(len(examples) for examples, _ in parts):
            examples = concatenated(examples for examples, _ in parts)
            shape = list(examples.shape[1:]) if isinstance(examples, np.ndarray) else []
            batch = pa.record_batch([to_arrow(self._modality, examples)], names=["examples"])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            content = sink.getvalue().to_pybytes()
        number = max(self._segment, 0)
        offset = self._path(number).stat().st_size if self._path(number).exists() else 0
        if offset >= SEGMENT_BYTES:
            number, offset = number + 1, 0
        with self._path(number).open("ab") as segment:
            segment.write(content)
        problems = [[list(problem) for problem in problems] for _, problems in parts]
        rows = [len(examples) for examples, _ in parts]
        record = Record(mark, ends, rows, problems, shape, number, offset, len(content), zlib.crc32(content))
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        self._count(record)
        while len(self._ends) > 1 and self._ends[0][1] <= in_shards:
            self._path(self._ends.pop(0)[0]).unlink(missing_ok=True)

    def replay(self, files: Sequence[Path], *, min_examples: int) -> Iterator[list[Examples | None]]:
        """The examples of each part of each record, in order; None where no shard has any.

        files: the whole shards. min_examples: classes with fewer are not in them. Raises SpoolError.
        """
        stored = _Rows(files, self._modality)
        left_out = self._left_out(min_examples)
        number = 0  # of the class
        for record in self.records:
            parts: list[Examples | None] = []
            whole = self._examples(record) if self._path(record.segment).exists() else None
            start = 0
            for rows, ends in zip(record.rows, record.ends, strict=True):
                if whole is not None:
                    parts.append(whole[start : start + rows] if rows else None)
                else:
                    parts.append(stored.take(rows, record.shape) if rows and number not in left_out else None)
                start += rows
                number += ends
            yield parts

    def _left_out(self, min_examples: int) -> set[int]:
        """The numbers of the classes that ended with too few examples."""
        found, number, rows = set(), 0, 0
        for record in self.records:
            for count, ends in zip(record.rows, record.ends, strict=True):
                rows += count
                if ends and rows < min_examples:
                    found.add(number)
                if ends:
                    number, rows = number + 1, 0
        return found

    def _examples(self, record: Record) -> Examples:
        try:
            with self._path(record.segment).open("rb") as segment:
                segment.seek(record.offset)
                content = segment.read(record.length)
            if len(content) != record.length or zlib.crc32(content) != record.crc:
                raise SpoolError("a segment is damaged")
            if not content:
                return []
            with pa.ipc.open_stream(content) as stream:
                return from_arrow(self._modality, record.shape, stream.read_all().column(0))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SpoolError(str(error)) from error

    def _read_journal(self) -> list[Record]:
        """The records. A line that was cut short when the process was killed, and what follows it, is taken away."""
        records: list[Record] = []
        end = 0
        with (self._folder / JOURNAL).open("a+b") as journal:
            journal.seek(0)
            for line in journal:
                try:
                    record = Record(*json.loads(line))
                    if not line.endswith(b"\n") or not len(record.ends) == len(record.rows) == len(record.problems):
                        break
                except (ValueError, TypeError):
                    break
                records.append(record)
                end += len(line)
            journal.truncate(end)  # not written anew, for which a full disk has no room
        return records

    def _count(self, record: Record) -> None:
        self._rows += sum(record.rows)
        if record.segment != self._segment:
            self._segment = record.segment
            self._ends.append((record.segment, self._rows))
        self._ends[-1] = (record.segment, self._rows)

    def _path(self, segment: int) -> Path:
        return self._folder / SPOOL / f"{segment:05d}.bin"


class _Rows:
    """The examples of whole shards, one after the other, a row group in memory at a time."""

    def __init__(self, files: Sequence[Path], modality: Modality) -> None:
        self._modality = modality
        self._groups = self._read(files)
        self._left: list[Any] = []  # columns of row groups that were not taken whole

    def _read(self, files: Sequence[Path]) -> Iterator[pa.Array]:
        for path in files:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for number in range(file.num_row_groups):
                    yield file.read_row_group(number, columns=[COLUMN[self._modality]]).column(0).combine_chunks()

    def take(self, rows: int, shape: Sequence[int]) -> Examples:
        taken: list[Examples] = []
        try:
            while rows:
                group = self._left.pop() if self._left else next(self._groups)
                taken.append(from_arrow(self._modality, shape, group[:rows]))
                if len(group) > rows:
                    self._left.append(group[rows:])
                rows -= min(rows, len(group))
        except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration) as error:
            raise SpoolError(str(error) or "a shard is missing") from error
        return concatenated(taken) if taken else []
