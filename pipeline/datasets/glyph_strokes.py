"""From a glyph of a font to strokes: render it, thin it to its centre lines, trace those.

So all faces and weights give the same kind of pen drawing. `strokes_of` goes the whole way:

1. the glyph is rendered by FreeType, its larger side about SKELETON_EXTENT pixels;
2. it is thinned to lines one pixel wide, and the short branches that thinning grows at corners are taken off; dots,
   which have no line, stay points;
3. the lines are cut at their junctions, scaled so that the larger side of the glyph runs from -1 to 1, freed of the
   pixels' steps, and resampled at POINT_SPACING.

Faces are those of the fonts that matplotlib ships. Pictures are indexed (row, column); strokes hold (x, y), y down.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline.errors import DataError

SKELETON_EXTENT = 72  # pixels of the larger side of a glyph that is thinned
POINT_SPACING = 0.04  # between the points of a stroke; the larger side of a glyph is 2

_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from above
Pixel = tuple[int, int]  # row, column


class Stroke(NamedTuple):
    """A centre line of a glyph whose larger side runs from -1 to 1; y points down."""

    points: np.ndarray  # float64 [n, 2] of (x, y), about POINT_SPACING apart; n = 1 is a dot
    free: tuple[bool, bool]  # whether each end touches no other stroke
    part: int  # strokes that touch share it; counts from 0, in the order of the glyph's strokes


@lru_cache(maxsize=32)
def codepoints_of(face: str) -> frozenset[int]:
    """The code points that a face has a glyph for. Raises DataError: no such font among matplotlib's."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file(face))).get_charmap())


@lru_cache(maxsize=4096)
def strokes_of(face: str, codepoint: int) -> tuple[Stroke, ...]:
    """The centre lines of one glyph. Empty where the glyph is blank or has no lines (solid shapes).

    face: file name of a font of matplotlib, without ".ttf". Raises DataError: no such font.
    """
    ink = _ink(face, codepoint)
    if not ink.any():
        return ()
    parts, _ = ndimage.label(ink, structure=np.ones((3, 3)))
    depth = ndimage.distance_transform_edt(ink)  # half the stroke's width on its centre line
    half_width = float(np.median(depth[depth >= ndimage.maximum_filter(depth, 3)]))
    lines: list[tuple[np.ndarray, tuple[bool, bool], int]] = []
    for part, box in enumerate(ndimage.find_objects(parts)):
        piece = parts[box] == part + 1
        corner = np.array([box[0].start, box[1].start])
        deepest = depth[box][piece].max()
        if deepest > SKELETON_EXTENT / 5:
            return ()  # a solid shape
        if max(piece.shape) <= 3.2 * half_width:  # a dot, round or square
            lines.append((np.array([[(n - 1) / 2 for n in piece.shape]]) + corner, (True, True), part))
            continue
        skeleton = _without_spurs(_thinned(piece), depth[box])
        lines += [(path + corner, free, part) for path, free in _traced(skeleton)]
    everything = np.concatenate([path for path, _, _ in lines])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = 2 / max(float((high - low).max()), 1.0)
    return tuple(
        Stroke(_smoothed((path - (low + high) / 2)[:, ::-1] * scale), free, part) for path, free, part in lines
    )


def is_line_drawing(strokes: tuple[Stroke, ...]) -> bool:
    """Not blank, not solid, and more than dots: about 1 long in all, half the glyph's larger side."""
    return sum(len(stroke.points) for stroke in strokes) * POINT_SPACING >= 1.0


def _font_file(face: str) -> Path:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not file.is_file():
        raise DataError(f"{file}: this font of matplotlib is missing. Reinstall matplotlib with its fonts.")
    return file


def _ink(face: str, codepoint: int) -> np.ndarray:
    """The glyph as bool [H, W], its larger side about SKELETON_EXTENT, with an empty border."""
    file = str(_font_file(face))
    extent = 100  # em, pixels; a first try that tells the glyph's own size
    left, top, right, bottom = _font(file, extent).getbbox(chr(codepoint))
    if right <= left or bottom <= top:
        return np.zeros((1, 1), dtype=bool)
    extent = min(round(extent * SKELETON_EXTENT / max(right - left, bottom - top)), 400)
    font = _font(file, extent)
    left, top, right, bottom = (int(side) for side in font.getbbox(chr(codepoint)))
    picture = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(picture).text((2 - left, 2 - top), chr(codepoint), fill=255, font=font)
    return np.asarray(picture) > 127


