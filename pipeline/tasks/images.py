"""Image classification episodes from Parquet shards.

Small data sets live on the device as one uint8 tensor. Larger ones are gathered on the CPU and sampled one step ahead
by the training loop: from memory-mapped shards; or, with `window` and from an object store or a web server, from whole
classes that are read into a bounded cache, those of the next window while the current one is used. Picture files
(modality encoded_image) are decoded when they are read, and kept decoded on this machine's disk.

Shapes: T tasks · W n_way · S support · Q query examples · C H W of one image.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.errors import DataError
from pipeline.storage import absolute
from pipeline.tasks import shards
from pipeline.tasks.augmentation import AugmentationConfig
from pipeline.tasks.cached_rows import CachedRows
from pipeline.tasks.class_cache import READERS
from pipeline.tasks.class_images import ClassImages
from pipeline.tasks.classes import ClassTasks, ClassTasksConfig
from pipeline.tasks.decoded_cache import DecodedCache, default_folder
from pipeline.tasks.sampler import EpisodeIndices
from pipeline.tasks.shapes import UnequalEpisodes
from pipeline.types import Inputs, Split


class ImagesConfig(ClassTasksConfig):
    """N-way K-shot classification of images."""

    family: Literal["images"]
    rotations: Literal["none", "new_classes", "per_class"] = "none"
    # new_classes: each quarter turn of a meta-training class is a class of its own (ProtoNet, MANN);
    # per_class: the turn is drawn per class and task, so one episode never holds two turns of a class (MAML)
    decoded_cache: str | None = None
    # folder on each machine for decoded picture files; None: metapipe/decoded in the user's cache folder
    decoded_cache_mb: int = Field(default=20_000, ge=0)  # of files in it, oldest first out; 0: none are kept
    augmentation: AugmentationConfig | None = None  # random changes of meta-training's images; None: none

    @field_validator("decoded_cache")
    @classmethod
    def _is_on_this_machine(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("should be a folder on each machine's own disk")
        return value

    def build(self, *, device: torch.device, dtype: torch.dtype) -> ImageTasks:
        return ImageTasks(self, device=device, dtype=dtype)

    def absolute(self) -> ImagesConfig:
        """With absolute paths: workers run in another folder."""
        kept = self.decoded_cache and absolute(self.decoded_cache)
        return super().absolute().model_copy(update={"decoded_cache": kept})


class ImageTasks(ClassTasks):
    """Task family: x are images [C, H, W] in 0…1."""

    modalities = ("image", "encoded_image")
    inputs: Inputs = "images"
    config: ImagesConfig

    def __init__(self, config: ImagesConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DataError: no data set there, a damaged one, or one that does not fit."""
        super().__init__(config, device=device, dtype=dtype)
        height, width, channels = self.manifest.shape
        if config.rotations != "none" and height != width:
            raise DataError(f"{config.data}: task.rotations needs square images, these are {height}×{width}.")
        if channels == 1 and config.augmentation and (config.augmentation.hue or config.augmentation.saturation):
            raise DataError(f"{config.data}: task.augmentation.hue and saturation are of RGB images, these are grey.")
        self.input_shape = (channels, height, width)
        self._images = self._store()

    def _example_bytes(self) -> int:
        return self.manifest.image_bytes

    def _store(self) -> ImageStore:
        config, encoded = self.config, self.manifest.modality == "encoded_image"
        if not self.prefetch and not encoded:
            return DeviceImages.of_shards(config.data, self.manifest, self.device)
        if self._mapped and not encoded:
            return MappedImages(config.data, self.manifest, self.device)
        decoded = None
        if encoded and config.decoded_cache_mb:
            folder = Path(config.decoded_cache) if config.decoded_cache else default_folder()
            decoded = DecodedCache(folder, limit=config.decoded_cache_mb << 20)
        images = ClassImages(config.data, self.manifest, decoded)
        if not self.prefetch:
            return DeviceImages.of_classes(images, self.device)
        return self._cached(CachedImages(images, self.device, capacity=config.cache_mb << 20))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What made a picture one of these images (see datasets/preprocessing.py)."""
        return self.manifest.preprocessing

    def examples(self, split: Split, classes: list[int], count: int) -> Tensor:
        """The first images of classes of one part, uint8 [classes, count or the fewest that one has, C, H, W]."""
        numbers = torch.tensor(classes, dtype=torch.int64, device=self._drawn_on)
        fewest = min((self.entries(split)[c].count for c in classes), default=0)
        rows = torch.arange(min(count, fewest), device=self._drawn_on).expand(1, len(classes), -1)
        return self._images.gather(self._members[split][numbers].unsqueeze(0), rows)[0]

    def pixels(self, split: Split, step: int, slots: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """The episodes' images as they are stored: uint8 [T, S, C, H, W] and [T, Q, C, H, W], of fixed shapes."""
        return self._pixels(split, self._indices(split, step, slots, seed=seed))

    def _inputs(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        support, query = (self._scaled(images) for images in self._pixels(split, indices))
        if split != "meta_train" or self.config.augmentation is None:
            return support, query
        return self.config.augmentation(support, query, self._on_device(indices.keys))

    def _pixels(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        images = self._gathered(self._images, split, indices)
        rotations = self._rotations(split)
        if rotations == "none":
            return images
        turns = indices.turns if rotations == "per_class" else indices.classes // len(self._members[split])
        of_support, of_query = map(self._on_device, self._of_examples(turns, indices))
        return (
            rotate(images[0], of_support[:, :, None, None, None]),
            rotate(images[1], of_query[:, :, None, None, None]),
        )

    def _rotations(self, split: Split) -> str:
        return self.config.rotations if split == "meta_train" else "none"  # test tasks are the data set's own

    def _copies(self, split: Split) -> int:
        return 4 if self._rotations(split) == "new_classes" else 1

    def _turns_classes(self, split: Split) -> bool:
        return self._rotations(split) == "per_class"

    def _scaled(self, images: Tensor) -> Tensor:
        """uint8 [T, N, C, H, W] -> 0…1, written once: the division is in place."""
        return images.to(self.dtype).div_(255)


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Square images [..., H, H] turned counter-clockwise by `turns` (broadcast) quarters, without a host sync."""
    rotated = images
    for quarter in (1, 2, 3):
        rotated = torch.where(turns == quarter, torch.rot90(images, quarter, dims=(-2, -1)), rotated)
    return rotated


class ImageStore(Protocol):
    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        """Class numbers [T, W] and example numbers [T, W, E] -> uint8 [T, W, E, C, H, W] on the device."""
        ...


class DeviceImages:
    """The whole data set as one uint8 tensor [examples, C, H, W] on the device."""

    def __init__(self, images: np.ndarray, manifest: shards.Manifest, device: torch.device) -> None:
        """images: uint8 [examples, H, W, C], class after class."""
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
        counts = torch.tensor([entry.count for entry in manifest.classes])
        self._starts = (counts.cumsum(0) - counts).to(device)

    @classmethod
    def of_shards(cls, folder: str, manifest: shards.Manifest, device: torch.device) -> DeviceImages:
        """Raises DataError: a shard that is damaged."""
        with shards.ShardReader(folder, manifest) as reader:
            return cls(np.concatenate(list(reader)), manifest, device)

    @classmethod
    def of_classes(cls, images: ClassImages, device: torch.device) -> DeviceImages:
        """Of picture files. Raises DataError: one that is none, or a shard that is damaged."""
        with ThreadPoolExecutor(READERS) as pool:
            each = list(pool.map(images.read, range(len(images.manifest.classes))))
        return cls(np.concatenate(each), images.manifest, device)

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        rows = self._starts[classes].unsqueeze(-1) + examples
        return self._images.index_select(0, rows.flatten()).view(*rows.shape, *self._images.shape[1:])


class MappedImages:
    """Rows gathered from memory-mapped shards, then sent to the device."""

    def __init__(self, folder: str, manifest: shards.Manifest, device: torch.device) -> None:
        self._reader = shards.ShardReader(folder, manifest)
        self._device = device

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        images = np.empty((*examples.shape, *self._reader.manifest.shape), dtype=np.uint8)
        rows = examples.cpu().numpy()
        for position, class_id in np.ndenumerate(classes.cpu().numpy()):
            self._reader.read_class(int(class_id), rows[position], out=images[position])
        tensor = torch.from_numpy(images).to(self._device, non_blocking=True)
        return tensor.movedim(-1, 3).contiguous()


class CachedImages(CachedRows):
    """Images gathered from whole classes that are read ahead."""

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        return super().gather(classes, examples).movedim(-1, 3).contiguous()
