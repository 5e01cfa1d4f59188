"""Glyphs: characters of many scripts, redrawn by a wobbly pen from the fonts that matplotlib ships. No download.

The embedded default data set, made to be like Omniglot: a class is a character, its examples are varied drawings,
and whole scripts are kept for validation and test. How a drawing is made:

1. a face is drawn at random among those that have the character; the glyph is rendered and thinned to its
   centre lines, which are traced to strokes (so all faces and weights give the same kind of pen drawing);
2. the strokes are bent by a smooth random field, slanted, stretched and turned; each stroke bulges a little, its
   free ends over- or undershoot, and parts that do not touch move against each other;
3. a round pen of random, varying width runs along them at SUPERSAMPLING times the final resolution, fitted into
   the picture with a random scale and position, and the picture is reduced by area averaging.

Characters that look alike once size and position are normalized (A, Α, А; o, O, О, 0) are one class, of the first
script in SCRIPTS that has it. Training scripts come first, so no test class looks like a class trained on.

Every drawing is a function of (seed, class name, its number) and of the fonts, FreeType, Pillow and NumPy.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline.datasets.near_duplicates import similarities
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import RawClass
from pipeline.errors import DataError

if TYPE_CHECKING:  # types imports torch: seconds at the start of every drawing process, for nothing
    from pipeline.types import Split


class Script(NamedTuple):
    """One group of classes, whole in one split."""

    name: str
    split: Split
    ranges: tuple[tuple[int, int], ...]  # code points, ends included
    connected: bool = False  # only characters in one piece: leaves out those that differ by a dot


SCRIPTS = (  # in order of precedence for look-alikes
    Script("Latin", "meta_train", ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC6, 0xFE), (0x131, 0x2AF))),
    Script("Greek", "meta_train", ((0x370, 0x3E1), (0x3F7, 0x3FB))),
    Script("Cyrillic", "meta_train", ((0x402, 0x481), (0x48A, 0x525), (0xA644, 0xA695))),
    Script("Canadian-Aboriginal", "meta_train", ((0x1401, 0x1676),), connected=True),
    Script("Script", "meta_train", ((0x1D4D0, 0x1D503),)),
    Script("Fraktur", "meta_train", ((0x1D504, 0x1D537),)),
    Script("Mathematical", "meta_train", ((0x2200, 0x22FF),)),
    Script("Lisu", "meta_train", ((0xA4D0, 0xA4F7),)),
    Script("Old-Italic", "meta_val", ((0x10300, 0x10323),)),
    Script("Hebrew", "meta_val", ((0x5D0, 0x5EA),)),
    Script("Lao", "meta_val", ((0xE81, 0xEAE), (0xEB0, 0xEB0), (0xEBD, 0xEC4), (0xED0, 0xED9))),
    Script("NKo", "meta_val", ((0x7C0, 0x7E7),)),
    Script("Armenian", "meta_test", ((0x531, 0x556), (0x561, 0x587))),
    Script("Arabic", "meta_test", ((0x621, 0x63A), (0x641, 0x64A), (0x660, 0x669), (0x679, 0x6D5))),
    Script("Georgian", "meta_test", ((0x10D0, 0x10FA),)),
    Script("Khutsuri", "meta_test", ((0x10A0, 0x10C5), (0x2D00, 0x2D25))),  # the old Georgian capitals and minuscules
    Script("Tifinagh", "meta_test", ((0x2D30, 0x2D65),)),
)
FACES = (  # the first that has a character is its reference face
    "DejaVuSans",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
)
# Cosines of clean drawings from which two characters are one class, chosen by eye on lists of pairs: above 0.85 they
# are the same letter (Тт, Пп, ΓՐ, нᕼ) save for detail that varying drawings blur; from there to 0.80 some
# (D and O, v and ∀) are told apart by a reader. Between splits a lost class costs less than a leak.
ALIKE, ALIKE_ACROSS_SPLITS = 0.85, 0.80

SAME_GLYPH = 0.75  # cosine with the reference face below which a face is left out: another shape, or lost lines

SKELETON_EXTENT = 72  # pixels of the larger side of a glyph that is thinned
POINT_SPACING = 0.04  # between the points of a stroke; the larger side of a glyph is 2
SUPERSAMPLING = 4
REFERENCE_SIZE = 28  # pixels; pen widths are given for it and scale with the picture


class Character(NamedTuple):
    """One class before it is drawn."""

    name: str  # "Greek/small-letter-alpha"
    group: str
    codepoint: int
    faces: tuple[str, ...]  # those that have it


class Stroke(NamedTuple):
    """A centre line of a glyph whose larger side runs from -1 to 1; y points down."""

    points: np.ndarray  # float64 [n, 2] of (x, y), evenly spaced; n = 1 is a dot
    free: tuple[bool, bool]  # whether each end touches no other stroke
    part: int  # strokes that touch share it


class Glyphs:
    """The data set as a source for `prepare`."""

    def __init__(self, *, seed: int = 0, size: int = 28, drawings: int = 20, processes: int = 2) -> None:
        self.preprocessing = Preprocessing(kind="drawing", size=size)
        self._draw = partial(classes, seed=seed, size=size, drawings=drawings, processes=processes)

    def classes(self) -> Iterator[RawClass]:
        return self._draw()

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        """The one class split, `script`; it is fixed, whatever the seed."""
        return {"script": splits({character.name: character.group for character in characters()})}


def classes(*, seed: int = 0, size: int = 28, drawings: int = 20, processes: int = 2) -> Iterator[RawClass]:
    """All classes, each with uint8 [drawings, size, size, 1]; the same for any number of `processes`.

    size: pixels per side, at least 16. Processes are spawned: a script that calls this with `processes` above 1
    needs the `if __name__ == "__main__"` guard. Raises DataError: a number out of range, or no fonts found.
    """
    if size < 16 or drawings < 1 or processes < 1:
        raise DataError(f"size {size}, drawings {drawings}, processes {processes}: at least 16, 1 and 1 are needed.")
    chosen = characters()
    draw = partial(drawings_of, seed=seed, size=size, drawings=drawings)
    if processes == 1:
        yield from map(draw, chosen)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(draw, chosen, chunksize=8)


def splits(groups: Mapping[str, str]) -> dict[str, Split]:
    """Class name -> its script in, class name -> part out. Raises DataError: a script that is not in SCRIPTS."""
    by_script = {script.name: script.split for script in SCRIPTS}
    unknown = sorted(set(groups.values()) - set(by_script))
    if unknown:
        raise DataError(f"{', '.join(unknown)}: no script of the glyphs data set; those are {', '.join(by_script)}.")
    return {name: by_script[group] for name, group in groups.items()}


# Which characters there are


@lru_cache(maxsize=1)
def characters() -> tuple[Character, ...]:
    """The classes, look-alikes merged, in the order of SCRIPTS and of code points. A few seconds, then kept."""
    found = [character for script in SCRIPTS for character in _characters_of(script)]
    lines = [strokes_of(character.faces[0], character.codepoint) for character in found]
    drawn = [(c, strokes) for c, strokes in zip(found, lines, strict=True) if _is_line_drawing(strokes)]
    drawn = [(c, s) for c, s in drawn if not (_script(c.group).connected and s[-1].part)]
    clean = np.stack([_clean_drawing(strokes) for _, strokes in drawn])
    cosine = similarities(clean - clean.mean(axis=0), max_shift=1)
    split = np.array([_script(c.group).split for c, _ in drawn])
    alike = cosine >= np.where(split[:, None] == split, ALIKE, ALIKE_ACROSS_SPLITS)
    kept: list[int] = []
    for i in range(len(drawn)):
        if not alike[i, kept].any():
            kept.append(i)
    return tuple(drawn[i][0] for i in kept)


def _script(name: str) -> Script:
    return next(script for script in SCRIPTS if script.name == name)


def _characters_of(script: Script) -> Iterator[Character]:
    coverage = _coverage()
    for codepoint in (c for first, last in script.ranges for c in range(first, last + 1)):
        character = chr(codepoint)
        faces = tuple(face for face in FACES if codepoint in coverage[face])
        decomposition = unicodedata.decomposition(character)
        composed = decomposition and not decomposition.startswith("<font>")  # accents and ligatures
        unwanted = composed or " WITH " in unicodedata.name(character, " WITH ")
        if not faces or unwanted or unicodedata.category(character)[0] not in "LNS":
            continue
        yield Character(f"{script.name}/{_slug(character, script)}", script.name, codepoint, faces)


def _slug(character: str, script: Script) -> str:
    """The Unicode name without the script: GREEK SMALL LETTER ALPHA -> small-letter-alpha."""
    words = unicodedata.name(character).split()
    own = {word.upper() for word in script.name.split("-")} | {"SYLLABICS", "MATHEMATICAL", "BOLD", "GEORGIAN"}
    while len(words) > 1 and words[0] in own:
        words = words[1:]
    return "-".join(words).lower()


@lru_cache(maxsize=1)
def _coverage() -> dict[str, frozenset[int]]:
    """Face -> code points it has a glyph for."""
    from matplotlib.ft2font import FT2Font

    return {face: frozenset(FT2Font(str(_font_file(face))).get_charmap()) for face in FACES}


def _font_file(face: str) -> Path:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not file.is_file():
        raise DataError(f"{file}: this font of matplotlib is missing. Reinstall matplotlib with its fonts.")
    return file


# From a glyph to strokes


@lru_cache(maxsize=4096)
def strokes_of(face: str, codepoint: int) -> tuple[Stroke, ...]:
    """The centre lines of one glyph. Empty where the glyph is blank or has no lines (solid shapes)."""
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


_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from above


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


Pixel = tuple[int, int]


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


def _is_line_drawing(strokes: tuple[Stroke, ...]) -> bool:
    """Not blank, not solid, and more than dots."""
    return sum(len(stroke.points) for stroke in strokes) * POINT_SPACING >= 1.0


# From strokes to a drawing


def drawings_of(character: Character, *, seed: int, size: int, drawings: int) -> RawClass:
    """One class: the i-th drawing depends on (seed, name, i, size) only."""
    images = np.empty((drawings, size, size, 1), dtype=np.uint8)
    variants = _variants(character)
    for i in range(drawings):
        digest = hashlib.sha256(f"{seed}/{character.name}/{i}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        images[i, :, :, 0] = draw(variants[rng.integers(len(variants))], rng, size=size)
    return RawClass(character.name, character.group, images)


def _variants(character: Character) -> list[tuple[Stroke, ...]]:
    """The character's strokes in the reference face, and in every other face that agrees with it."""
    found = [strokes_of(face, character.codepoint) for face in character.faces]
    found = [strokes for strokes in found if _is_line_drawing(strokes)]
    agreement = similarities(np.stack([_clean_drawing(strokes) for strokes in found]), max_shift=1)[0]
    return [strokes for strokes, cosine in zip(found, agreement, strict=True) if cosine >= SAME_GLYPH]


