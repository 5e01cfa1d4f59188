"""Examples of data sets that are larger than memory: whole classes, read ahead into a bounded cache.

Shapes: T tasks · W n_way · E examples of a class.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.class_arrays import ClassArrays
from pipeline.tasks.class_cache import ClassCache


class CachedRows:
    """Rows gathered from classes in a cache, then sent to the device. Every class is checked when it is read."""

    def __init__(self, classes: ClassArrays, device: torch.device, *, capacity: int) -> None:
        """capacity: bytes of classes that are held."""
        self._shape = classes.shape
        self._dtype = torch.from_numpy(np.empty(0, classes.dtype)).dtype
        self._device = device
        self.cache = ClassCache(classes.read, classes.nbytes, capacity=capacity)

    def expect(self, classes: Iterable[int], spare: Iterable[int] = ()) -> None:
        """Read these classes in the background, in this order, and keep them; of `spare` what there is room for."""
        self.cache.expect(classes, spare)

    def close(self) -> None:
        """Read no more in the background."""
        self.cache.close()

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        """Class numbers [T, W] and example numbers [T, W, E] -> [T, W, E, ...] on the device, as they are stored.

        Raises DataError: a class that cannot be read, or is not the manifest's.
        """
        numbers, rows = classes.cpu().numpy(), examples.cpu().numpy()
        # a copy to a GPU from any other memory would wait for all that is queued there
        pinned = self._device.type == "cuda"
        gathered = torch.empty((*rows.shape, *self._shape), dtype=self._dtype, pin_memory=pinned)
        out = gathered.numpy()
        each = [int(number) for number in np.unique(numbers)]
        self.cache.need(each)
        for number in each:
            stored = self.cache.get(number)
            places = np.nonzero(numbers == number)
            out[places] = stored[rows[places]]
        return gathered.to(self._device, non_blocking=True)
