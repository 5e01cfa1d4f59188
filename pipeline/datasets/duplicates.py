"""Examples that are there twice, in memory that does not grow with the data: digests, and likeness of pictures.

Identical: sha256 of the pixels, of a file's or text's bytes, of the numbers. Of at most DIGESTS examples 40 bytes are
kept; of larger data sets those whose digest begins low, so that all copies of an example are kept or all are dropped.

Near, of pictures: thumbnails of GRID × GRID grey cells, less the mean of them all, of cosine NEAR_COSINE or more.
Candidates share BAND_BITS signs of random projections, in one of BANDS tries (locality-sensitive hashing: Charikar
2002). Measured on Omniglot at 28×28 (32 460 drawings): of copies saved as JPEG with quality 75 all are found, with
quality 40 97 %, of copies enlarged and reduced again 93 %, of brighter ones 44 %, of copies shifted by a pixel or
mirrored almost none; 45 pairs of drawings of different characters are as much alike (glyphs: none of 15 440).
Near, of texts: the same but for case, punctuation, spaces and Unicode form; and, of NEAR_EXAMPLES of them, those that
share NEAR_JACCARD of their pieces of SHINGLE characters (MinHash: Broder 1997), as with a word more or less.
Near, of vectors with NEAR_COLUMNS columns or more: NEAR_DEVIATIONS standard deviations apart (root of the mean square
over the columns), as with rounded numbers.

A leak is an example of a later part of a class split (meta_train, meta_val, meta_test) with a copy in an earlier one.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.datasets.source import Column, Examples, Modality

DIGESTS = 2_000_000
NEAR_COSINE = 0.98
GRID = 14
BANDS, BAND_BITS = 4, 16
SHINGLE, HASHES, HASHES_PER_BAND = 4, 64, 4
NEAR_JACCARD = 0.8
LONGEST = 10_000  # characters of a text that are looked at
NEAR_DEVIATIONS = 0.02
NEAR_COLUMNS = 8
NEAR_NUMBERS = 20_000_000  # of vectors that are compared
NEAR_EXAMPLES = 50_000  # that are compared for likeness, evenly from all classes
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

    def leaks(
        self, names: Sequence[str], parts: np.ndarray, *, also: np.ndarray | None = None
    ) -> tuple[Leaks, Leaks | None]:
        """Identical examples across parts; of texts also those that are nearly so: the same once normalized.

        names: of the classes; parts: int [classes], a later part has a larger number. also: what `Likeness.across`
        found, which joins those.
        """
        rows = self._table()
        part = parts[rows[:, 2].astype(np.int64)]
        exact, partner = _leaking(rows[:, :2], part)
        identical = _with_partners(rows, np.flatnonzero(exact), partner)
        if not self._texts:
            return listed(names, identical), None
        near, partner = _leaking(rows[:, 4:], part)
        found = np.concatenate([_with_partners(rows, np.flatnonzero(near), partner), *([] if also is None else [also])])
        found = found[~np.isin(_which(found), _which(identical))]
        _, first = np.unique(_which(found), return_index=True)
        return listed(names, identical), listed(names, found[np.sort(first)])

    def _table(self) -> np.ndarray:
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0]


class Likeness:
    """Which examples nearly agree: pictures that look the same, texts of the same words, vectors of close numbers.

    columns: of vectors.
    """

    def __init__(self, modality: Modality, columns: Sequence[Column] = ()) -> None:
        self._kind: _Pictures | _Texts | _Vectors
        self._kind = _Texts() if modality == "text" else _Vectors(columns) if modality == "vector" else _Pictures()
        self._features: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []  # uint64 [n, 4] each, as in Digests; the second number is 0

    @property
    def most(self) -> int:
        """Examples that are compared, of the whole data set; 0: they cannot be."""
        return self._kind.most

    @property
    def compared(self) -> int:
        return sum(map(len, self._rows))

    def add(self, class_id: int, numbers: np.ndarray, examples: Examples, digests: np.ndarray) -> None:
        """Examples of one class (pictures uint8 [n, H, W, C]), their numbers [n] in it, and what they are equal by [n].

        digests: of `Digests.add`, whose equal examples are no pairs here.
        """
        rows = np.zeros((len(examples), 4), np.uint64)
        rows[:, 0], rows[:, 2], rows[:, 3] = digests, class_id, numbers
        self._rows.append(rows)
        self._features.append(self._kind.features(examples))

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [pairs, 2], examples of different classes that nearly agree and are not identical, the closest first.

        And uint64 [n, 4], the rows that these numbers stand for.
        """
        rows = np.concatenate(self._rows)
        features = self._kind.comparable(np.concatenate(self._features))
        found: dict[int, float] = {}
        for band in self._kind.bands(features):
            for members in _runs(band):
                closeness = self._kind.closeness(features[members])
                near = np.triu(closeness >= self._kind.least, k=1)
                near &= (rows[members, 2][:, None] != rows[members, 2]) & (
                    rows[members, 0][:, None] != rows[members, 0]
                )
                for a, b in np.argwhere(near).tolist():
                    found[int(members[a]) * len(rows) + int(members[b])] = float(closeness[a, b])
                if len(found) >= MAX_PAIRS:
                    break
            if len(found) >= MAX_PAIRS:
                break
        keys = np.array(sorted(found, key=lambda key: (-found[key], key)), dtype=np.int64).reshape(-1)
        return np.stack([keys // len(rows), keys % len(rows)], axis=1), rows

    def across(self, parts: np.ndarray, pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Those of `pairs` whose examples are in different parts, one for each example of a later part.

        uint64 [n, 4]: class and number of the example of the later part, and of the other. parts: as in
        `Digests.leaks`.
        """
        part = parts[rows[:, 2].astype(np.int64)]
        across = pairs[part[pairs[:, 0]] != part[pairs[:, 1]]]
        swap = part[across[:, 0]] > part[across[:, 1]]
        across[swap] = across[swap][:, ::-1]
        _, first = np.unique(across[:, 1], return_index=True)
        chosen = across[np.sort(first)]
        return np.concatenate([rows[chosen[:, 1], 2:4], rows[chosen[:, 0], 2:4]], axis=1)


class _Pictures:
    """By the cosine of their thumbnails, less the mean of all."""

    most = NEAR_EXAMPLES
    least = NEAR_COSINE

    def features(self, pictures: Examples) -> np.ndarray:
        assert isinstance(pictures, np.ndarray)
        return thumbnails(pictures).reshape(len(pictures), -1)

    def comparable(self, maps: np.ndarray) -> np.ndarray:
        maps = maps.astype(np.float32)
        maps -= maps.mean(axis=0)
        norms = np.sqrt(np.square(maps).sum(axis=1, keepdims=True))
        return maps / np.maximum(norms, 1e-6)

    def bands(self, unit: np.ndarray) -> Iterator[np.ndarray]:
        yield from _signs(unit)

    def closeness(self, unit: np.ndarray) -> np.ndarray:
        return unit @ unit.T


class _Texts:
    """By the share of their pieces of SHINGLE characters that both have (Jaccard), as MinHash estimates it."""

    most = NEAR_EXAMPLES
    least = NEAR_JACCARD

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._factors = random.integers(0, 2**64, HASHES, dtype=np.uint64) | np.uint64(1)
        self._terms = random.integers(0, 2**64, HASHES, dtype=np.uint64)

    def features(self, texts: Examples) -> np.ndarray:
        """uint32 [n, HASHES]: of each hash, the least one of a text's pieces."""
        out = np.empty((len(texts), HASHES), np.uint32)
        for row, text in enumerate(texts):
            assert isinstance(text, str)
            padded = f" {normalized(text[:LONGEST])} "
            pieces = {padded[i : i + SHINGLE] for i in range(max(1, len(padded) - SHINGLE + 1))}
            hashes = np.fromiter((zlib.crc32(piece.encode()) for piece in pieces), np.uint64, len(pieces))
            mixed = hashes[:, None] * self._factors + self._terms  # modulo 2^64: the upper bits are the hash
            out[row] = mixed.min(axis=0) >> np.uint64(32)
        return out

    def comparable(self, hashes: np.ndarray) -> np.ndarray:
        return hashes

    def bands(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, HASHES, HASHES_PER_BAND):
            band = np.ascontiguousarray(hashes[:, start : start + HASHES_PER_BAND])
            yield np.unique(band, axis=0, return_inverse=True)[1].reshape(-1)

    def closeness(self, hashes: np.ndarray) -> np.ndarray:
        same = np.zeros((len(hashes), len(hashes)), np.float32)
        for column in hashes.T:
            same += column[:, None] == column
        return same / HASHES


class _Vectors:
    """By how far their numbers are apart, in standard deviations of the columns; categories are alike or not.

    Of few columns none is compared: there unrelated rows are as close.
    """

    least = -NEAR_DEVIATIONS

    def __init__(self, columns: Sequence[Column]) -> None:
        random = np.random.default_rng(0)
        self._tables = {
            i: np.sign(random.standard_normal(len(column.categories))) + random.standard_normal(len(column.categories))
            for i, column in enumerate(columns)
            if column.categories
        }
        self.most = min(NEAR_EXAMPLES, NEAR_NUMBERS // len(columns)) if len(columns) >= NEAR_COLUMNS else 0

    def features(self, vectors: Examples) -> np.ndarray:
        assert isinstance(vectors, np.ndarray)
        return vectors.astype(np.float32)

    def comparable(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [n, D]: the root of the mean square of two rows' difference is their distance."""
        out = vectors.astype(np.float32)
        for i, table in self._tables.items():  # the codes of categories have no order
            there = ~np.isnan(out[:, i])
            out[there, i] = table[out[there, i].astype(np.int64)]
        missing = np.isnan(out)
        count = np.maximum((~missing).sum(axis=0), 1)
        out[missing] = 0
        mean = out.sum(axis=0, dtype=np.float64) / count
        out = np.where(missing, 0, out - mean).astype(np.float32)
        std = np.sqrt(np.square(out, dtype=np.float64).sum(axis=0) / count)  # a square may overflow float32
        return (out / np.where(std > 0, std, 1) / np.sqrt(out.shape[1])).astype(np.float32)

    def bands(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        yield from _signs(rows)

    def closeness(self, rows: np.ndarray) -> np.ndarray:
        squares = np.square(rows).sum(axis=1)
        apart = squares[:, None] + squares - 2 * rows @ rows.T
        return -np.sqrt(np.maximum(apart, 0))


def _signs(rows: np.ndarray) -> Iterator[np.ndarray]:
    """uint16 [n], BANDS times: on which side of BAND_BITS random planes each row is."""
    planes = np.random.default_rng(0).standard_normal((rows.shape[1], BANDS * BAND_BITS), dtype=np.float32)
    signs = (rows @ planes > 0).reshape(len(rows), BANDS, BAND_BITS)
    yield from np.packbits(signs, axis=2).view(">u2")[..., 0].T


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


def listed(names: Sequence[str], found: np.ndarray) -> Leaks:
    """uint64 [n, 4], as `Likeness.across` gives them. names: of the classes."""
    pairs = [Pair(names[c], d, names[a], b) for a, b, c, d in found[:LISTED].tolist()]
    return Leaks(len(found), pairs)


def _with_partners(rows: np.ndarray, found: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """uint64 [n, 4]: class and number of the rows `found`, and of their partners."""
    return np.concatenate([rows[found, 2:4], rows[partner[found], 2:4]], axis=1)


def _which(found: np.ndarray) -> np.ndarray:
    """uint64 [n]: tells the examples of later parts apart."""
    return found[:, 0] << np.uint64(32) | found[:, 1]


def _runs(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of equal values, of each value that is there more than once and not too often; ascending."""
    order = np.argsort(hashes, kind="stable")
    cuts = np.flatnonzero(np.diff(hashes[order])) + 1
    for members in np.split(order, cuts):
        if 1 < len(members) <= LARGEST_BAND:
            yield members
