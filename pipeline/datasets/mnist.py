"""MNIST, Fashion-MNIST and KMNIST from their official files (idx, gzipped or not): ten classes each, 28×28, grey.

LeCun et al. 1998; Xiao, Rasul, Vollgraf 2017; Clanuwat et al. 2018. The training and the test file are one data set
here, in this order. None has a published class split; ten classes are few to be split, so besides `random` (6 classes
for training, 2 and 2) there is `all_test`: every class in meta_test, to evaluate what was trained on other data.
"""

from __future__ import annotations

import gzip
import zlib
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.rows import ArraySource
from pipeline.datasets.sources import DownloadOptions
from pipeline.datasets.splits import all_in, random_split
from pipeline.errors import DataError
from pipeline.types import Split

MAX_BYTES = 1 << 30  # of one file, decompressed; the largest official one has 47 MB
PARTS = ("train", "t10k")


class FamilyOptions(DownloadOptions):
    """One data set of the family."""

    torchvision_name: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    kind: ClassVar[Literal["drawing", "photo"]]

    directory: Path | None = Field(
        None, description="Folder of train-images-idx3-ubyte, t10k-images-idx3-ubyte, … (.gz or not)."
    )
    size: int = Field(28, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Mnist:
        folder = self.folder()
        if self.download:
            fetch(self.torchvision_name, folder)
        return Mnist(folder, names=self.names, preprocessing=Preprocessing(kind=self.kind, size=self.size))


class MnistOptions(FamilyOptions):
    """MNIST: handwritten digits."""

    torchvision_name = "MNIST"
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    kind = "drawing"


class FashionMnistOptions(FamilyOptions):
    """Fashion-MNIST: pieces of clothing."""

    torchvision_name = "FashionMNIST"
    names = (
        *("T-shirt-top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"),
    )
    kind = "photo"  # grey levels matter, and there is no ink whose polarity could be told


class KmnistOptions(FamilyOptions):
    """KMNIST: cursive Japanese (Kuzushiji) characters."""

    torchvision_name = "KMNIST"
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    kind = "drawing"


class Mnist(ArraySource):
    """Raw classes of one of them. Raises DataError: a file is missing, damaged, or does not fit the others."""

    def __init__(self, folder: Path, *, names: tuple[str, ...], preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.names, self.groups = names, ["all"] * len(names)
        self.files = {part: find(folder, f"{part}-images-idx3-ubyte") for part in PARTS}
        self.labels = {part: read_idx(find(folder, f"{part}-labels-idx1-ubyte"), axes=1) for part in PARTS}
        for part, labels in self.labels.items():
            images = self.pictures(part)
            if len(images) != len(labels):
                raise DataError(f"{self.files[part]}: {len(images)} images, but {len(labels)} labels. {AGAIN}")
            if len(labels) and labels.max() >= len(names):
                raise DataError(f"{folder}: {part} has the label {labels.max()}, of {len(names)} classes. {AGAIN}")

    def pictures(self, part: str) -> np.ndarray:
        return read_idx(self.files[part], axes=3)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {"random": random_split(self.names, seed=seed, shares=(6, 2, 2)), "all_test": all_in(self.names)}


AGAIN = "Fetch the official file again."


def fetch(torchvision_name: str, folder: Path) -> None:
    """Download the official files into a folder with torchvision (needs network). Raises DataError."""
    import torchvision

    try:
        getattr(torchvision.datasets, torchvision_name)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{torchvision_name} cannot be downloaded ({error}). Fetch its four idx files by other means and give "
            "their folder."
        ) from error


def find(folder: Path, name: str) -> Path:
    """The file `name` or `name`.gz in a folder, or where torchvision puts it. Raises DataError."""
    places = [folder, folder / "raw", *sorted(p / "raw" for p in folder.glob("*MNIST"))]
    for place in places:
        for file in (place / name, place / f"{name}.gz"):
            if file.is_file():
                return file
    raise DataError(f"{folder}: holds no {name} or {name}.gz. Give the folder of the official files, or --download.")


@lru_cache(maxsize=2)  # the images of both parts, in each process that reads
def read_idx(path: Path, *, axes: int) -> np.ndarray:
    """An idx file of bytes: uint8 [N] or [N, H, W]. Raises DataError: another format, damaged, or cut short.

    The format: two zero bytes, the type (8: unsigned bytes), the number of axes, each one's length (4 bytes,
    big-endian), the values.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * axes)
            if len(header) < 4 + 4 * axes or header[:4] != bytes((0, 0, 8, axes)):
                raise DataError(f"{path}: not an idx file of bytes with {axes} axes. {AGAIN}")
            shape = tuple(int(n) for n in np.frombuffer(header, ">i4", offset=4))
            if min(shape) < 0 or np.prod(shape, dtype=float) > MAX_BYTES:
                raise DataError(f"{path}: says that it holds {shape} bytes, more than are read. {AGAIN}")
            wanted = int(np.prod(shape))
            content = stream.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). {AGAIN}") from error
    if len(content) != wanted:
        size = "less" if len(content) < wanted else "more"
        raise DataError(f"{path}: holds {size} than the {wanted} bytes that it says. {AGAIN}")
    return np.frombuffer(content, np.uint8).reshape(shape)
