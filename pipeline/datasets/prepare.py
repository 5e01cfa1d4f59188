"""A source of raw classes -> a data set on disk, with look-alikes across its splits counted and recorded.

Classes are listed here and read in chunks by other processes, a few chunks ahead; what they read is written in order,
so the bytes do not depend on how many processes there are. In memory are these chunks and a row group, however large
the raw data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.datasets.near_duplicates import NearDuplicate, alike, mean_image
from pipeline.datasets.reading import Chunk, ClassPart, read_chunks
from pipeline.datasets.source import Examples, Problem, RawClass, Source
from pipeline.errors import DataError
from pipeline.storage import Location
from pipeline.tasks import shards
from pipeline.types import Split

REPORTED_PAIRS = 50  # near-duplicate pairs listed in the manifest; their number is recorded whole
REPORTED_PROBLEMS = 50  # bad items and classes left out, listed in the manifest
PROTOTYPE_IMAGES = 20  # of each class, whose mean is kept for the comparison
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
    progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[shards.Manifest, dict[str, list[NearDuplicate]]]:
    """Write `source` to the folder `out`; returns the manifest and, per class split, look-alikes across its parts.

    record: how the data was made, for the manifest. seed: of the class splits. strict: refuse what could not be read;
    else it is left out and recorded in the manifest's source, under `problems`, and classes that are left with fewer
    than `min_examples` under `left_out`. workers: processes that read; None: one per CPU. progress: told after every
    chunk.

    Raises DataError (see shards.write), and with `strict` one that names the first items that could not be read.
    """
    with shards.staged(out, overwrite=overwrite) as place:  # before minutes of reading
        splits = source.splits(seed=seed)
        preprocessing = source.preprocessing.model_dump(mode="json") if source.preprocessing is not None else {}
        writer = shards.ShardWriter(
            place.folder,
            splits=splits,
            modality=source.modality,
            shape=source.shape,
            columns=source.columns,
            min_examples=min_examples,
        )
        findings = _Findings()
        for part, examples, problems in read_chunks(source, chunks(source.classes()), workers=workers):
            if part.first:
                writer.begin(part.name, part.group)
                findings.begin(part)
            writer.add(examples)
            findings.add(part, examples, problems)
            if part.last:
                findings.end(part, count=writer.end(), min_examples=min_examples)
            progress(findings.progress)
        if strict:
            findings.refuse()
        look_alikes = findings.near_duplicates(splits)
        about = {
            "source": {**record, "split_seed": seed, **findings.described(look_alikes)},
            "preprocessing": preprocessing,
        }
        return place.publish(writer, about), look_alikes


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
        self._means: dict[str, np.ndarray] = {}
        self.progress = Progress("", 0, 0, 0)

    def begin(self, part: ClassPart) -> None:
        self._first: list[np.ndarray] = []  # of the class
        self._in_class = self._problems_in_class = 0

    def add(self, part: ClassPart, examples: Examples, problems: list[Problem]) -> None:
        self._examples += len(examples)
        self._in_class += len(examples)
        self._num_problems += len(problems)
        self._problems_in_class += len(problems)
        self._problems += problems[: REPORTED_PROBLEMS - len(self._problems)]
        wanted = PROTOTYPE_IMAGES - sum(map(len, self._first))
        if isinstance(examples, np.ndarray) and examples.ndim == 4 and wanted > 0 and len(examples):
            self._first.append(examples[:wanted])
        self.progress = Progress(part.name, self._classes, self._examples, self._num_problems)

    def end(self, part: ClassPart, *, count: int, min_examples: int) -> None:
        if count:
            self._classes += 1
            if self._first:
                self._means[part.name] = mean_image(np.concatenate(self._first))
        else:
            self._num_left_out += 1
            if len(self._left_out) < REPORTED_PROBLEMS:
                self._left_out.append(
                    {"class": part.name, "examples": self._in_class, "problems": self._problems_in_class}
                )
        self.progress = self.progress._replace(classes=self._classes)

    def refuse(self) -> None:
        """Raises DataError: there were problems."""
        found = [f"{problem.item}: {problem.reason}" for problem in self._problems[:5]]
        found += [f"class {each['class']}: only {each['examples']} examples" for each in self._left_out[:5]]
        total = self._num_problems + self._num_left_out
        if total:
            more = f" (and {total - len(found)} more)" if total > len(found) else ""
            raise DataError(f"{'; '.join(found)}{more}. Mend or remove them, or leave --strict out to go without them.")

    def near_duplicates(self, splits: Mapping[str, Mapping[str, Split]]) -> dict[str, list[NearDuplicate]]:
        """Per class split, the classes of different parts that look alike; nothing where they are no images."""
        if not self._means:
            return {}
        return {
            split: alike({name: (members[name], mean) for name, mean in self._means.items()})
            for split, members in splits.items()
        }

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
