"""A source of raw classes -> a data set on disk, with look-alikes across its splits counted and recorded.

Classes are listed here and read in chunks by other processes, a few chunks ahead; what they read is written in order,
so the bytes do not depend on how many processes there are. In memory are these chunks and a row group, however large
the raw data.

What was read stays in a hidden folder beside the place of the data set until that is whole. A command that was
interrupted or killed goes on from there when it is run again, if its options are the same and the raw data is: what was
read before must be the same items again, and files of the same size and time. A full disk stops it in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.datasets import room
from pipeline.datasets.near_duplicates import NearDuplicate, Prototypes
from pipeline.datasets.reading import Chunk, ClassPart, Reader, mark_of, read_chunks
from pipeline.datasets.source import Examples, Problem, RawClass, Source
from pipeline.errors import DataError
from pipeline.storage import Location
from pipeline.tasks import shards
from pipeline.types import Split

REPORTED_PAIRS = 50  # near-duplicate pairs listed in the manifest; their number is recorded whole
REPORTED_PROBLEMS = 50  # bad items and classes left out, listed in the manifest
OWN_FILES = "source"  # folder of what the source keeps while it is read
CHUNK_ITEMS = 64  # that a process reads at once


class Progress(NamedTuple):
    """How far a preparation is."""

    name: str  # of the class whose examples were written last
    classes: int  # written
    examples: int
    problems: int  # items that could not be read


def prepare(
    source: Source,
    out: str | Location,
    *,
    record: Mapping[str, Any],
    seed: int = 0,
    overwrite: bool = False,
    strict: bool = False,
    min_examples: int = 1,
    workers: int | None = None,
    reader: Reader = read_chunks,
    progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[shards.Manifest, dict[str, list[NearDuplicate]]]:
    """Write `source` to the folder `out`; returns the manifest and, per class split, look-alikes across its parts.

    record: how the data was made, for the manifest. seed: of the class splits. strict: refuse what could not be read;
    else it is left out and recorded in the manifest's source, under `problems`, and classes that are left with fewer
    than `min_examples` under `left_out`; the source's remarks under `remarks`. workers: processes that read; None: one
    per CPU. reader: what reads; `on_ray.read_chunks` has a cluster do it. progress: told of every class, and of every
    chunk of a large one.

    Raises DataError (see shards.write), and with `strict` one that names the first items that could not be read.
    Unfinished: the disk is full, or a process or node was lost.
    """
    shards.check_free(out, overwrite=overwrite)  # before minutes of reading
    splits = source.splits(seed=seed)
    key = _key(source, record, seed, min_examples)
    preparation: _Preparation | None = None
    with (
        shards.staged(out, overwrite=overwrite, key=key) as place,
        room.told(place.folder, lambda: preparation.missing() if preparation else None, what="the data set"),
    ):
        source.work_in(place.folder / OWN_FILES)
        preparation = _Preparation(source, splits, place.folder, min_examples)
        try:
            preparation.run(reader, workers, progress)
        except shards.SpoolError:  # damaged, or the raw data has changed: from the start
            preparation.forget()
            preparation = _Preparation(source, splits, place.folder, min_examples)
            preparation.run(reader, workers, progress)
        findings = preparation.findings
        if strict or not findings.progress.classes:
            findings.refuse()
        look_alikes = findings.near_duplicates(splits)
        remarks = source.remarks()
        about = {
            "source": {
                **record,
                "split_seed": seed,
                **findings.described(look_alikes),
                **({"remarks": remarks} if remarks else {}),
            },
            "preprocessing": _preprocessing(source),
        }
        content = preparation.writer.close()
        preparation.spool.discard()
        shutil.rmtree(place.folder / OWN_FILES, ignore_errors=True)
        return place.publish(content, about), look_alikes


class _Preparation:
    """What a source gives, written to a folder; goes on from what an interrupted one left there."""

    def __init__(
        self, source: Source, splits: Mapping[str, Mapping[str, Split]], folder: Path, min_examples: int
    ) -> None:
        self._source = source
        self._num_classes = min(map(len, splits.values()), default=0)
        self._folder = folder
        self._min_examples = min_examples
        self.findings = _Findings()
        self._whole = shards.whole_shards(folder)
        self.spool = shards.Spool(folder, source.modality)
        self.writer = shards.ShardWriter(
            folder,
            splits=splits,
            modality=source.modality,
            shape=source.shape,
            columns=source.columns,
            min_examples=min_examples,
            whole=len(self._whole),
        )

    def run(self, reader: Reader, workers: int | None, progress: Callable[[Progress], None]) -> None:
        """Raises SpoolError: what was left there is damaged or of other raw data; nothing of it can be used."""
        listed = chunks(self._source.classes())
        for record, parts in zip(
            self.spool.records, self.spool.replay(self._whole, min_examples=self._min_examples), strict=True
        ):
            chunk = next(listed, None)
            if chunk is None or mark_of(chunk) != record.mark:
                raise shards.SpoolError("the raw data has changed")
            for part, rows, examples, found in zip(chunk, record.rows, parts, record.problems, strict=True):
                progress(self._take(part, examples, rows, [Problem(*problem) for problem in found]))
        for chunk, read in reader(self._source, listed, workers=workers):
            done = [
                self._take(part, examples, len(examples), problems)
                for part, (examples, problems) in zip(chunk, read, strict=True)
            ]
            ends = [part.last for part in chunk]
            self.spool.add(mark_of(chunk), ends, read, in_shards=self.writer.in_shards)
            for each in done:  # once it is safe
                progress(each)

    def _take(self, part: ClassPart, examples: Examples | None, rows: int, problems: list[Problem]) -> Progress:
        if part.first:
            self.writer.begin(part.name, part.group)
            self.findings.begin(part)
        if examples is not None and len(examples):
            self.writer.add(examples)
        self.findings.add(part, examples, rows, problems)
        if part.last:
            self.findings.end(part, count=self.writer.end(), min_examples=self._min_examples)
        return self.findings.progress

    def missing(self) -> int | None:
        """About how many bytes the classes take that are not written, if those that are tell anything."""
        done = self.findings.progress.classes
        written = sum(file.stat().st_size for file in (self._folder / "shards").iterdir())
        return written * (self._num_classes - done) // done if done else None

    def forget(self) -> None:
        """Remove what was left."""
        self.spool.discard()
        for name in ("shards", OWN_FILES):
            shutil.rmtree(self._folder / name, ignore_errors=True)


def _preprocessing(source: Source) -> dict[str, Any]:
    return source.preprocessing.model_dump(mode="json") if source.preprocessing is not None else {}


def _key(source: Source, record: Mapping[str, Any], seed: int, min_examples: int) -> str:
    """Tells preparations apart that would not give the same, as far as options and the source's version go."""
    options = {
        "source": type(source).__name__,
        "version": source.version(),
        "modality": source.modality,
        "shape": source.shape,
        "columns": [column.model_dump(mode="json") for column in source.columns],
        "preprocessing": _preprocessing(source),
        "record": dict(record),
        "seed": seed,
        "min_examples": min_examples,
        "chunk": CHUNK_ITEMS,
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]


