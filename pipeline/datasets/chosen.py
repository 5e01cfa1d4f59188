"""A source with the class splits that the user asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.datasets.class_lists import by_lists, read_class_lists
from pipeline.datasets.source import Examples, Original, Problem, Put, RawClass, Source
from pipeline.datasets.splits import all_in, group_split, random_split
from pipeline.datasets.tables.sorting import ProblemFile
from pipeline.types import Split

LISTED, ALL_TEST = "lists", "all_test"
NAMED = 10  # classes that are left out, in the remark


class Chosen(Source):
    """`source` with other class splits beside or in the place of its own. It reads the same examples.

    shares: of the classes (or exactly so many) for the three parts, in `random` and, with three groups or more, in
    `group`. lists: a file or folder (see `class_lists`) for the split `lists`; classes that are not in it are left out
    of the data set, which is no problem of the raw data and stands in the remarks. all_test: a split in which every
    class is in meta_test.
    """

    def __init__(
        self,
        source: Source,
        *,
        shares: tuple[int, int, int] | None = None,
        lists: Path | None = None,
        all_test: bool = False,
    ) -> None:
        """Raises DataError: lists that are none, or name what is not there."""
        self.source = source
        self.modality, self.preprocessing = source.modality, source.preprocessing
        self.columns, self.shape, self.copies = source.columns, source.shape, source.copies
        self._shares, self._all_test = shares, all_test
        self._lists = str(lists)
        self._group_of: dict[str, str] | None = None
        self._listed: Mapping[str, Split] | None = None
        if lists is not None:
            given = read_class_lists(lists)
            self._listed = by_lists(self._groups(), given, source=self._lists)

    def work_in(self, folder: Path) -> None:
        self.source.work_in(folder)

    def classes(self) -> Iterator[RawClass]:
        problems: list[Any] = []
        for raw in self.source.classes():
            if self._listed is None or raw.name in self._listed:
                yield raw._replace(items=itertools.chain(problems, raw.items)) if problems else raw
                problems = []
            else:  # what a source tells with its first class is not of that class alone
                problems += itertools.takewhile(lambda item: isinstance(item, Problem | ProblemFile), raw.items)

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        return self.source.read(items)

    def elsewhere(self, items: Sequence[Any], put: Put) -> Sequence[Any]:
        return self.source.elsewhere(items, put)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        splits = self.source.splits(seed=seed)
        if self._shares is not None or self._all_test:
            groups = self.class_groups()  # without those that the lists leave out
            if self._shares is not None:
                splits["random"] = random_split(list(groups), seed=seed, shares=self._shares)
                if len(set(groups.values())) >= 3:
                    splits["group"] = group_split(groups, seed=seed, shares=self._shares)
            if self._all_test:
                splits[ALL_TEST] = all_in(groups)
        if self._listed is not None:
            splits[LISTED] = dict(self._listed)
        return splits

    def class_groups(self) -> dict[str, str]:
        return {name: group for name, group in self._groups().items() if self._listed is None or name in self._listed}

    def version(self) -> str:
        return self.source.version()

    def remarks(self) -> list[str]:
        remarks = self.source.remarks()
        unlisted = [name for name in self._groups() if name not in self._listed] if self._listed is not None else []
        if unlisted:
            shown = ", ".join(unlisted[:NAMED] + ["…"] * (len(unlisted) > NAMED))
            which = "1 class is" if len(unlisted) == 1 else f"{len(unlisted)} classes are"
            remarks.append(f"{which} not in {self._lists} and left out: {shown}")
        return remarks

    def originals(self) -> Mapping[Original, int]:
        return self.source.originals()

    def _groups(self) -> dict[str, str]:
        """Class name -> group. Listed once, which takes a while where the raw data is large."""
        if self._group_of is None:
            self._group_of = self.source.class_groups()
        return self._group_of
