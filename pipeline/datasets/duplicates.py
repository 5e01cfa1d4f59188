"""Examples that are there twice, in memory that does not grow with the data: digests, and likeness of pictures.

Identical: sha256 of the pixels, of a file's or text's bytes, of the numbers. Of at most DIGESTS examples 40 bytes are
kept; of larger data sets those whose digest begins low, so that all copies of an example are kept or all are dropped.

Near, of pictures: thumbnails of GRID × GRID grey cells, less the mean of them all, of cosine NEAR_COSINE or more.
Candidates share BAND_BITS signs of random projections, in one of BANDS tries (locality-sensitive hashing: Charikar
2002). Measured on Omniglot at 28×28 (32 460 drawings): of copies saved as JPEG with quality 75 all are found, with
quality 40 97 %, of copies enlarged and reduced again 93 %, of brighter ones 44 %, of copies shifted by a pixel or
mirrored almost none; 45 pairs of drawings of different characters are as much alike (glyphs: none of 15 440).
Near, of texts: the same but for case, punctuation, spaces and Unicode form.

A leak is an example of a later part of a class split (meta_train, meta_val, meta_test) with a copy in an earlier one.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.datasets.source import Examples

DIGESTS = 2_000_000
NEAR_COSINE = 0.98
GRID = 14
BANDS, BAND_BITS = 4, 16
LARGEST_BAND = 2048  # pictures with one hash; where there are more (blank ones), they are not compared
MAX_PAIRS = 1_000_000
LISTED = 50


class Pair(NamedTuple):
    """Two examples: their classes' names, and their numbers there, from 0. The first one is in the earlier part."""

    class_a: str
    number_a: int
    class_b: str
    number_b: int


class Leaks(NamedTuple):
    """Examples of later parts with a copy in an earlier one."""

    examples: int
    listed: list[Pair]  # of the first LISTED of them


class Digests:
    """Which examples are copies of others."""

    def __init__(self, examples: int, *, texts: bool) -> None:
        self.share = min(1.0, DIGESTS / max(examples, 1))  # of the examples that are compared
        self._limit = np.uint64(min(self.share * 2**64, 2**64 - 1))
        self._texts = texts
        self._rows: list[np.ndarray] = []  # uint64 [n, 4] each: digest, class, number; of texts, of them normalized too

    def add(self, class_id: int, start: int, examples: Examples) -> np.ndarray:
        """Examples of one class from number `start` on. Returns uint64 [n], equal where examples are."""
        exact = _hashed(_contents(examples))
        near = _hashed(normalized(text).encode() for text in examples) if self._texts else exact  # type: ignore[arg-type]
        rows = np.empty((len(examples), 6 if self._texts else 4), np.uint64)
        rows[:, :2], rows[:, 2], rows[:, 3] = exact, class_id, np.arange(start, start + len(examples))
        if self._texts:
            rows[:, 4:] = near
        self._rows.append(rows[near[:, 0] <= self._limit])
        return exact[:, 0]

    def copies(self) -> tuple[int, int]:
        """How many examples are a copy of another of their class, and of one of another class."""
        rows = self._table()
        order = np.lexsort((rows[:, 3], rows[:, 2], rows[:, 1], rows[:, 0]))
        same = (rows[order][1:, :2] == rows[order][:-1, :2]).all(1)
        same_class = rows[order][1:, 2] == rows[order][:-1, 2]
        return int((same & same_class).sum()), int((same & ~same_class).sum())

    def leaks(self, names: Sequence[str], parts: np.ndarray) -> tuple[Leaks, Leaks | None]:
        """Identical examples across parts; of texts also those that are the same once normalized (but not identical).

        names: of the classes; parts: int [classes], a later part has a larger number.
        """
        rows = self._table()
        part = parts[rows[:, 2].astype(np.int64)]
        exact, partner = _leaking(rows[:, :2], part)
        identical = _listed(names, rows, np.flatnonzero(exact), partner)
        if not self._texts:
            return identical, None
        near, partner = _leaking(rows[:, 4:], part)
        return identical, _listed(names, rows, np.flatnonzero(near & ~exact), partner)

    def _table(self) -> np.ndarray:
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0]


