"""Which classes meta-training is going to need, and in which order: for whoever reads them before they are asked for.

Episodes are a function of (seed, split, step, slot), so what a worker's slots are going to draw is known. A window's
classes are read in the order in which they are needed first, and no longer kept than until they are needed last; those
that none of its slots ever draws are not read.

Shapes: B steps · T slots · W n_way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.windows import Windows

EPISODES_KNOWN = 4096  # of a window: what is drawn after so many is not looked at
WINDOWS_AHEAD = 8  # after the next one
_KEPT_WINDOWS = WINDOWS_AHEAD + 4

_LAST = np.iinfo(np.int64).max


class Upcoming:
    """Classes of meta-training by window, as numbers within the part."""

    def __init__(self, windows: Windows, drawn: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """drawn: seed, steps [B, 1] and slots [T] -> the classes of these episodes, int64 [B, T, W] or fewer axes."""
        self._windows = windows
        self._drawn = drawn
        self._for: tuple[int, tuple[int, ...]] | None = None
        self._known: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()

    def near(self, step: int, slots: Tensor, *, seed: int, known: bool = True) -> list[int]:
        """What is still needed of a step's window, then what is of the next one: these have to be there in time.

        known: whether classes are drawn without weights, which depend on how training goes; else it is all of them.
        """
        if not self._windows.applies("meta_train"):
            return list(range(self._windows.num_classes["meta_train"]))
        number = step // self._windows.config.steps
        classes = self._of_window(number, slots, seed, known)
        left = [each for each, last in classes if last >= step]
        return left + [each for each, _ in self._of_window(number + 1, slots, seed, known)]

    def spare(self, step: int, slots: Tensor, *, seed: int, known: bool = True) -> Iterator[int]:
        """The classes of the windows after those, one window after the other."""
        after = step // self._windows.config.steps + 2
        if not self._windows.applies("meta_train"):
            return
        for number in range(after, after + WINDOWS_AHEAD):
            yield from (each for each, _ in self._of_window(number, slots, seed, known))

    def _of_window(self, number: int, slots: Tensor, seed: int, known: bool) -> list[tuple[int, int]]:
        """Its classes and the last steps that need them, in the order of the first ones."""
        if not known:
            return [(each, _LAST) for each in self._windows.classes(seed, "meta_train", number).tolist()]
        whose = (seed, tuple(slots.tolist()))
        if self._for != whose:
            self._known.clear()
            self._for = whose
        if number not in self._known:
            self._known[number] = self._uses(number, slots, seed)
            while len(self._known) > _KEPT_WINDOWS:
                self._known.popitem(last=False)
        return self._known[number]

    def _uses(self, number: int, slots: Tensor, seed: int) -> list[tuple[int, int]]:
        length = self._windows.config.steps
        start, looked_at = number * length, min(length, max(EPISODES_KNOWN // len(slots), 1))
        steps = torch.arange(start, start + looked_at).unsqueeze(-1)
        drawn = self._drawn(seed, steps, slots).cpu().numpy().reshape(looked_at, -1)
        flat, width = drawn.ravel(), drawn.shape[1]
        classes, first = np.unique(flat, return_index=True)
        last = start + (flat.size - 1 - np.unique(flat[::-1], return_index=True)[1]) // width
        if looked_at < length:
            every = self._windows.classes(seed, "meta_train", number).tolist()
            met = set(classes.tolist())
            return [(int(classes[i]), _LAST) for i in np.argsort(first)] + [(c, _LAST) for c in every if c not in met]
        return [(int(classes[i]), int(last[i])) for i in np.argsort(first)]
