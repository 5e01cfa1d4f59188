"""Your own pictures: a folder per class, optionally a folder level of groups above.

SOURCE/CLASS/*.png            one group, "all"
SOURCE/GROUP/CLASS/*.jpg      groups are kept whole by the split `group`

A folder with class folders in it is a group: pictures beside these are in no class.

What cannot be used (broken files, empty folders, links in a circle, names that are none) is counted and left out.
"""

from __future__ import annotations

import io
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.datasets.labels import BOTH_KEPT, check_names
from pipeline.datasets.preprocessing import (
    DAMAGE,
    FORMATS,
    IMAGE_SUFFIXES,
    Preprocessing,
    check_scale,
    check_size,
    open_picture,
    pictures_in,
    readable,
    upright,
)
from pipeline.datasets.source import Examples, Original, Problem, RawClass, Source
from pipeline.datasets.sources import FolderOptions
from pipeline.datasets.splits import group_split, random_split
from pipeline.errors import DataError
from pipeline.types import Split

# MPO: a phone's JPEG with more frames behind the first, which alone is decoded
ENCODED = ("PNG", "JPEG", "MPO", "WEBP")  # kept as they are where pictures stay encoded; others become PNG
MAX_ENCODED_BYTES = 32 << 20
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".cr2", ".nef", ".dng", ".eps", ".ppm")
SIGNATURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
)  # of PNG, JPEG, GIF, TIFF
NOT_READ = "a folder below a class is not read"
LOOKED_AT = 20  # pictures of each class whose size and mode are counted


COLOURED = 16  # mean difference of a coloured picture's channels, of 255; yellowed paper has less


class ImageFolderOptions(FolderOptions):
    """Of a folder of pictures."""

    directory: Path | None = Field(None, description="Folder that holds a folder of pictures per class.")
    kind: Literal["drawing", "photo"] = Field("drawing", description="drawing: grey, ink high. photo: RGB.")
    size: int = Field(28, ge=8, le=1024, description="Height and width in pixels.")
    grey: bool = Field(False, description="photo: one channel (X-rays, microscopes).")
    encoded: bool = Field(False, description="Keep the files as they are, decoded when drawn: for many large photos.")

    def open(self, *, seed: int) -> ImageFolder:
        channels: Literal[1, 3] = 3 if self.kind == "photo" and not self.grey else 1
        preprocessing = Preprocessing(kind=self.kind, size=self.size, channels=channels)
        return ImageFolder(self.folder(), preprocessing=preprocessing, encoded=self.encoded)