def draw(strokes: Iterable[Stroke], rng: np.random.Generator, *, size: int) -> np.ndarray:
    """One wobbly drawing, uint8 [size, size]; its darkest pixel is 255, and no ink touches the border."""
    bent = _bent(strokes, rng)
    points = np.concatenate(bent)
    points = points @ _affine(rng).T
    extent = rng.uniform(0.7, 0.86)
    crowded = np.sqrt(min(1.0, 7.0 / (len(points) * POINT_SPACING)))  # an A is about 6 long: finer pens beyond
    widths = _pen_widths(points, rng) * (rng.uniform(1.8, 3.1) / REFERENCE_SIZE * extent * crowded)
    return _inked(points, widths, extent, rng.uniform(-1, 1, 2), size)


def _clean_drawing(strokes: Iterable[Stroke]) -> np.ndarray:
    """The strokes as they are with a middling pen, blurred by a pixel: float32 [28, 28, 1], for comparisons.

    Half-way to a square (the shorter side grows to the geometric mean), since drawings of one class vary in
    proportion: an O and a circle should meet, a bar and a dash should not.
    """
    points = np.concatenate([stroke.points for stroke in strokes])
    span = np.ptp(points, axis=0)
    points = points * np.maximum(span / span.max(), 0.15) ** -0.5
    picture = _inked(points, np.full(len(points), 2.5 / REFERENCE_SIZE), 0.75, np.zeros(2), REFERENCE_SIZE)
    return ndimage.gaussian_filter(picture.astype(np.float32), 1.0)[..., None]


