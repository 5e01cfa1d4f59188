"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawers each.

Lake, Salakhutdinov, Tenenbaum 2015, "Human-level concept learning through probabilistic program induction".
Two class splits from the same raw data: `alphabet` (Lake's background and evaluation sets, with 5 background
alphabets for validation) and `random` (1100 / 100 / 423 classes, as MAML and its followers report).
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.datasets.archives import PictureArchive
from pipeline.datasets.preprocessing import Preprocessing, decode_picture, open_picture, readable
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import DownloadOptions
from pipeline.datasets.splits import random_split, shuffled
from pipeline.errors import DataError
from pipeline.types import Split

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
VALIDATION_ALPHABETS = 5


class OmniglotOptions(DownloadOptions):
    """Of the official archives."""

    size: int = Field(28, ge=8, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Omniglot:
        folder = self.folder()
        return Omniglot.download(folder, size=self.size) if self.download else Omniglot(folder, size=self.size)


class Omniglot(Source):
    """Raw Omniglot from the official archives, an extracted folder, or torchvision's download.

    Raises DataError: the archives or folders are not there, or hold no characters.
    """

    preprocessing: Preprocessing

    def __init__(self, source: str | Path, *, size: int = 28) -> None:
        self.preprocessing = Preprocessing(kind="drawing", size=size)
        self._files = _find(Path(source))  # class name -> (its part, files of its drawings)

    @classmethod
    def download(cls, folder: str | Path, *, size: int = 28) -> Omniglot:
        """Fetch the official archives with torchvision (needs network). Raises DataError where that fails."""
        import torchvision

        try:
            for background in (True, False):
                torchvision.datasets.Omniglot(str(folder), background=background, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Omniglot cannot be downloaded ({error}). Fetch images_background.zip and images_evaluation.zip by "
                "other means and give their folder with --source."
            ) from error
        return cls(Path(folder) / "omniglot-py", size=size)

    def classes(self) -> Iterator[RawClass]:
        """Characters in the order of their names; drawings in the order of their drawers."""
        for name, (_, files) in self._files.items():
            yield RawClass(name, name.split("/")[0], files)

    def read(self, items: Sequence[tuple[Path, str]]) -> tuple[np.ndarray, list[Problem]]:
        return readable(items, _open, self.preprocessing)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        background = sorted({name.split("/")[0] for name, (part, _) in self._files.items() if part == BACKGROUND})
        validation = set(shuffled(background, seed)[:VALIDATION_ALPHABETS])
        by_alphabet: dict[str, Split] = {}
        for name, (part, _) in self._files.items():
            if part == EVALUATION:
                by_alphabet[name] = "meta_test"
            else:
                by_alphabet[name] = "meta_val" if name.split("/")[0] in validation else "meta_train"
        return {"alphabet": by_alphabet, "random": random_split(list(self._files), seed=seed)}


def _find(source: Path) -> dict[str, tuple[str, list[tuple[Path, str]]]]:
    """Class name -> (part, its files); a file is (archive or folder, name inside)."""
    found: dict[str, tuple[str, list[tuple[Path, str]]]] = {}
    for part in (BACKGROUND, EVALUATION):
        container, names = _list(source, part)
        characters: dict[str, list[tuple[Path, str]]] = defaultdict(list)
        for name in names:
            pieces = PurePosixPath(name).parts
            if len(pieces) >= 4 and pieces[-4] == part and name.lower().endswith(".png"):
                characters[f"{pieces[-3]}/{pieces[-2]}"].append((container, name))
        if not characters:
            raise DataError(f"{container}: holds no drawings named {part}/ALPHABET/CHARACTER/*.png.")
        found.update({name: (part, sorted(files)) for name, files in characters.items()})
    return dict(sorted(found.items()))


def _list(source: Path, part: str) -> tuple[Path, list[str]]:
    folder, archive = source / part, source / f"{part}.zip"
    if folder.is_dir():
        return source, [str(p.relative_to(source)) for p in folder.glob("*/*/*.png")]
    if archive.is_file():
        with PictureArchive(archive) as content:
            return archive, content.names()
    raise DataError(
        f"{source}: holds neither {part}.zip nor a folder {part}. Give the folder of the official archives with "
        "--source, or fetch them with --download."
    )


def _open(file: tuple[Path, str]) -> Image.Image:
    container, name = file
    if container.suffix != ".zip":
        return open_picture(container / name)
    status = container.stat()
    content = _archive(container, status.st_mtime_ns, status.st_size).read(name)
    return decode_picture(io.BytesIO(content), name=f"{container}: {name}")


@lru_cache(maxsize=2)
def _archive(path: Path, modified: int, size: int) -> PictureArchive:
    """Open as long as this process reads drawings, and nobody has written to it."""
    return PictureArchive(path)