class ImageFolder(Source):
    """Raw classes from folders. Raises DataError: no such folder, or no class folders with pictures in it.

    encoded: examples are files (PNG, JPEG, WebP) that are preprocessed when they are drawn, and not arrays.
    """

    preprocessing: Preprocessing

    def __init__(self, source: str | Path, *, preprocessing: Preprocessing, encoded: bool = False) -> None:
        self.preprocessing = preprocessing
        if encoded:
            self.modality = "encoded_image"
            self.shape = (preprocessing.size, preprocessing.size, preprocessing.channels)
        self._classes, self._problems = find_classes(Path(source))
        if not any(map(pictures_in, self._classes.values())):
            raise DataError(_no_pictures(Path(source)))
        self._problems += _astray(Path(source))

    def classes(self) -> Iterator[RawClass]:
        problems = self._problems
        for name, folder in self._classes.items():
            yield RawClass(name, _group(name), itertools.chain(problems, _items(name, folder)))
            problems = []

    def read(self, items: Sequence[Path]) -> tuple[Examples, list[Problem]]:
        if self.modality == "image":
            return readable(items, _open, self.preprocessing)
        files: list[bytes] = []
        problems = []
        for path in items:
            try:
                files.append(encoded_picture(path, self.preprocessing))
            except DataError as error:
                name, _, reason = str(error).partition(": ")
                problems.append(Problem(name, reason))
        return files, problems

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        groups = {name: _group(name) for name in self._classes}
        splits = {"random": random_split(list(groups), seed=seed, shares=(70, 10, 20))}
        if len(set(groups.values())) >= 3:
            splits["group"] = group_split(groups, seed=seed)
        return splits

    def originals(self) -> Counter[Original]:
        """Of the first pictures of each class, by their headers, without those that these refuse."""
        found: Counter[Original] = Counter()
        for folder in self._classes.values():
            for path in pictures_in(folder)[:LOOKED_AT]:
                try:
                    _check_file(path)
                    with Image.open(path, formats=FORMATS) as picture:
                        _check_header(picture, path)
                        found[Original(picture.width, picture.height, picture.mode, picture.format or "")] += 1
                except (DataError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                    continue  # counted as a problem when it is read
        return found

    def in_colour(self) -> bool:
        """Whether most are coloured: by the first picture of each of the first classes. Many scans are RGB and grey."""
        votes = []
        for folder in itertools.islice(self._classes.values(), LOOKED_AT):
            for path in pictures_in(folder)[:1]:
                try:
                    _check_file(path)
                    with Image.open(path, formats=FORMATS) as header:
                        coloured = header.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr")
                    if coloured:
                        small = _open(path).convert("RGB").resize((32, 32), Image.Resampling.BOX)
                        coloured = float(np.ptp(np.asarray(small).astype(int), axis=-1).mean()) > COLOURED
                    votes.append(coloured)
                except (DataError, *DAMAGE, Image.DecompressionBombError):
                    continue
        return 2 * sum(votes) > len(votes)


def class_folders(source: Path) -> dict[str, Path]:
    """Class name -> its folder, by name, where each must hold pictures and nothing be wrong. Raises DataError."""
    found, problems = find_classes(source)
    for name, folder in found.items():
        if not pictures_in(folder):  # leaving the class out silently would give answers without it
            raise DataError(
                f"{folder}: class {name} holds no picture ({', '.join(IMAGE_SUFFIXES)}). Add some, or remove it."
            )
    for problem in problems:
        if not problem.reason.endswith((BOTH_KEPT, NOT_READ)):
            raise DataError(f"{problem.item}: {problem.reason}.")
    if not found:
        raise DataError(_no_pictures(source))
    return found


def find_classes(source: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Class name -> its folder, by name, and what was met on the way. Raises DataError: no such folder."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. Give one that holds a folder of pictures per class.")
    found: dict[str, Path] = {}
    problems: list[Problem] = []
    within = {first: _folders_in(first, problems) for first in _folders_in(source, problems) or ()}
    counts = {
        first: (_count_pictures(first), sum(map(_count_pictures, groups or ()))) for first, groups in within.items()
    }
    # a folder with pictures and folders of pictures in it is a class if that holds most of them, or most others are one
    votes = sum(bool(own) - bool(below) for own, below in counts.values())
    for first, groups in within.items():
        if groups is None:
            continue
        own, below = counts[first]
        if not groups or (own and (not below or own > below or votes > 0)):
            found[first.name] = first
            problems += [Problem(str(path), NOT_READ) for path in groups]
            continue
        problems += _astray(first)
        for second in groups:
            deeper = _folders_in(second, problems)
            if deeper is not None:
                found[f"{first.name}/{second.name}"] = second
                problems += [Problem(str(path), NOT_READ) for path in deeper]
    names, odd = check_names(found)
    return {name: found[name] for name in names}, problems + odd


def encoded_picture(path: Path, preprocessing: Preprocessing) -> bytes:
    """A picture's file as it is, if training can preprocess it; of other formats than PNG, JPEG, WebP: PNG.

    Raises DataError as `open_picture` and the preprocessing do, and for one of more than MAX_ENCODED_BYTES.
    """
    picture = _open(path)
    preprocessing(picture)
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as header:
        kept = header.format in ENCODED
    if not kept:
        stream = io.BytesIO()
        picture = upright(picture)  # the PNG holds no EXIF
        as_png = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (picture if as_png else picture.convert("RGB")).save(stream, "PNG")
        content = stream.getvalue()
    if len(content) > MAX_ENCODED_BYTES:
        raise DataError(f"{path}: {len(content) >> 20} MiB; an encoded picture may have {MAX_ENCODED_BYTES >> 20}.")
    return content


def _open(path: Path) -> Image.Image:
    _check_file(path)
    picture = open_picture(path)
    _check_single(picture, path)
    return picture


def _check_header(picture: Image.Image, path: Path) -> None:
    """Raises DataError: one of those that are refused, which shows before it is decoded."""
    check_size(picture, name=str(path))
    check_scale(picture, name=str(path))
    _check_single(picture, path)


def _check_single(picture: Image.Image, path: Path) -> None:
    if picture.size == (1, 1):
        raise DataError(f"{path}: a single pixel, with nothing to see in it.")


def _check_file(path: Path) -> None:
    """Raises DataError where nothing can be read. Opening a pipe waits for ever."""
    try:
        about = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"{path}: not a file.")
    if about.st_size == 0:
        raise DataError(f"{path}: an empty file (0 bytes).")


