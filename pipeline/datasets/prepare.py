"""A source of raw classes -> a data set on disk, with look-alikes across its splits counted and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from pipeline.datasets.near_duplicates import NearDuplicate, near_duplicates
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import RawClass
from pipeline.storage import Location
from pipeline.tasks import shards
from pipeline.types import Split

REPORTED_PAIRS = 50  # near-duplicate pairs listed in the manifest; their number is recorded whole
PROTOTYPE_IMAGES = 20  # of each class, kept in memory for the comparison


class Source(Protocol):
    """Where raw classes come from."""

    preprocessing: Preprocessing

    def classes(self) -> Iterator[RawClass]: ...

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        """Name of a class split -> class name -> part; known before the pictures are read."""
        ...


def prepare(
    source: Source,
    out: str | Location,
    *,
    record: Mapping[str, Any],
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[RawClass], None] = lambda _: None,
) -> tuple[shards.Manifest, dict[str, list[NearDuplicate]]]:
    """Write `source` to the folder `out`; returns the manifest and, per class split, look-alikes across its parts.

    record: how the data was made, for the manifest. seed: of the class splits. Raises DataError (see shards.write).
    """
    shards.check_free(out, overwrite=overwrite)  # before minutes of reading
    splits = source.splits(seed=seed)
    prototypes: dict[str, np.ndarray] = {}
    found: dict[str, list[NearDuplicate]] = {}

    def classes() -> Iterator[RawClass]:
        for raw in source.classes():
            progress(raw)
            prototypes[raw.name] = raw.images[:PROTOTYPE_IMAGES]
            yield raw

    def look_alikes() -> dict[str, Any]:
        for split_name, members in splits.items():
            found[split_name] = near_duplicates({k: (members[k], images) for k, images in prototypes.items()})
        return {
            "near_duplicates": {
                split_name: {"pairs": len(pairs), "closest": [list(pair) for pair in pairs[:REPORTED_PAIRS]]}
                for split_name, pairs in found.items()
            }
        }

    manifest = shards.write(
        out,
        classes(),
        splits=splits,
        source={**record, "split_seed": seed},
        preprocessing=source.preprocessing.model_dump(mode="json"),
        findings=look_alikes,
        overwrite=overwrite,
    )
    return manifest, found
