"""Classes in different splits that look the same: a leak that a split by class names cannot see.

Similarity. A class is its mean image. Each mean image is reduced by area averaging to about GRID × GRID cells (which
also blurs it), the mean over all classes is subtracted, and two classes are compared by cosine, the best over
shifts of up to MAX_SHIFT cells each way. Subtracting what all classes share matters: means of drawings are
centred blobs that correlate at 0.5 to 0.9 before, whatever is drawn.

Default threshold. Measured with 20 drawings a class: a glyphs class drawn anew with another seed has a median
similarity of 0.89 to itself and reaches 0.85 in 78 % of classes, 0.80 in 93 %; of pairs of different classes 99 % stay
below 0.62 and 99.99 % below 0.82 (glyphs) or 0.88 (Omniglot, which holds more look-alikes). By eye, pairs above 0.85
are look-alikes (bars, rings, d and ძ); from 0.80 down they no longer all are. In Omniglot's alphabet split 190 pairs
lie above 0.85, mostly bars, rings and dots.

Texts. A class is the mean of its texts' words and pairs of words, hashed, less the mean over all classes; no shifts.
Measured on CLINC150's 150 intents with 20 sentences each: with 20 other sentences of its own an intent has a median
similarity of 0.71; of pairs of different intents 99.9 % stay below 0.51, and above TEXT_THRESHOLD are two:
credit_score and improve_credit_score (0.75), calculator and definition (0.66, "what is …").

Limits. It reports the clearest look-alikes, not all: a class whose drawings vary much (an H with and without serifs)
may reach only 0.65 with its own copy. More blur, finer grids and wider shifts found no more at the same false rate.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.datasets.duplicates import LONGEST, normalized
from pipeline.datasets.source import Examples
from pipeline.errors import DataError

if TYPE_CHECKING:  # types imports torch: seconds at the start of every drawing process, for nothing
    from pipeline.types import Split

GRID = 14  # cells per side: 2 pixels of a 28×28 drawing
MAX_SHIFT = 1  # cells
BLOCK = 2048  # classes compared at once: memory does not grow with the square of their number
DEFAULT_THRESHOLD = 0.85
TEXT_THRESHOLD = 0.65
TEXT_FEATURES = 512
PROTOTYPE_EXAMPLES = 20  # of each class, whose mean is compared


class NearDuplicate(NamedTuple):
    """Two classes of different splits; class_a is in the earlier split by name, then by class name."""

    class_a: str
    split_a: Split
    class_b: str
    split_b: Split
    similarity: float  # cosine in [-1, 1]


class Prototypes:
    """What classes look or read like: the mean of the first examples of each; nothing of vectors and encoded files."""

    def __init__(self) -> None:
        self._means: dict[str, np.ndarray] = {}
        self._first: list[Examples] = []
        self._texts = False

    def add(self, examples: Examples) -> None:
        """Some of a class, after those before."""
        wanted = PROTOTYPE_EXAMPLES - sum(map(len, self._first))
        pictures = isinstance(examples, np.ndarray) and examples.ndim == 4
        texts = isinstance(examples, list) and bool(examples) and isinstance(examples[0], str)
        if wanted > 0 and len(examples) and (pictures or texts):
            self._first.append(examples[:wanted])
            self._texts = texts

    def end(self, name: str | None) -> None:
        """The class is whole. name: None where it is left out."""
        if name is not None and self._first:
            texts: Any = itertools.chain.from_iterable(self._first)
            self._means[name] = mean_text(texts) if self._texts else mean_image(np.concatenate(self._first))
        self._first = []

    def alike(self, splits: Mapping[str, Mapping[str, Split]]) -> dict[str, list[NearDuplicate]]:
        """Per class split, the classes of different parts that are alike; nothing where they cannot be compared."""
        if not self._means:
            return {}
        how = (TEXT_THRESHOLD, 0) if self._texts else (DEFAULT_THRESHOLD, MAX_SHIFT)
        return {
            split: alike({name: (members[name], mean) for name, mean in self._means.items()}, *how)
            for split, members in splits.items()
        }


def near_duplicates(
    prototypes: Mapping[str, tuple[Split, np.ndarray]], threshold: float = DEFAULT_THRESHOLD
) -> list[NearDuplicate]:
    """Pairs of classes across splits whose similarity is at least `threshold`, most similar first.

    prototypes: class name -> (its split, uint8 [count, H, W, C], the same H, W, C for all classes). threshold: in
    [-1, 1]. Raises DataError where shapes differ or a class has no image.
    """
    means = mean_images({name: images for name, (_, images) in prototypes.items()})
    return alike({name: (prototypes[name][0], mean) for name, mean in means.items()}, threshold)


def alike(
    means: Mapping[str, tuple[Split, np.ndarray]], threshold: float = DEFAULT_THRESHOLD, max_shift: int = MAX_SHIFT
) -> list[NearDuplicate]:
    """The same from each class's mean: class name -> (its split, float32 [h, w, C] of `mean_image` or `mean_text`)."""
    names = sorted(means, key=lambda name: (means[name][0], name))
    if len(names) < 2:
        return []
    splits = [means[name][0] for name in names]
    stack = np.stack([means[name][1] for name in names])
    stack -= stack.mean(axis=0)
    part = np.unique(splits, return_inverse=True)[1]
    found = []
    blocks = [np.arange(start, min(start + BLOCK, len(names))) for start in range(0, len(names), BLOCK)]
    for first, second in itertools.combinations_with_replacement(blocks, 2):
        members = first if first is second else np.concatenate([first, second])
        similar = similarities(stack[members], max_shift=max_shift)
        across = np.triu(part[members][:, None] != part[members])
        if first is not second:  # pairs within each of them are found when it is compared with itself
            across[: len(first), : len(first)] = across[len(first) :, len(first) :] = False
        for i, j in np.argwhere(across & (similar >= threshold)).tolist():
            a, b = int(members[i]), int(members[j])
            found.append(NearDuplicate(names[a], splits[a], names[b], splits[b], round(float(similar[i, j]), 4)))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.class_a, pair.class_b))