def chunks(classes: Iterator[RawClass]) -> Iterator[Chunk]:
    """About CHUNK_ITEMS items each; a class with fewer is in one chunk."""
    chunk: Chunk = []
    room = CHUNK_ITEMS
    for raw in classes:
        items, first = iter(raw.items), True
        ahead = list(itertools.islice(items, CHUNK_ITEMS))
        while True:
            part, ahead = ahead, list(itertools.islice(items, CHUNK_ITEMS))
            if chunk and len(part) > room:
                yield chunk
                chunk, room = [], CHUNK_ITEMS
            chunk.append(ClassPart(raw.name, raw.group, part, first=first, last=not ahead))
            room -= max(1, len(part))
            first = False
            if not ahead:
                break
    if chunk:
        yield chunk


class _Findings:
    """What is noticed on the way."""

    def __init__(self) -> None:
        self._classes = self._examples = self._num_problems = 0
        self._problems: list[Problem] = []
        self._num_left_out = 0
        self._left_out: list[dict[str, Any]] = []
        self._prototypes = Prototypes()
        self.progress = Progress("", 0, 0, 0)

    def begin(self, part: ClassPart) -> None:
        self._in_class = self._problems_in_class = 0

    def add(self, part: ClassPart, examples: Examples | None, rows: int, problems: list[Problem]) -> None:
        """examples: of `rows`; None where they are of a class that was left out before."""
        self._examples += rows
        self._in_class += rows
        self._num_problems += len(problems)
        self._problems_in_class += len(problems)
        self._problems += problems[: REPORTED_PROBLEMS - len(self._problems)]
        if examples is not None:
            self._prototypes.add(examples)
        self.progress = Progress(part.name, self._classes, self._examples, self._num_problems)

    def end(self, part: ClassPart, *, count: int, min_examples: int) -> None:
        self._prototypes.end(part.name if count else None)
        if count:
            self._classes += 1
        else:
            self._num_left_out += 1
            if len(self._left_out) < REPORTED_PROBLEMS:
                self._left_out.append(
                    {"class": part.name, "examples": self._in_class, "problems": self._problems_in_class}
                )
        self.progress = self.progress._replace(classes=self._classes)

    def refuse(self) -> None:
        """Raises DataError: there were problems."""
        found = [f"{problem.item}: {problem.reason.rstrip('.')}" for problem in self._problems[:5]]
        found += [f"class {each['class']}: only {each['examples']} examples" for each in self._left_out[:5]]
        total = self._num_problems + self._num_left_out
        if total:
            more = f" (and {total - len(found)} more)" if total > len(found) else ""
            without = (
                ", or leave --strict out to go without them" if self._classes else "; no class is left without them"
            )
            raise DataError(f"{'; '.join(found)}{more}. Mend or remove them{without}.")

    def near_duplicates(self, splits: Mapping[str, Mapping[str, Split]]) -> dict[str, list[NearDuplicate]]:
        """Per class split, the classes of different parts that look or read alike; nothing where none is compared."""
        return self._prototypes.alike(splits)

    def described(self, look_alikes: Mapping[str, list[NearDuplicate]]) -> dict[str, Any]:
        """For the manifest; what was not met is not mentioned."""
        found: dict[str, Any] = {}
        if look_alikes:
            found["near_duplicates"] = {
                split: {"pairs": len(pairs), "closest": [list(pair) for pair in pairs[:REPORTED_PAIRS]]}
                for split, pairs in look_alikes.items()
            }
        if self._num_problems:
            found["problems"] = {"count": self._num_problems, "first": [list(each) for each in self._problems]}
        if self._num_left_out:
            found["left_out"] = {"count": self._num_left_out, "first": self._left_out}
        return found
