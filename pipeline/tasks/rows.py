"""Examples by class and number: all of them on the device, or read where they are asked for.

Shapes: T tasks · W n_way · E examples of a class.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks import shards
from pipeline.tasks.class_arrays import Convert


class DeviceRows:
    """The whole data set as one tensor [examples, ...] on the device."""

    def __init__(self, folder: str, manifest: shards.Manifest, convert: Convert, device: torch.device) -> None:
        with shards.ShardReader(folder, manifest) as reader:
            rows = np.concatenate([convert(examples) for examples in reader])
        self._rows = torch.from_numpy(rows).to(device)
        counts = torch.tensor([entry.count for entry in manifest.classes])
        self._starts = (counts.cumsum(0) - counts).to(device)

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        rows = self._starts[classes].unsqueeze(-1) + examples
        return self._rows.index_select(0, rows.flatten()).view(*rows.shape, *self._rows.shape[1:])


class MappedRows:
    """Rows read from memory-mapped shards, then sent to the device."""

    def __init__(self, folder: str, manifest: shards.Manifest, convert: Convert, device: torch.device) -> None:
        self._reader = shards.ShardReader(folder, manifest)
        self._convert = convert
        self._device = device

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        rows = examples.cpu().numpy()
        arrays = [
            self._convert(self._reader.read_class(int(class_id), rows[position]))
            for position, class_id in np.ndenumerate(classes.cpu().numpy())
        ]
        gathered = torch.from_numpy(np.stack(arrays)).to(self._device, non_blocking=True)
        return gathered.view(*examples.shape, *gathered.shape[2:])
