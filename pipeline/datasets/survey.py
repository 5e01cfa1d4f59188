"""What a prepared data set holds: statistics of its examples by class, and examples that are there twice.

One pass over the shards, a few MB at a time; what is kept does not grow with the examples (see `duplicates`).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.datasets.duplicates import Digests, Leaks, Likeness, listed
from pipeline.datasets.near_duplicates import NearDuplicate, Prototypes
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.datasets.source import Examples, Original
from pipeline.errors import DataError
from pipeline.storage import Location
from pipeline.tasks import shards
from pipeline.types import SPLITS

DECODED = 20  # encoded pictures of each class that are decoded
LEAST_OF_A_CLASS = 2  # examples that are compared for likeness


class ClassStatistics(NamedTuple):
    """One class.

    mean, std: of pictures, by channel, of the pixels in [0, 1]; of vectors, by column, without what is missing; of
    texts, of their lengths in characters.
    """

    name: str
    group: str
    examples: int
    mean: list[float]
    std: list[float]


class Survey(NamedTuple):
    """What was found."""

    classes: list[ClassStatistics]
    mean: list[float]  # over all examples
    std: list[float]
    missing: list[float]  # of vectors: the share of the examples without a value, by column
    originals: Counter[Original]  # encoded pictures, of those that were decoded
    copies_within: int  # examples that are identical to another of their class
    copies_across: int  # … to one of another class
    identical: dict[str, Leaks]  # by class split: examples of later parts that are in an earlier one as well
    near: dict[str, Leaks]  # the same of examples that look or read the same and are not identical
    compared: float  # share of the examples that were compared for identity
    near_compared: int  # examples that were compared for likeness
    look_alikes: dict[str, list[NearDuplicate]]  # by class split: classes of different parts that look or read alike


def survey(
    folder: str | Location, manifest: shards.Manifest, *, progress: Callable[[int], None] = lambda _: None
) -> Survey:
    """Look at every example of a data set. progress: told how many classes are done. Raises DataError."""
    digests = Digests(manifest.num_examples, texts=manifest.modality == "text")
    likeness = Likeness(manifest.modality, manifest.columns)
    # two examples of a class are the least that is worth comparing: of more classes than that allows, some are left out
    every = max(1, -(-LEAST_OF_A_CLASS * len(manifest.classes) // likeness.most)) if likeness.most else 1
    per_class = max(LEAST_OF_A_CLASS, likeness.most // len(manifest.classes)) if likeness.most else 0
    classes: list[ClassStatistics] = []
    whole = Moments()
    originals: Counter[Original] = Counter()
    prototypes = Prototypes()
    with shards.ShardReader(folder, manifest) as reader:
        for class_id, entry in enumerate(manifest.classes):
            moments = Moments()
            seen = 0
            for part in reader.parts(class_id):
                hashes = digests.add(class_id, seen, part)
                compared, which = part, np.arange(len(part))
                if manifest.modality in ("image", "encoded_image"):
                    compared, which = _pictures(manifest, part, max(0, DECODED - seen), originals)
                    moments.add(compared)
                else:
                    moments.add(_values(part))
                prototypes.add(compared)
                wanted = which[: max(0, per_class - seen) if class_id % every == 0 else 0]
                if len(wanted):
                    likeness.add(class_id, seen + wanted, compared[: len(wanted)], hashes[wanted])
                seen += len(part)
            classes.append(ClassStatistics(entry.name, entry.group, entry.count, moments.means(), moments.stds()))
            whole.join(moments)
            prototypes.end(entry.name)
            progress(class_id + 1)
    names = [entry.name for entry in manifest.classes]
    within, across = digests.copies()
    pairs, rows = likeness.pairs() if likeness.compared else (None, None)
    identical: dict[str, Leaks] = {}
    near: dict[str, Leaks] = {}
    for split in manifest.splits:
        parts = np.array([SPLITS.index(entry.splits[split]) for entry in manifest.classes])
        close = likeness.across(parts, pairs, rows) if pairs is not None and rows is not None else None
        identical[split], texts = digests.leaks(names, parts, also=close)
        if texts is not None:
            near[split] = texts
        elif close is not None:
            near[split] = listed(names, close)
    return Survey(
        classes=classes,
        mean=whole.means(),
        std=whole.stds(),
        missing=whole.missing() if manifest.modality == "vector" else [],
        originals=originals,
        copies_within=within,
        copies_across=across,
        identical=identical,
        near=near,
        compared=digests.share,
        near_compared=likeness.compared,
        look_alikes=prototypes.alike(
            {split: {entry.name: entry.splits[split] for entry in manifest.classes} for split in manifest.splits}
        ),
    )


class Moments:
    """Mean and variance by the last axis of what is added, part by part (Chan, Golub, LeVeque 1983); NaN is left out.

    Pictures (uint8) count in [0, 1].
    """

    def __init__(self) -> None:
        self._rows = 0
        self._count: np.ndarray | float = 0.0
        self._mean: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0  # summed squares of what differs from the mean

    def add(self, values: np.ndarray) -> None:
        """[…, D], float or uint8."""
        flat = values.reshape(-1, values.shape[-1])
        if not len(flat):
            return
        part = Moments()
        part._rows = len(flat)
        if flat.dtype == np.uint8:  # by how often each of the 256 values is there: exact, and without copies
            levels = np.arange(256) / 255
            times = np.stack([np.bincount(channel, minlength=256) for channel in flat.T]).astype(np.float64)
            part._count = times.sum(axis=1)
            part._mean = times @ levels / part._count
            part._squares = (times * np.square(levels - part._mean[:, None])).sum(axis=1)
        else:
            there = ~np.isnan(flat)
            part._count = there.sum(axis=0).astype(np.float64)
            wide = np.where(there, flat, 0).astype(np.float64)
            part._mean = wide.sum(axis=0) / np.maximum(part._count, 1)
            part._squares = np.square(np.where(there, wide - part._mean, 0)).sum(axis=0)
        self.join(part)

    def join(self, other: Moments) -> None:
        """As if what was added to `other` had been added here."""
        count = self._count + other._count
        apart = other._mean - self._mean
        weight = other._count / np.maximum(count, 1)
        self._squares = self._squares + other._squares + np.square(apart) * self._count * weight
        self._mean = self._mean + apart * weight
        self._count, self._rows = count, self._rows + other._rows

    def means(self) -> list[float]:
        return _rounded(self._mean)

    def stds(self) -> list[float]:
        return _rounded(np.sqrt(self._squares / np.maximum(self._count, 1)))

    def missing(self) -> list[float]:
        """Share of the rows without a value, by column."""
        return _rounded(1 - self._count / max(self._rows, 1))


def _rounded(values: np.ndarray | float) -> list[float]:
    return [float(f"{value:.6g}") for value in np.atleast_1d(values).tolist()]


def _pictures(
    manifest: shards.Manifest, part: Examples, left: int, originals: Counter[Original]
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, H, W, C] and their numbers [n] in the part: all images, or the first `left` encoded ones.

    Of these, those that can be decoded; they are counted.
    """
    if isinstance(part, np.ndarray):
        return part, np.arange(len(part))
    preprocessing = Preprocessing.model_validate(manifest.preprocessing)
    images, which = [], []
    for number, content in enumerate(part[:left]):
        try:
            picture = decode_picture(io.BytesIO(content), name="an encoded picture")  # type: ignore[arg-type]
            images.append(preprocessing(picture))
        except DataError:
            continue  # what it is counted as stands in the manifest, or its reader will say so
        originals[Original(*picture.size, picture.mode, "")] += 1
        which.append(number)
    return np.stack(images) if images else np.empty((0, *manifest.shape), np.uint8), np.array(which, np.int64)


def _values(part: Examples) -> np.ndarray:
    """Of examples that are no pictures: [n, D], a text's length for it."""
    if isinstance(part, np.ndarray):
        return part
    return np.array([[len(text)] for text in part], dtype=np.float64).reshape(-1, 1)
