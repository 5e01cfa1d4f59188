"""Glyphs: characters of many scripts, redrawn by a wobbly pen from the fonts that matplotlib ships. No download.

The embedded default data set, made to be like Omniglot: a class is a character, its examples are varied drawings,
and whole scripts are kept for validation and test. This file holds the scripts, the class list and the splits. For
each drawing it picks a face at random among those that have the character and agree on its shape; `glyph_strokes`
turns the face's glyph into strokes, and `glyph_pen` draws these.

Characters that look alike once size and position are normalized (A, Α, А; o, O, О, 0) are one class, of the first
script in SCRIPTS that has it. Training scripts come first, so no test class looks like a class trained on.

Every drawing is a function of (seed, class name, its number, size) and of the fonts, FreeType, Pillow, NumPy and SciPy.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.datasets.glyph_pen import clean_drawing, draw
from pipeline.datasets.glyph_strokes import Stroke, codepoints_of, is_line_drawing, strokes_of
from pipeline.datasets.near_duplicates import similarities
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.sources import SourceOptions
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


class Character(NamedTuple):
    """One class before it is drawn."""

    name: str  # "Greek/small-letter-alpha"
    group: str
    codepoint: int
    faces: tuple[str, ...]  # those that have it


class GlyphsOptions(SourceOptions):
    """Of the embedded data set."""

    size: int = Field(28, ge=16, le=1024, description="Height and width in pixels.")

    def open(self, *, seed: int) -> Glyphs:
        return Glyphs(seed=seed, size=self.size)


class Drawing(NamedTuple):
    """One drawing before it is drawn."""

    character: Character
    number: int


class Glyphs(Source):
    """The data set as a source for `prepare`: every class with uint8 [drawings, size, size, 1]."""

    preprocessing: Preprocessing

    def __init__(self, *, seed: int = 0, size: int = 28, drawings: int = 20) -> None:
        """size: pixels per side, at least 16. Raises DataError: a number out of range."""
        if size < 16 or drawings < 1:
            raise DataError(f"size {size}, drawings {drawings}: at least 16 and 1 are needed.")
        self.preprocessing = Preprocessing(kind="drawing", size=size)
        self._seed = seed
        self._drawings = drawings

    def classes(self) -> Iterator[RawClass]:
        """Raises DataError: no fonts found."""
        for character in characters():
            yield RawClass(character.name, character.group, [Drawing(character, i) for i in range(self._drawings)])

    def read(self, items: Sequence[Drawing]) -> tuple[np.ndarray, list[Problem]]:
        drawn = [drawing(item, seed=self._seed, size=self.preprocessing.size) for item in items]
        return np.stack(drawn), []

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        """The one class split, `script`; it is fixed, whatever the seed."""
        return {"script": splits({character.name: character.group for character in characters()})}


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
    drawn = [(c, strokes) for c, strokes in zip(found, lines, strict=True) if is_line_drawing(strokes)]
    drawn = [(c, s) for c, s in drawn if not (_script(c.group).connected and s[-1].part)]
    clean = np.stack([clean_drawing(strokes) for _, strokes in drawn])
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
    coverage = {face: codepoints_of(face) for face in FACES}
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


# The drawings of a class


def drawing(item: Drawing, *, seed: int, size: int) -> np.ndarray:
    """uint8 [size, size, 1], size in pixels; depends on (seed, name, number, size) only."""
    variants = _variants(item.character)
    digest = hashlib.sha256(f"{seed}/{item.character.name}/{item.number}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    return draw(variants[rng.integers(len(variants))], rng, size=size)[..., None]


@lru_cache(maxsize=8)
def _variants(character: Character) -> list[tuple[Stroke, ...]]:
    """The character's strokes in the reference face, and in every other face that agrees with it."""
    found = [strokes_of(face, character.codepoint) for face in character.faces]
    found = [strokes for strokes in found if is_line_drawing(strokes)]
    agreement = similarities(np.stack([clean_drawing(strokes) for strokes in found]), max_shift=1)[0]
    return [strokes for strokes, cosine in zip(found, agreement, strict=True) if cosine >= SAME_GLYPH]
