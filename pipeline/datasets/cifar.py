"""CIFAR-FS and FC100: CIFAR-100's classes in the two splits that few-shot papers report.

CIFAR-FS (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers"): 64, 16 and 20 classes,
split at random. FC100 (Oreshkin et al. 2018, "TADAM"): whole superclasses in each part, 12, 4 and 4, so that no test
class resembles a training class. Both take all 600 images of a class, training file first.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.datasets.array_pickles import RowsInFile, in_file, read_pickle
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.rows import ArraySource
from pipeline.datasets.sources import DownloadOptions
from pipeline.errors import DataError
from pipeline.types import Split

FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
FILES = ("train", "test", "meta")
MAX_BYTES = 1 << 30  # of a file in the archive; the largest official one has 155 MB

# The parts that are not meta-training; the other classes are.
CIFAR_FS: dict[Split, tuple[str, ...]] = {
    "meta_val": (
        *("beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree"),
        *("motorcycle", "otter", "sea", "shark", "television", "tractor"),
    ),
    "meta_test": (
        *("baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket"),
        *("rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm"),
    ),
}
FC100: dict[Split, tuple[str, ...]] = {  # superclasses
    "meta_val": ("large_carnivores", "large_omnivores_and_herbivores", "non-insect_invertebrates", "small_mammals"),
    "meta_test": ("aquatic_mammals", "insects", "medium_mammals", "people"),
}


class Cifar100Options(DownloadOptions):
    """What the two have in common."""

    split: ClassVar[str]

    directory: Path | None = Field(None, description=f"Folder of {ARCHIVE}, or of the extracted {FOLDER}.")
    size: int = Field(32, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Cifar100:
        folder = self.folder()
        if self.download:
            fetch(folder)
        return Cifar100(folder, split=self.split, size=self.size)


class CifarFSOptions(Cifar100Options):
    """CIFAR-FS."""

    split = "cifar_fs"


class FC100Options(Cifar100Options):
    """FC100."""

    split = "fc100"


class Cifar100(ArraySource):
    """Raw classes of CIFAR-100; groups are its superclasses. Raises DataError: files missing, damaged or others."""

    def __init__(self, source: Path, *, split: str, size: int = 32) -> None:
        self.preprocessing = Preprocessing(kind="photo", size=size, channels=3)
        self._split = split
        folder = extracted(source)
        self.names, superclasses = _names(folder / "meta")
        self._images: dict[str, RowsInFile] = {}
        self.labels, coarse = {}, np.full(len(self.names), -1)
        for part in ("train", "test"):
            images, fine, of_superclass = _batch(folder / part)
            if fine.max() >= len(self.names) or of_superclass.max() >= len(superclasses) or fine.min() < 0:
                raise DataError(f"{folder / part}: labels beyond the {len(self.names)} classes of meta. {AGAIN}")
            self._images[part], self.labels[part] = images, fine
            coarse[fine] = of_superclass
        if (coarse < 0).any():
            missing = self.names[int(np.argmin(coarse))]
            raise DataError(f"{folder}: class {missing} has no images. {AGAIN}")
        self.files = {part: rows.path for part, rows in self._images.items()}
        self.groups = [superclasses[number] for number in coarse]

    def pictures(self, part: str) -> np.ndarray:
        return _pictures(self._images[part])

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        keys, parts = (self.groups, FC100) if self._split == "fc100" else (self.names, CIFAR_FS)
        part_of = {key: part for part, keys in parts.items() for key in keys}
        return {self._split: {name: part_of.get(key, "meta_train") for name, key in zip(self.names, keys, strict=True)}}


AGAIN = "Fetch the official archive again."


def fetch(folder: Path) -> None:
    """Download and extract the official archive into a folder (needs network). Raises DataError."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        # not the class itself, which unpickles what it fetched
        download_and_extract_archive(CIFAR100.url, str(folder), filename=CIFAR100.filename, md5=CIFAR100.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-100 cannot be downloaded ({error}). Fetch {ARCHIVE} by other means and give its folder."
        ) from error


def extracted(source: Path) -> Path:
    """The folder of train, test and meta; they are extracted beside the archive where need be. Raises DataError."""
    for folder in (source, source / FOLDER):
        if all((folder / name).is_file() for name in FILES):
            return folder
    archive = source if source.is_file() else source / ARCHIVE
    if not archive.is_file():
        raise DataError(
            f"{source}: holds neither {ARCHIVE} nor a folder {FOLDER} of train, test and meta. Give the folder of the "
            "official archive, or fetch it with --download."
        )
    out = archive.parent / FOLDER
    try:
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=archive.parent) as scratch:
            with tarfile.open(archive) as content:
                for name in FILES:
                    member = content.getmember(f"{FOLDER}/{name}")
                    stream = content.extractfile(member) if member.isreg() and member.size <= MAX_BYTES else None
                    if stream is None:
                        raise DataError(f"{archive}: {name} is no plain file of less than 1 GiB. {AGAIN}")
                    with (Path(scratch) / name).open("wb") as file:
                        shutil.copyfileobj(stream, file)
            out.mkdir(exist_ok=True)
            for name in FILES:
                (Path(scratch) / name).replace(out / name)
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: cannot be extracted ({error}). {AGAIN}") from error
    return out


def _names(file: Path) -> tuple[list[str], list[str]]:
    content = read_pickle(file)
    found = [content.get(key) for key in ("fine_label_names", "coarse_label_names")]
    for names in found:
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: holds no fine_label_names and coarse_label_names. {AGAIN}")
    return found[0], found[1]  # type: ignore[return-value]


def _batch(file: Path) -> tuple[RowsInFile, np.ndarray, np.ndarray]:
    """Images uint8 [N, 3072], classes and superclasses int [N]."""
    content = read_pickle(file)
    images = content.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{file}: holds no images of 32×32×3 under data. {AGAIN}")
    try:
        fine, coarse = (np.array(content.get(key), dtype=np.int64) for key in ("fine_labels", "coarse_labels"))
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{file}: its fine_labels and coarse_labels are no numbers. {AGAIN}") from None
    if fine.shape != (len(images),) or coarse.shape != fine.shape or not len(fine):
        raise DataError(f"{file}: {len(images)} images, but labels of {fine.shape} and {coarse.shape}. {AGAIN}")
    return in_file(file, images), fine, coarse


@lru_cache(maxsize=2)
def _pictures(rows: RowsInFile) -> np.ndarray:
    return rows.open().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
