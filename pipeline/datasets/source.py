"""What every source of raw data yields: its classes, and how their examples are read.

Listing and reading are apart, so that reading can go on in many processes and on many machines: a class holds light
references to its examples, and `read` turns some of them into arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from pydantic import BaseModel, Field, model_validator

from pipeline.config import Section

if TYPE_CHECKING:  # types imports torch: seconds at the start of every reading process, for nothing
    from pipeline.types import Split

Modality = Literal["image", "encoded_image", "vector", "text"]

Examples: TypeAlias = np.ndarray | list[str] | list[bytes]
"""Examples of one class, in order.

image: uint8 [n, H, W, C] · vector: float32 [n, D], NaN where a value is missing, codes in categorical columns ·
text: n strings · encoded_image: n PNG, JPEG or WebP files.
"""


class Column(Section):
    """One of the D numbers of a vector. A categorical one holds codes: i stands for `categories[i]`."""

    name: str
    kind: Literal["numeric", "categorical"] = "numeric"
    categories: list[str] = Field(default_factory=list)
    missing: bool = False  # whether some example misses its value

    @model_validator(mode="after")
    def _categories_where_they_belong(self) -> Column:
        if (self.kind == "categorical") != bool(self.categories):
            raise ValueError(f"column {self.name}: categories belong to categorical columns, and these need some")
        return self


Put: TypeAlias = Callable[[Any], Callable[[], Any]]


class RawClass(NamedTuple):
    """One class before it is read."""

    name: str  # unique in the data set, e.g. "Greek/character01"
    group: str  # alphabet, script, domain, clinic
    items: Iterable[Any]
    # light, picklable references to its examples in order: paths, members of archives, ranges of rows. Each stands for
    # a few MB of examples at most; they are gone through once, so a generator will do for a class of millions. A
    # Problem among them is something odd that was met while listing; it is counted, and `read` does not see it.


class Problem(NamedTuple):
    """What could not be read, and why, for the user to mend."""

    item: str  # a path, a member of an archive, a row
    reason: str


class Original(NamedTuple):
    """What a raw picture is like."""

    width: int  # pixels
    height: int
    mode: str  # as Pillow names them: "RGB", "L", …
    format: str  # "JPEG", …; empty where it is not known


class Source(Protocol):
    """Raw data. A class of its own inherits from this one and is picklable: `read` is called in other processes."""

    modality: Modality = "image"
    preprocessing: BaseModel | None = None  # turns a user's picture (file, row, sentence) into such an example
    columns: Sequence[Column] = ()  # of vectors
    shape: tuple[int, ...] | None = None
    # of one example, where it does not follow from the examples: [H, W, C] of an encoded image once it is preprocessed

    copies: bool = False  # whether reading is no more than copying, which other processes would not do faster

    def work_in(self, folder: Path) -> None:
        """Use a folder for files of one's own, if any are needed; told before `classes`.

        It is gone when the data set is whole. A preparation that goes on has it as the one before left it.
        """
        return

    def classes(self) -> Iterator[RawClass]:
        """Every class, in an order that depends on the raw data alone. Raises DataError: none, or no such data."""
        ...

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        """The examples that some items of one class stand for, in order, and what could not be read of them.

        The same items always give the same examples. A picture that is broken is a Problem; a place that is gone
        altogether (an archive, a server) is a DataError.
        """
        ...

    def elsewhere(self, items: Sequence[Any], put: Put) -> Sequence[Any]:
        """The items as another machine can read them, which may see the raw data but not the folder of `work_in`.

        put: keeps a value where that machine can get it, and returns what gets it.
        """
        return items

    def class_groups(self) -> dict[str, str]:
        """Class name -> group, in the order of `classes`."""
        return {raw.name: raw.group for raw in self.classes()}

    def version(self) -> str:
        """Tells raw data from what it was before an edit, where the items do not: those that name no file."""
        return ""

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        """Name of a class split -> class name -> part; known before the examples are read."""
        ...

    def remarks(self) -> list[str]:
        """What a user should know of the data set that is no problem of the raw data; a few sentences."""
        return []

    def originals(self) -> Mapping[Original, int]:
        """How often each kind of raw picture is met in a sample of each class; for the data card.

        Empty where they are all of one kind, or are no pictures.
        """
        return {}