def _bent(strokes: Iterable[Stroke], rng: np.random.Generator) -> list[np.ndarray]:
    """The strokes' points [n, 2] each, moved by an elastic field and each stroke by its own unsteadiness."""
    waves = rng.normal(0.0, 0.9, (5, 2))  # radians per unit: a glyph, 2 wide, sees up to about half a wave
    phases = rng.uniform(0, 2 * np.pi, (5, 2))
    amplitudes = rng.normal(0.0, 0.055, (5, 2))
    shifts: dict[int, np.ndarray] = {}
    bent = []
    for stroke in strokes:
        points = stroke.points
        if stroke.part not in shifts:
            shifts[stroke.part] = rng.normal(0.0, 0.05, 2) if shifts else np.zeros(2)
        moved = points + shifts[stroke.part]
        if len(points) > 2:
            moved = moved + _unsteadiness(stroke, rng)
        angles = (moved @ waves.T)[..., None] + phases
        bent.append(moved + (np.sin(angles) * amplitudes).sum(axis=1))
    return bent


def _unsteadiness(stroke: Stroke, rng: np.random.Generator) -> np.ndarray:
    """Displacements [n, 2]: a bulge across the stroke, and at free ends a hook and an over- or undershoot."""
    points = stroke.points
    length = len(points) * POINT_SPACING
    along = np.linspace(0.0, 1.0, len(points))[:, None]
    tangent = np.gradient(points, axis=0)
    tangent /= np.maximum(np.hypot(tangent[:, :1], tangent[:, 1:]), 1e-9)
    across = tangent[:, ::-1] * [1.0, -1.0]
    moved = across * (rng.normal(0.0, 0.05) * length * np.sin(np.pi * along))
    reach = min(length, 1.0)
    for free, towards_end in zip(stroke.free, (1 - along, along), strict=True):
        direction = rng.normal(0.0, 0.08, 2) * reach
        if free:
            moved = moved + direction * towards_end**2
    return moved