def _items(name: str, folder: Path) -> Iterator[Path | Problem]:
    """A class's pictures, and files that look like pictures and are not read."""
    pictures = pictures_in(folder)
    yield from pictures
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix in OTHER_SUFFIXES:
            yield Problem(str(path), f"{path.suffix} is not read; convert it ({', '.join(IMAGE_SUFFIXES)} are)")
        elif suffix not in IMAGE_SUFFIXES and not path.name.startswith(".") and _begins_like_a_picture(path):
            yield Problem(
                str(path), "a picture by its content, and by its name none that is read; rename it (.jpg, .png, …)"
            )
    if not pictures:
        yield Problem(str(folder), f"class {name} holds no picture ({', '.join(IMAGE_SUFFIXES)})")


def _astray(folder: Path) -> list[Problem]:
    """Pictures that lie beside the folders of classes, all in one Problem: there may be any number of them."""
    files = pictures_in(folder)
    if not files:
        return []
    which = f"{files[0].name} is" if len(files) == 1 else f"{len(files)} pictures ({files[0].name}, …) are"
    reason = f"{which} beside folders of classes and in none of them (left out); move them into one, or remove them"
    return [Problem(str(folder), reason)]


def _count_pictures(folder: Path) -> int:
    try:
        return len(pictures_in(folder))
    except OSError:  # told where it is listed
        return 0


def _begins_like_a_picture(path: Path) -> bool:
    """Whether a file holds PNG, JPEG, WebP, GIF or TIFF whatever its name says."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or (start.startswith(b"RIFF") and start.endswith(b"WEBP"))


def _folders_in(folder: Path, problems: list[Problem]) -> list[Path] | None:
    """Its folders by name, without hidden ones and links in a circle or to nowhere; None: it cannot be listed."""
    found = []
    try:
        with os.scandir(folder) as listed:
            entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda each: each.name)
    except OSError as error:
        problems.append(Problem(str(folder), f"cannot be listed ({error.strerror})"))
        return None
    for entry in entries:
        path = Path(entry.path)
        if entry.is_symlink() and _leads_astray(path):
            if path.suffix.lower() not in IMAGE_SUFFIXES:  # of pictures, reading will tell
                problems.append(Problem(str(path), "a link that leads nowhere or back to a folder around it"))
        elif entry.is_dir():
            found.append(path)
    return found


def _leads_astray(link: Path) -> bool:
    return not link.exists() or link.parent.resolve().is_relative_to(link.resolve())


def _no_pictures(source: Path) -> str:
    return f"{source}: no folder in it holds pictures. Make one folder per class, named like the class."


def _group(name: str) -> str:
    return name.split("/")[0] if "/" in name else "all"