class Likeness:
    """Which pictures look the same: a copy in another size, format or crop of a pixel."""

    def __init__(self) -> None:
        self._thumbnails: list[np.ndarray] = []  # uint8 [n, GRID²] each
        self._rows: list[np.ndarray] = []  # uint64 [n, 4] each, as in Digests; the second number is 0

    @property
    def compared(self) -> int:
        return sum(map(len, self._rows))

    def add(self, class_id: int, numbers: np.ndarray, images: np.ndarray, digests: np.ndarray) -> None:
        """uint8 [n, H, W, C] of one class, their numbers [n] in it, and what `Digests.add` said of them [n]."""
        rows = np.zeros((len(images), 4), np.uint64)
        rows[:, 0], rows[:, 2], rows[:, 3] = digests, class_id, numbers
        self._rows.append(rows)
        self._thumbnails.append(thumbnails(images).reshape(len(images), -1))

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [pairs, 2], pictures of different classes that look the same and are not identical, most alike first.

        And uint64 [n, 4], the rows that these numbers stand for.
        """
        rows = np.concatenate(self._rows)
        maps = np.concatenate(self._thumbnails).astype(np.float32)
        maps -= maps.mean(axis=0)
        norms = np.sqrt(np.square(maps).sum(axis=1, keepdims=True))
        unit = maps / np.maximum(norms, 1e-6)
        signs = (
            unit @ np.random.default_rng(0).standard_normal((unit.shape[1], BANDS * BAND_BITS), dtype=np.float32) > 0
        )
        bands = np.packbits(signs.reshape(len(unit), BANDS, BAND_BITS), axis=2).view(">u2")[..., 0]
        found: dict[int, float] = {}
        for band in bands.T:
            for members in _runs(band):
                cosine = unit[members] @ unit[members].T
                alike = np.triu(cosine >= NEAR_COSINE, k=1)
                alike &= (rows[members, 2][:, None] != rows[members, 2]) & (
                    rows[members, 0][:, None] != rows[members, 0]
                )
                for a, b in np.argwhere(alike).tolist():
                    found[int(members[a]) * len(unit) + int(members[b])] = float(cosine[a, b])
                if len(found) >= MAX_PAIRS:
                    break
        keys = np.array(sorted(found, key=lambda key: (-found[key], key)), dtype=np.int64).reshape(-1)
        return np.stack([keys // len(unit), keys % len(unit)], axis=1), rows

    def leaks(self, names: Sequence[str], parts: np.ndarray, pairs: np.ndarray, rows: np.ndarray) -> Leaks:
        """Those of `pairs` whose pictures are in different parts. names, parts: as in `Digests.leaks`."""
        part = parts[rows[:, 2].astype(np.int64)]
        across = pairs[part[pairs[:, 0]] != part[pairs[:, 1]]]
        swap = part[across[:, 0]] > part[across[:, 1]]
        across[swap] = across[swap][:, ::-1]
        _, first = np.unique(across[:, 1], return_index=True)
        chosen = across[np.sort(first)]
        partner = np.zeros(len(rows), np.int64)
        partner[chosen[:, 1]] = chosen[:, 0]
        return _listed(names, rows, chosen[:, 1], partner)


def normalized(text: str) -> str:
    """A text without what a copy may differ in: case, punctuation, spaces, Unicode form."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join(kept.split()) or folded


def thumbnails(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, C] -> uint8 [n, GRID, GRID]: grey, by area."""
    grey = images.mean(axis=3, dtype=np.float32)
    down, across = _cells(images.shape[1]), _cells(images.shape[2])
    return np.rint(down @ grey @ across.T).astype(np.uint8)


def _cells(side: int) -> np.ndarray:
    """float32 [GRID, side]: the share of each pixel in each cell's mean."""
    edges = np.linspace(0, side, GRID + 1)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    overlap = overlap.clip(0)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _contents(examples: Examples) -> Iterator[bytes | memoryview]:
    if isinstance(examples, np.ndarray):
        for row in np.ascontiguousarray(examples).reshape(len(examples), -1):
            yield row.data
    else:
        for example in examples:
            yield example.encode() if isinstance(example, str) else example


def _hashed(contents: Iterator[bytes | memoryview]) -> np.ndarray:
    """uint64 [n, 2]: the first 16 bytes of each one's sha256."""
    digests = b"".join(hashlib.sha256(content).digest()[:16] for content in contents)
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)


def _leaking(keys: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [n], which rows have an equal key (uint64 [n, 2]) in an earlier part, and int64 [n], a row that has it."""
    order = np.lexsort((np.arange(len(keys)), part, keys[:, 1], keys[:, 0]))
    begins = np.concatenate([[True], (keys[order][1:] != keys[order][:-1]).any(1)])[: len(order)]
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    partner = np.empty(len(order), np.int64)
    partner[order] = first
    return part > part[partner], partner


def _listed(names: Sequence[str], rows: np.ndarray, found: np.ndarray, partner: np.ndarray) -> Leaks:
    listed = []
    for row in found[:LISTED].tolist():
        earlier, later = rows[partner[row]], rows[row]
        listed.append(Pair(names[int(earlier[2])], int(earlier[3]), names[int(later[2])], int(later[3])))
    return Leaks(len(found), listed)


def _runs(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of equal values, of each value that is there more than once and not too often; ascending."""
    order = np.argsort(hashes, kind="stable")
    cuts = np.flatnonzero(np.diff(hashes[order])) + 1
    for members in np.split(order, cuts):
        if 1 < len(members) <= LARGEST_BAND:
            yield members
