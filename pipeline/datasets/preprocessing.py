"""One picture of any size -> one array as in training. Preparing and adapting use the same code.

The manifest records the settings, the registered model carries them, so a user's pictures get the polarity, shape
and size that the model was trained on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pydantic import Field, model_validator

from pipeline.config import Section
from pipeline.datasets.source import Problem
from pipeline.errors import DataError

# A picture with more is refused by its header, before it is decoded: a file of a few kilobytes can hold gigabytes.
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384  # a drawing's canvas is padded to a square: one row of 64 million pixels would become petabytes
# What `IMAGE_SUFFIXES` stand for. Pillow tells a format by its content and knows more than these; EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What Pillow raises of damaged pixels and metadata.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError),
    struct.error,
)
TURNS = {  # the EXIF tag Orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow looks for the orientation
NAME = "metapipe name"  # key of `Image.info`: what errors call the picture

Item = TypeVar("Item")

TOO_MANY_PIXELS = f"pixels are more than the {MAX_PIXELS // 1_000_000} million that are read. Make it smaller."


class Preprocessing(Section):
    """What turns a picture into uint8 [size, size, channels]."""

    kind: Literal["drawing", "photo"]
    # drawing: grey, ink high whatever the paper's colour, the whole canvas padded to a square, contrast stretched;
    # photo: the central square, colours as they are
    size: int = Field(ge=8, le=1024)  # pixels
    channels: Literal[1, 3] = 1

    @model_validator(mode="after")
    def _drawings_are_grey(self) -> Preprocessing:
        if self.kind == "drawing" and self.channels != 1:
            raise ValueError("kind drawing is grey: channels must be 1")
        return self

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """uint8 [size, size, channels], area-averaged when shrinking.

        Raises DataError: grey of an unknown scale, or anything else that Pillow cannot turn into this.
        """
        name = picture.info.get(NAME, "a picture")
        check_scale(picture, name=name)
        try:
            return self._array(upright(picture))
        except DAMAGE as error:
            raise DataError(f"{name}: cannot be preprocessed ({error}). Remove or replace it.") from error

    def _array(self, picture: Image.Image) -> np.ndarray:
        if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            picture = _on_paper(picture.convert("RGBA"))
        grey = np.asarray(picture.convert("L"))
        if self.kind == "drawing":
            array = self._resize(Image.fromarray(_square_canvas(_ink_high(grey))))
            peak = int(array.max())
            return (array.astype(np.uint16) * 255 // max(peak, 1)).astype(np.uint8)[..., None]
        side = min(picture.size)
        square = ImageOps.fit(picture.convert("RGB" if self.channels == 3 else "L"), (side, side))
        return self._resize(square).reshape(self.size, self.size, self.channels)

    def _resize(self, square: Image.Image) -> np.ndarray:
        method = Image.Resampling.BOX if square.width > self.size else Image.Resampling.BICUBIC
        return np.asarray(square.resize((self.size, self.size), method))


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; as it is where that cannot be read.

    `ImageOps.exif_transpose` writes the EXIF anew, which fails where any of it is odd.
    """
    try:
        method = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return picture
    if method is None:
        return picture
    turned = picture.transpose(method)
    for key in METADATA:  # or it would be turned again
        turned.info.pop(key, None)
    return turned


def _on_paper(picture: Image.Image) -> Image.Image:
    """A transparent picture on white, or on black where its ink is white."""
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if np.ptp(np.asarray(on_white.convert("L"))):
        return on_white
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)


def _ink_high(grey: np.ndarray) -> np.ndarray:
    """Ink above paper at 0; the paper is told by the border, which a drawing seldom touches much."""
    paper = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    if paper > 127:  # the median may lie half-way between two greys; uint8 throughout: a scan has millions of pixels
        level = np.uint8(np.floor(paper))
        return level - np.minimum(grey, level)
    level = np.uint8(np.ceil(paper))
    return np.maximum(grey, level) - level


def _square_canvas(ink: np.ndarray) -> np.ndarray:
    height, width = ink.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(ink, ((top, side - height - top), (left, side - width - left)))


def open_picture(path: str | Path) -> Image.Image:
    """A decoded picture. Raises DataError: no picture, cut short, or more pixels than are read."""
    return decode_picture(path, name=str(path))


def check_size(header: Image.Image, *, name: str) -> None:
    """Raises DataError: a picture, which need not be decoded, has more pixels than are read."""
    if header.width * header.height > MAX_PIXELS:
        raise DataError(f"{name}: {header.width}×{header.height} {TOO_MANY_PIXELS}")
    if max(header.size) > MAX_SIDE:
        raise DataError(
            f"{name}: {header.width}×{header.height} pixels; the longer side may have {MAX_SIDE}. Make it smaller."
        )


def check_scale(header: Image.Image, *, name: str) -> None:
    """Raises DataError: grey of 32 bits. Which value is white nobody says; convert("L") would clip at 255."""
    if header.mode in ("F", "I"):
        raise DataError(f"{name}: grey of 32 bits, whose scale is not known. Convert it to 8 or 16 bit grey.")


def decode_picture(source: str | Path | BinaryIO, *, name: str) -> Image.Image:
    """A decoded picture from a file or stream that errors call `name`. Raises DataError as `open_picture` does."""
    try:
        with Image.open(source, formats=FORMATS) as picture:
            check_size(picture, name=name)
            picture.load()
            decoded = picture.copy()
            decoded.info[NAME] = name
            return decoded
    except FileNotFoundError:
        raise DataError(f"{name}: no such picture.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not a picture that can be read (PNG and JPEG are). Remove or convert it.") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise DataError(f"{name}: its {TOO_MANY_PIXELS}") from None
    except DAMAGE as error:
        raise DataError(f"{name}: cannot be decoded ({error}). Remove or replace it.") from error


def readable(
    items: Sequence[Item], open_item: Callable[[Item], Image.Image], preprocessing: Preprocessing
) -> tuple[np.ndarray, list[Problem]]:
    """For `Source.read`: uint8 [n, size, size, channels] of the pictures that can be read, and the others.

    open_item: raises DataError, "NAME: why", for one that cannot.
    """
    images, problems = [], []
    for item in items:
        try:
            images.append(preprocessing(open_item(item)))
        except DataError as error:
            name, _, reason = str(error).partition(": ")
            problems.append(Problem(name, reason))
    size, channels = preprocessing.size, preprocessing.channels
    return np.stack(images) if images else np.empty((0, size, size, channels), np.uint8), problems


def pictures_in(folder: Path) -> list[Path]:
    """The picture files directly in a folder, by name; hidden files left out."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def pictures_below(path: Path) -> list[Path]:
    """A picture itself, or every picture in a folder and the folders in it. Raises DataError where there is none."""
    if path.is_file():
        return [path]
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else []
    found = [picture for folder in folders for picture in pictures_in(folder)]
    if not found:
        raise DataError(f"{path}: holds no picture (PNG, JPEG, …). Give a picture or a folder of them.")
    return found
