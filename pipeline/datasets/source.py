"""What every source of raw data yields: one class at a time, as uint8 images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RawClass(NamedTuple):
    """All examples of one class."""

    name: str  # unique in the data set, e.g. "Greek/character01"
    group: str  # alphabet, script, domain, clinic
    images: np.ndarray  # uint8 [count, H, W, C]; for drawings ink is high (255), paper 0
