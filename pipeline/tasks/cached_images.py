"""Images of data sets that are larger than memory: whole classes, read ahead into a bounded cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.class_cache import ClassCache, private_array
from pipeline.tasks.shards.examples import examples_sha256


class CachedImages:
    """Rows gathered from classes in a cache, then sent to the device.

    Every class is checked against its sha256 in the manifest when it is read.
    """

    def __init__(self, folder: str, manifest: shards.Manifest, device: torch.device, *, capacity: int) -> None:
        self._reader = shards.ShardReader(folder, manifest)
        self._manifest = manifest
        self._device = device
        self.cache = ClassCache(self._read, self._nbytes, capacity=capacity)

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
        images = torch.empty((*rows.shape, *self._manifest.shape), dtype=torch.uint8, pin_memory=pinned)
        out = images.numpy()
        each = [int(number) for number in np.unique(numbers)]
        self.cache.need(each)
        for number in each:
            stored = self.cache.get(number)
            places = np.nonzero(numbers == number)
            out[places] = stored[rows[places]]
        return images.to(self._device, non_blocking=True).movedim(-1, 3).contiguous()

    def _nbytes(self, number: int) -> int:
        return self._manifest.classes[number].count * self._manifest.image_bytes

    def _read(self, number: int) -> np.ndarray:
        entry = self._manifest.classes[number]
        images = private_array((entry.count, *self._manifest.shape))
        self._reader.read_class(number, np.arange(entry.count), out=images)
        if examples_sha256(images) != entry.sha256:
            files = dict.fromkeys(self._manifest.shards[group.shard].file for group in entry.row_groups)
            raise DataError(
                f"{self._reader.folder}: class {entry.name} in {', '.join(files)} differs from the manifest's sha256. "
                "Restore these files, or prepare the data set again."
            )
        return images
