"""A source of made-up examples; importing it does not import torch, which processes that read would wait for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.datasets.source import Examples, Modality, Problem, RawClass, Source

if TYPE_CHECKING:
    from pipeline.types import Split

PARTS: tuple[Split, ...] = ("meta_train", "meta_val", "meta_test")


class Made(Source):
    """Examples that follow from their numbers; every `bad`-th cannot be read."""

    def __init__(self, sizes: Sequence[int], *, modality: Modality = "image", bad: int = 0, trace: str = "") -> None:
        self.modality = modality
        self.shape = (8, 8, 3) if modality == "encoded_image" else None
        self.sizes = sizes
        self.bad = bad
        self.trace = trace  # a file that tells what was read

    def classes(self) -> Iterator[RawClass]:
        for number, size in enumerate(self.sizes):
            yield RawClass(f"class{number:02d}", "all", ((number, i) for i in range(size)))

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        if self.trace:
            with open(self.trace, "a") as trace:
                trace.writelines(f"{item}\n" for item in items)
        good = [item for item in items if not self.bad or (item[0] + item[1]) % self.bad]
        problems = [Problem(f"item {item}", "is bad") for item in items if item not in good]
        return self.made(good), problems

    def made(self, items: Sequence[tuple[int, int]]) -> Examples:
        texts = [f"{number}/{i}" * (i % 7) for number, i in items]
        if self.modality == "text":
            return texts
        if self.modality == "encoded_image":
            return [text.encode() for text in texts]
        if self.modality == "vector":
            return np.array([[number, i] for number, i in items], np.float32).reshape(-1, 2)
        return np.array([[number, i % 256, i // 256] for number, i in items], np.uint8).reshape(-1, 1, 3, 1)

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {"random": {f"class{i:02d}": PARTS[(i + seed) % 3] for i in range(len(self.sizes))}}


class Fatal(Made):
    """Kills the process that reads class 1, unless its number is in `trace`."""

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        if (1, 0) in items and os.getpid() != int(self.trace):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.made(items), []