@lru_cache(maxsize=512)
def _font(file: str, em: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, em, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _removable() -> tuple[np.ndarray, np.ndarray]:
    """For each of the two half-passes, bool [256]: whether a pixel with these neighbours (bits as _AROUND) goes."""
    tables = np.zeros((2, 256), dtype=bool)
    for code in range(256):
        p2, p3, p4, p5, p6, p7, p8, p9 = (bool(code >> bit & 1) for bit in range(8))
        crossings = (
            (not p2 and (p3 or p4)) + (not p4 and (p5 or p6)) + (not p6 and (p7 or p8)) + (not p8 and (p9 or p2))
        )
        neighbours = min(
            (p9 or p2) + (p3 or p4) + (p5 or p6) + (p7 or p8), (p2 or p3) + (p4 or p5) + (p6 or p7) + (p8 or p9)
        )
        keeps_shape = crossings == 1 and 2 <= neighbours <= 3
        tables[0, code] = keeps_shape and not ((p2 or p3 or not p5) and p4)
        tables[1, code] = keeps_shape and not ((p6 or p7 or not p9) and p8)
    return tables[0], tables[1]


def _thinned(ink: np.ndarray) -> np.ndarray:
    """Lines one pixel wide: Guo and Hall 1989, "Parallel thinning with two-subiteration algorithms"."""
    field = np.pad(ink, 1).astype(np.uint8)
    height, width = ink.shape
    while True:
        changed = False
        for table in _removable():
            code = np.zeros(ink.shape, dtype=np.uint8)
            for bit, (down, right) in enumerate(_AROUND):
                code |= field[1 + down : 1 + down + height, 1 + right : 1 + right + width] << bit
            inside = field[1:-1, 1:-1]
            gone = table[code] & (inside == 1)
            inside[gone] = 0
            changed |= bool(gone.any())
        if not changed:
            return field[1:-1, 1:-1].astype(bool)


def _neighbours(skeleton: np.ndarray) -> dict[Pixel, list[Pixel]]:
    """Which pixels of a skeleton are joined: beside each other, or diagonal with no pixel beside both."""
    pixels = {(int(y), int(x)) for y, x in np.argwhere(skeleton)}
    joined: dict[Pixel, list[Pixel]] = {}
    for y, x in sorted(pixels):
        joined[y, x] = [
            (y + down, x + right)
            for down, right in _AROUND
            if (y + down, x + right) in pixels
            and not (down and right and ((y + down, x) in pixels or (y, x + right) in pixels))
        ]
    return joined


def _traced(skeleton: np.ndarray) -> list[tuple[np.ndarray, tuple[bool, bool]]]:
    """The skeleton cut at its junctions: paths of pixels, float64 [n, 2] of (row, column), and which ends are free."""
    joined = _neighbours(skeleton)
    nodes = [pixel for pixel, near in joined.items() if len(near) != 2]
    paths: list[list[Pixel]] = [[node] for node in nodes if not joined[node]]
    used: set[tuple[Pixel, Pixel]] = set()
    on_path: set[Pixel] = set()

    def follow(start: Pixel, step: Pixel) -> None:
        path = [start, step]
        used.add((start, step))
        while len(joined[path[-1]]) == 2 and path[-1] != start:
            first, second = joined[path[-1]]
            path.append(second if first == path[-2] else first)
        used.add((path[-1], path[-2]))
        on_path.update(path)
        paths.append(path)

    for node in nodes:
        for step in joined[node]:
            if (node, step) not in used:
                follow(node, step)
    for pixel in joined:  # closed curves that no other stroke touches
        if pixel not in on_path and len(joined[pixel]) == 2:
            follow(pixel, joined[pixel][0])
    return [
        (np.array(path, dtype=np.float64), (len(joined[path[0]]) <= 1, len(joined[path[-1]]) <= 1)) for path in paths
    ]


def _without_spurs(skeleton: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Without the short branches that thinning grows at corners: those within the width of the stroke they leave."""
    clean = skeleton.copy()
    for path, (free_start, free_end) in _traced(skeleton):
        if free_start == free_end:
            continue
        branch = path.astype(int)[::-1] if free_end else path.astype(int)
        if len(branch) <= 1.05 * depth[tuple(branch[-1])]:
            clean[tuple(branch[:-1].T)] = False
    return _thinned(clean)


def _smoothed(path: np.ndarray) -> np.ndarray:
    """A path of pixels without its steps, at POINT_SPACING: float64 [n, 2] -> [m, 2], ends kept."""
    if len(path) < 3:
        return path
    closed = bool((path[0] == path[-1]).all())
    smooth = ndimage.gaussian_filter1d(path[:-1] if closed else path, 2.0, axis=0, mode="wrap" if closed else "nearest")
    if closed:
        smooth = np.concatenate([smooth, smooth[:1]])
    smooth[0], smooth[-1] = (smooth[0], smooth[-1]) if closed else (path[0], path[-1])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(smooth, axis=0).T))])
    wanted = np.linspace(0.0, along[-1], max(2, round(along[-1] / POINT_SPACING)))
    return np.stack([np.interp(wanted, along, smooth[:, axis]) for axis in (0, 1)], axis=1)
