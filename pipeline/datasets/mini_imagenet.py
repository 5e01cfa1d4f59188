"""mini-ImageNet in the two forms that the field passes on: 64, 16 and 20 classes of ImageNet, 600 images each.

Ravi and Larochelle 2017, "Optimization as a model for few-shot learning", after Vinyals et al. 2016.

    DIR/train.csv, val.csv, test.csv     filename,label: Ravi and Larochelle's lists
    DIR/images/*.jpg                     the files that they name, of any size

    DIR/mini-imagenet-cache-train.pkl, …-val.pkl, …-test.pkl     {"image_data": uint8 [N, 84, 84, 3], "class_dict"}

The class split `ravi_larochelle` is what these files say; none is written down here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.datasets.array_pickles import RowsInFile, in_file, read_pickle
from pipeline.datasets.preprocessing import Preprocessing, open_picture, readable
from pipeline.datasets.rows import ArraySource
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import FolderOptions
from pipeline.errors import DataError
from pipeline.types import Split

SPLIT = "ravi_larochelle"
PARTS: dict[str, Split] = {"train": "meta_train", "val": "meta_val", "test": "meta_test"}
AGAIN = "Fetch it again."


class MiniImageNetOptions(FolderOptions):
    """Of mini-ImageNet, which cannot be fetched from here: ImageNet's licence has to be agreed to."""

    directory: Path | None = Field(
        None, description="Folder of {train,val,test}.csv and images/, or of mini-imagenet-cache-{train,val,test}.pkl."
    )
    size: int = Field(84, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Source:
        folder = self.folder()
        preprocessing = Preprocessing(kind="photo", size=self.size, channels=3)
        if all((folder / f"{part}.csv").is_file() for part in PARTS):
            return Listed(folder, preprocessing=preprocessing)
        if all(_cache(folder, part).is_file() for part in PARTS):
            return Cached(folder, preprocessing=preprocessing)
        raise DataError(
            f"{folder}: holds neither train.csv, val.csv and test.csv (with images/) nor the three "
            "mini-imagenet-cache-*.pkl. Give the folder of one of these."
        )


class Listed(Source):
    """Ravi and Larochelle's lists beside a folder of images. Raises DataError: a list that is none."""

    preprocessing: Preprocessing

    def __init__(self, folder: Path, *, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._images = folder / "images"
        if not self._images.is_dir():
            raise DataError(f"{self._images}: no such folder. Put the images that train.csv names there.")
        self._files: dict[str, list[str]] = {}
        self._split: dict[str, Split] = {}
        for part, split in PARTS.items():
            file = folder / f"{part}.csv"
            for name, label in read_list(file):
                if self._split.setdefault(label, split) != split:
                    raise DataError(f"{file}: class {label} is in another list as well. {AGAIN}")
                self._files.setdefault(label, []).append(name)

    def classes(self) -> Iterator[RawClass]:
        for label, files in self._files.items():
            yield RawClass(label, self._split[label].removeprefix("meta_"), [self._images / name for name in files])

    def read(self, items: Sequence[Path]) -> tuple[np.ndarray, list[Problem]]:
        return readable(items, open_picture, self.preprocessing)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {SPLIT: dict(self._split)}


class Cached(ArraySource):
    """The three caches. Raises DataError: damaged, or of another make."""

    def __init__(self, folder: Path, *, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._images: dict[str, RowsInFile] = {}
        self._split: dict[str, Split] = {}
        names: list[str] = []
        self.labels = {}
        for part, split in PARTS.items():
            file = _cache(folder, part)
            images, members = _read_cache(file)
            labels = np.full(images.shape[0], -1)
            for label, rows in members.items():
                if label in self._split:
                    raise DataError(f"{file}: class {label} is there twice, or in another file as well. {AGAIN}")
                self._split[label] = split
                labels[rows] = len(names)
                names.append(label)
            self._images[part], self.labels[part] = images, labels
        self.files = {part: rows.path for part, rows in self._images.items()}
        self.names, self.groups = names, [self._split[name].removeprefix("meta_") for name in names]

    def pictures(self, part: str) -> np.ndarray:
        return _pictures(self._images[part])

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {SPLIT: dict(self._split)}


def read_list(file: Path) -> Iterator[tuple[str, str]]:
    """(file name, label) of each row of a list. Raises DataError: not such a list, or a name that leads elsewhere."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                name, label = row.get("filename"), row.get("label")
                if not name or not label:
                    raise DataError(f"{file}: needs the columns filename and label in every row. {AGAIN}")
                if Path(name).name != name or "\0" in name:
                    raise DataError(f"{file}: {name!r} is no name of a file in images/. {AGAIN}")
                yield name, label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error}). {AGAIN}") from error


def _cache(folder: Path, part: str) -> Path:
    return folder / f"mini-imagenet-cache-{part}.pkl"


def _read_cache(file: Path) -> tuple[RowsInFile, dict[str, np.ndarray]]:
    """Images uint8 [N, H, W, 3], and class name -> the rows that hold its images."""
    content = read_pickle(file)
    images, classes = content.get("image_data"), content.get("class_dict")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{file}: holds no images [N, H, W, 3] under image_data. {AGAIN}")
    if not isinstance(classes, dict) or not classes:
        raise DataError(f"{file}: holds no class_dict. {AGAIN}")
    return in_file(file, images), {str(name): _rows(file, rows, len(images)) for name, rows in classes.items()}


def _rows(file: Path, rows: Any, count: int) -> np.ndarray:
    try:
        numbers = np.array(rows, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array([-1])
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
        raise DataError(f"{file}: class_dict names rows that are not there. {AGAIN}")
    return numbers


@lru_cache(maxsize=3)
def _pictures(rows: RowsInFile) -> np.ndarray:
    return rows.open()
