"""Your own pictures: a folder per class, optionally a folder level of groups above.

SOURCE/CLASS/*.png            one group, "all"
SOURCE/GROUP/CLASS/*.jpg      groups are kept whole by the split `group`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.datasets.preprocessing import (
    IMAGE_SUFFIXES,
    Preprocessing,
    open_picture,
    pictures_in,
    readable,
)
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import FolderOptions
from pipeline.datasets.splits import group_split, random_split
from pipeline.errors import DataError
from pipeline.types import Split


class ImageFolderOptions(FolderOptions):
    """Of a folder of pictures."""

    directory: Path | None = Field(None, description="Folder that holds a folder of pictures per class.")
    kind: Literal["drawing", "photo"] = Field("drawing", description="drawing: grey, ink high. photo: RGB.")
    size: int = Field(28, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> ImageFolder:
        channels: Literal[1, 3] = 3 if self.kind == "photo" else 1
        preprocessing = Preprocessing(kind=self.kind, size=self.size, channels=channels)
        return ImageFolder(self.folder(), preprocessing=preprocessing)


class ImageFolder(Source):
    """Raw classes from folders. Raises DataError: no such folder, or no class folders with pictures in it."""

    preprocessing: Preprocessing

    def __init__(self, source: str | Path, *, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._classes = class_folders(Path(source))

    def classes(self) -> Iterator[RawClass]:
        for name, folder in self._classes.items():
            yield RawClass(name, _group(name), pictures_in(folder))

    def read(self, items: Sequence[Path]) -> tuple[np.ndarray, list[Problem]]:
        return readable(items, open_picture, self.preprocessing)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        groups = {name: _group(name) for name in self._classes}
        splits = {"random": random_split(list(groups), seed=seed, shares=(70, 10, 20))}
        if len(set(groups.values())) >= 3:
            splits["group"] = group_split(groups, seed=seed)
        return splits


def class_folders(source: Path) -> dict[str, Path]:
    """Class name -> its folder, by name. Raises DataError."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. Give one that holds a folder of pictures per class.")
    found: dict[str, Path] = {}
    for first in _folders_in(source):
        groups = _folders_in(first)
        if pictures_in(first) or not groups:
            found[first.name] = first
        found.update({f"{first.name}/{second.name}": second for second in groups})
    for name, folder in found.items():
        if not pictures_in(folder):  # leaving the class out silently would give answers without it
            raise DataError(
                f"{folder}: class {name} holds no picture ({', '.join(IMAGE_SUFFIXES)}). Add some, or remove it."
            )
    if not found:
        raise DataError(f"{source}: no folder in it holds pictures. Make one folder per class, named like the class.")
    return found


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _group(name: str) -> str:
    return name.split("/")[0] if "/" in name else "all"
