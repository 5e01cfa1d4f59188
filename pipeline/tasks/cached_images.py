"""Images of data sets that are larger than memory: whole classes, read ahead into a bounded cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.class_cache import ClassCache
from pipeline.tasks.class_images import ClassImages


class CachedImages:
    """Rows gathered from classes in a cache, then sent to the device. Every class is checked when it is read."""

    def __init__(self, images: ClassImages, device: torch.device, *, capacity: int) -> None:
        self._shape = images.manifest.shape
        self._device = device
        self.cache = ClassCache(images.read, images.nbytes, capacity=capacity)

    def expect(self, classes: Iterable[int]) -> None:
        """Read these classes in the background, in this order, and keep them."""
        self.cache.expect(classes)

    def close(self) -> None:
        """Read no more in the background."""
        self.cache.close()

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        """As `ImageStore.gather`. Raises DataError: a class that cannot be read, or is not the manifest's."""
        numbers, rows = classes.cpu().numpy(), examples.cpu().numpy()
        # a copy to a GPU from any other memory would wait for all that is queued there
        pinned = self._device.type == "cuda"
        images = torch.empty((*rows.shape, *self._shape), dtype=torch.uint8, pin_memory=pinned)
        out = images.numpy()
        each = [int(number) for number in np.unique(numbers)]
        self.cache.need(each)
        for number in each:
            stored = self.cache.get(number)
            places = np.nonzero(numbers == number)
            out[places] = stored[rows[places]]
        return images.to(self._device, non_blocking=True).movedim(-1, 3).contiguous()