def mean_images(images: Mapping[str, np.ndarray], *, grid: int = GRID) -> dict[str, np.ndarray]:
    """`mean_image` of each class: uint8 [count, H, W, C] each, the same H, W, C. Raises DataError where it is not."""
    shape: tuple[int, ...] | None = None
    for name, array in images.items():
        shape = array.shape[1:] if shape is None else shape
        if array.ndim != 4 or array.shape[1:] != shape or not len(array):
            raise DataError(
                f"{name}: images of shape {array.shape}, where [count, {', '.join(map(str, shape))}] was expected."
            )
    return {name: mean_image(array, grid=grid) for name, array in images.items()}


def mean_image(images: np.ndarray, *, grid: int = GRID) -> np.ndarray:
    """The mean of uint8 [count, H, W, C] on a coarse grid: float32 [h, w, C] in [0, 1].

    A cell is max(1, H // grid) pixels square, so h is about `grid`; pixels that fill no cell are left out.
    """
    mean = images.mean(axis=0, dtype=np.float32) / np.float32(255)
    height, width, channels = mean.shape
    cell_h, cell_w = max(1, height // grid), max(1, width // grid)
    h, w = height // cell_h, width // cell_w
    cells = mean[: h * cell_h, : w * cell_w].reshape(h, cell_h, w, cell_w, channels)
    return cells.mean(axis=(1, 3))


def mean_text(texts: Iterable[str]) -> np.ndarray:
    """Texts' words and pairs of words, hashed, as a vector of length 1: float32 [1, 1, TEXT_FEATURES].

    Every text weighs the same, however long.
    """
    total = np.zeros(TEXT_FEATURES)
    for text in texts:
        words = normalized(text[:LONGEST]).split()
        counts = np.zeros(TEXT_FEATURES)
        for term in (*words, *map(" ".join, itertools.pairwise(words))):
            hashed = zlib.crc32(term.encode())
            counts[hashed % TEXT_FEATURES] += 1 - 2 * (hashed >> 31)  # signed, so that collisions cancel
        total += counts / max(float(np.linalg.norm(counts)), 1e-6)
    return (total / max(float(np.linalg.norm(total)), 1e-6)).astype(np.float32).reshape(1, 1, -1)


def similarities(features: np.ndarray, *, max_shift: int = 0) -> np.ndarray:
    """Cosine of every two maps, the best over shifts up to `max_shift` cells: [N, h, w, C] -> float32 [N, N].

    One matrix product per shift. A map is shifted with zeros drawn in and keeps its norm from before, so that ink
    pushed over the border lowers the similarity. Symmetric; a map of zeros is similar to nothing.
    """
    count, height, width, _ = features.shape
    norms = np.sqrt(np.square(features).sum(axis=(1, 2, 3), keepdims=True))
    unit = (features / np.maximum(norms, 1e-12)).astype(np.float32)
    flat = unit.reshape(count, -1)
    best = flat @ flat.T
    for down in range(max_shift + 1):
        for right in range(-max_shift, max_shift + 1):
            if down == 0 and right <= 0:
                continue  # the opposite shift is the transpose
            shifted = np.zeros_like(unit)
            shifted[:, down:, max(right, 0) : width + min(right, 0)] = unit[
                :, : height - down, max(-right, 0) : width - max(right, 0)
            ]
            cosine = shifted.reshape(count, -1) @ flat.T
            np.maximum(best, cosine, out=best)
            np.maximum(best, cosine.T, out=best)
    return best