def _affine(rng: np.random.Generator) -> np.ndarray:
    """[2, 2]: stretched, slanted, turned."""
    stretch = np.diag(np.exp(rng.normal(0.0, 0.1, 2)))
    slant = np.array([[1.0, rng.normal(-0.06, 0.12)], [0.0, 1.0]])
    angle = rng.normal(0.0, 0.07)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ slant @ stretch


def _pen_widths(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative pen width at each point [n], about 1: pressure that varies slowly over the picture."""
    angles = points @ rng.normal(0.0, 1.5, (2, 3)) + rng.uniform(0, 2 * np.pi, 3)
    return np.exp(0.13 * np.sin(angles).sum(axis=1))


def _inked(points: np.ndarray, widths: np.ndarray, extent: float, offset: np.ndarray, size: int) -> np.ndarray:
    """A round pen along the points: uint8 [size, size].

    widths [n] and extent (of the larger side of the ink) are fractions of the picture; offset [2] in [-1, 1] takes
    the ink from the middle to what room is left beside it, short of one pixel.
    """
    canvas = size * SUPERSAMPLING
    radius = widths * (canvas / 2)
    low, high = points.min(axis=0), points.max(axis=0)
    room = canvas * extent - 2 * radius.max()
    scale = room / max(float((high - low).max()), 0.05)
    span = (high - low) * scale
    free = (canvas - 2 * SUPERSAMPLING - span - 2 * radius.max()) / 2  # on each side
    centre = canvas / 2 + offset * np.minimum(np.maximum(free, 0), 0.045 * canvas)
    placed = (points - (low + high) / 2) * scale + centre
    picture = Image.new("L", (canvas, canvas))
    pen = ImageDraw.Draw(picture)
    for (x, y), r in zip(placed.tolist(), radius.tolist(), strict=True):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    small = np.asarray(picture).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean(axis=(1, 3))
    return np.round(small * (255 / small.max())).astype(np.uint8)
