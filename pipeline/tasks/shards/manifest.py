"""`dataset.json`: what a data set holds, how it is split, and where each class lies."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import Section, validate
from pipeline.datasets.source import Column, Modality
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Readable, readable
from pipeline.tasks.shards.examples import AXES, DTYPE, example_bytes
from pipeline.types import Split

FORMAT_VERSIONS = (1, 2)  # 1: images of a fixed size, every row group of one class; 2: all else
MANIFEST = "dataset.json"
MAX_SHAPE = 1 << 28  # numbers of one example
EVERY_CLASS = "every class"  # a class split of every data set, for evaluation alone: all classes in any part
# Folders and a name without anything that a shell, a file system or an object store could take for more.
SHARD_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")


class RowGroup(Section):
    """Where `rows` examples of one class lie in a row, from number `start` of a row group on."""

    shard: int = Field(ge=0, lt=1 << 31)
    row_group: int = Field(ge=0, lt=1 << 31)
    rows: int = Field(ge=1, lt=1 << 31)
    start: int = Field(default=0, ge=0, lt=1 << 31)


class ClassEntry(Section):
    """One class. `sha256` is over its examples in order; `row_groups` hold them in that order."""

    name: str
    group: str
    count: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    splits: dict[str, Split]  # name of a class split -> this class's part in it
    row_groups: list[RowGroup]
    label: str | None = None  # what the files say of it, where another program wrote them

    @model_validator(mode="after")
    def _row_groups_hold_every_example(self) -> ClassEntry:
        rows = sum(group.rows for group in self.row_groups)
        if rows != self.count:
            raise ValueError(f"row groups of class {self.name} hold {rows} examples and not {self.count}")
        return self


class Layout(Section):
    """How files that another program wrote say what an example is. Labels and groups are compared as text."""

    label: str  # column
    group: str | None = None  # column
    example: str  # column; of a struct's field: "image.bytes"

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.label, self.group, self.example) if name is not None))


class ShardEntry(Section):
    """One Parquet file, relative to the data set's folder."""

    file: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if not SHARD_FILE.fullmatch(value):
            raise ValueError(
                "must be a path inside the data set's folder, of letters, digits, '_', '-' and '.', such as "
                "shards/00000.parquet"
            )
        return value


class Manifest(Section):
    """`dataset.json`."""

    format_version: Literal[1, 2]
    modality: Modality
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    # of one example: H, W, C of an image (of an encoded one: once it is preprocessed), D of a vector, nothing of a text
    dtype: Literal["uint8", "float32", "string"]
    columns: list[Column] = Field(default_factory=list)  # the D numbers of a vector
    layout: Layout | None = None  # of files that another program wrote
    classes: list[ClassEntry] = Field(min_length=1)
    splits: list[str] = Field(min_length=1)  # names of the class splits; each class is in every one of them
    shards: list[ShardEntry] = Field(min_length=1)
    source: dict[str, Any]  # how it was made: source name, options, seed, warnings
    preprocessing: dict[str, Any]  # turns a user's picture into one of these images (see datasets/preprocessing.py)
    digest: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _shape_and_type_are_the_modalitys(self) -> Manifest:
        if self.format_version == 1 and self.modality != "image":
            raise ValueError(f"format version 1 holds images and not modality {self.modality}")
        if any((entry.label is None) != (self.layout is None) for entry in self.classes):
            raise ValueError("classes have labels where there is a layout, and only there")
        if self.layout is not None and self.format_version == 1:
            raise ValueError("format version 1 has no layout")
        if self.dtype != DTYPE[self.modality] or len(self.shape) != AXES[self.modality]:
            raise ValueError(f"dtype {self.dtype} and shape {list(self.shape)} are not those of {self.modality}")
        if math.prod(self.shape) > MAX_SHAPE:
            raise ValueError(f"shape {list(self.shape)}: {MAX_SHAPE} numbers an example are the most")
        if self.modality == "vector" and len(self.columns) != self.shape[0]:
            raise ValueError(f"{len(self.columns)} columns are described, of {self.shape[0]}")
        if self.modality != "vector" and self.columns:
            raise ValueError(f"modality {self.modality} has no columns")
        return self

    @model_validator(mode="after")
    def _row_groups_lie_in_listed_shards(self) -> Manifest:
        for entry in self.classes:
            if any(group.shard >= len(self.shards) for group in entry.row_groups):
                raise ValueError(f"class {entry.name} has a row group in a shard that is not listed")
        return self

    @model_validator(mode="after")
    def _every_class_is_in_every_split(self) -> Manifest:
        for entry in self.classes:
            if sorted(entry.splits) != sorted(self.splits):
                raise ValueError(f"class {entry.name} is not in exactly the class splits {', '.join(self.splits)}")
        return self

    @property
    def num_examples(self) -> int:
        return sum(entry.count for entry in self.classes)

    @property
    def image_bytes(self) -> int:
        """Of an image as it is stored, or, of an encoded one, once it is preprocessed."""
        return math.prod(self.shape)

    @property
    def example_bytes(self) -> int | None:
        """Of one stored example; None where they vary."""
        return example_bytes(self.modality, self.shape)

    def members(self, split_name: str, split: Split) -> list[int]:
        """Indices into `classes` of one part of a class split; of EVERY_CLASS all of them, whatever the part."""
        if split_name == EVERY_CLASS:
            return list(range(len(self.classes)))
        return [i for i, entry in enumerate(self.classes) if entry.splits.get(split_name) == split]

    def compute_digest(self) -> str:
        """sha256 over modality, shape, preprocessing and, per class, name, group, count, examples and splits."""
        content: dict[str, Any] = {
            "format_version": 1,  # of this digest: how the examples are packed is not part of it
            "modality": self.modality,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "preprocessing": self.preprocessing,
            "classes": [[c.name, c.group, c.count, c.sha256, dict(sorted(c.splits.items()))] for c in self.classes],
        }
        if self.columns:
            content["columns"] = [column.model_dump(mode="json") for column in self.columns]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `dataset.json`, without what has its default value."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False, indent=1) + "\n"


def read_manifest(folder: str | Readable) -> Manifest:
    """The manifest of a data set, checked against its own digest.

    Raises DataError: no such folder, no manifest in it, not JSON, a field missing or wrong, another format
    version, or a digest that disagrees with the classes, splits and preprocessing.
    """
    folder = readable(folder)
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such data set. Prepare one first, e.g. `metapipe data prepare glyphs --out {folder}`."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {MANIFEST}, so it is not a prepared data set. Make one with `metapipe data prepare`."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}). Prepare the data set again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if isinstance(content, dict) and content.get("format_version") not in FORMAT_VERSIONS:
        raise DataError(
            f"{path}: format version {content.get('format_version')!r}; this version reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Prepare the data set again."
        )
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a manifest. Prepare the data set again.")
    try:
        manifest = validate(Manifest, content, source=str(path))
    except ConfigError as error:
        raise DataError(f"{error} Prepare the data set again.") from None
    if manifest.compute_digest() != manifest.digest:
        raise DataError(
            f"{path}: the digest {manifest.digest[:12]}… disagrees with the classes, splits and preprocessing "
            "listed; the manifest was changed after it was written. Prepare the data set again."
        )
    return manifest
