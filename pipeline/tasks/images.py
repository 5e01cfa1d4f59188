"""Image classification episodes from Parquet shards.

Small data sets live on the device as one uint8 tensor; larger ones stay in memory-mapped shards, are gathered on
the CPU and sampled one step ahead by the training loop.

Shapes: T tasks · W n_way · S n_way·k_shot · Q n_way·n_query · C H W of one image.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Section
from pipeline.errors import DataError
from pipeline.storage import Address, absolute
from pipeline.tasks import shards
from pipeline.tasks.ahead import StepsAhead
from pipeline.tasks.difficulty import ClassDifficulty, DifficultyConfig
from pipeline.tasks.objectives import Classification
from pipeline.tasks.sampler import EpisodeIndices, sample_indices
from pipeline.types import SPLITS, Split, TaskBatch


class ImagesConfig(Section):
    """N-way K-shot classification of images."""

    family: Literal["images"]
    data: Address  # folder of a prepared data set, relative to where the command is run, or s3://…, gs://…
    split: str = "alphabet"  # which of the data set's class splits
    n_way: int = Field(default=5, ge=2)  # classes of an episode
    eval_n_way: int | None = Field(default=None, ge=2)  # in validation and test; None: as in meta-training
    k_shot: int = Field(default=1, ge=1)  # support examples per class
    eval_k_shot: int | None = Field(default=None, ge=1)  # in validation and test; None: as in meta-training
    n_query: int = Field(default=5, ge=1)  # query examples per class in meta-training
    eval_n_query: int = Field(default=15, ge=1)  # query examples per class in validation and test
    rotations: Literal["none", "new_classes", "per_class"] = "none"
    # new_classes: each quarter turn of a meta-training class is a class of its own (ProtoNet, MANN);
    # per_class: the turn is drawn per class and task, so one episode never holds two turns of a class (MAML)
    memory_limit_mb: int = Field(default=2048, ge=0)  # larger data sets stay memory-mapped
    difficulty: DifficultyConfig | None = None  # draws hard classes of meta-training more often; None: all equally

    def build(self, *, device: torch.device, dtype: torch.dtype) -> ImageTasks:
        return ImageTasks(self, device=device, dtype=dtype)

    def absolute(self) -> ImagesConfig:
        """With an absolute data path: workers run in another folder."""
        return self.model_copy(update={"data": absolute(self.data)})

    def verify(self) -> str:
        """Check the data set's bytes and that it is large enough; returns its digest. Raises DataError."""
        manifest = shards.verify(self.data)
        for split in SPLITS:
            self.check_size(manifest, split)
        return manifest.digest

    def check_size(self, manifest: shards.Manifest, split: Split) -> None:
        """Raises DataError where a part has too few classes for `n_way` or a class too few examples."""
        if self.split not in manifest.splits:
            raise DataError(
                f"{self.data}: has no class split {self.split!r} (task.split); it has: {', '.join(manifest.splits)}."
            )
        members = [manifest.classes[i] for i in manifest.members(self.split, split)]
        n_way, k_shot, n_query = self.episode(split)
        in_training = split == "meta_train"
        if len(members) < n_way:
            key = "n_way" if in_training or self.eval_n_way is None else "eval_n_way"
            raise DataError(
                f"{self.data}: {split} of the split {self.split!r} has {len(members)} classes, too few for "
                f"task.{key}={n_way}. Lower {key}, or prepare more classes."
            )
        smallest = min(members, key=lambda entry: entry.count)
        if smallest.count < k_shot + n_query:
            shots = "k_shot" if in_training or self.eval_k_shot is None else "eval_k_shot"
            queries = "n_query" if in_training else "eval_n_query"
            raise DataError(
                f"{self.data}: class {smallest.name} ({split}) has {smallest.count} examples, too few for "
                f"task.{shots}={k_shot} plus task.{queries}={n_query}. Lower them, or leave the class out."
            )

    def episode(self, split: Split) -> tuple[int, int, int]:
        """n_way, and support and query examples per class."""
        if split == "meta_train":
            return self.n_way, self.k_shot, self.n_query
        return self.eval_n_way or self.n_way, self.eval_k_shot or self.k_shot, self.eval_n_query


class ImageTasks:
    """Task family: the label of an image is its class's position in the episode."""

    objective = Classification()

    def __init__(self, config: ImagesConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DataError: no data set there, a damaged one, or one that is too small for the episodes."""
        self.config = config
        self.device = device
        self.dtype = dtype
        self.manifest = shards.read_manifest(config.data)
        height, width, channels = self.manifest.shape
        if config.rotations != "none" and height != width:
            raise DataError(f"{config.data}: task.rotations needs square images, these are {height}×{width}.")
        self.input_shape = (channels, height, width)
        self.num_outputs = config.n_way
        self.description = {
            "family": config.family,
            "class_split": config.split,
            **dict(zip(("n_way", "k_shot", "n_query"), config.episode("meta_test"), strict=True)),
        }
        total = self.manifest.num_examples * self.manifest.image_bytes
        self.prefetch = total > config.memory_limit_mb << 20
        self._members: dict[Split, Tensor] = {}
        self._counts: dict[Split, Tensor] = {}
        counts = torch.tensor([entry.count for entry in self.manifest.classes], device=device)
        for split in SPLITS:
            config.check_size(self.manifest, split)
            members = torch.tensor(self.manifest.members(config.split, split), device=device)
            self._members[split] = members
            self._counts[split] = counts[members]
        self.train_classes = len(self._members["meta_train"]) * (4 if config.rotations == "new_classes" else 1)
        self.weighting = (
            ClassDifficulty(config.difficulty, classes=self.train_classes, device=device) if config.difficulty else None
        )
        self._indices = StepsAhead(self._draw, device)
        store = MappedImages if self.prefetch else DeviceImages
        self._images: ImageStore = store(config.data, self.manifest, device)

    def class_digests(self, split: Split) -> dict[str, str]:
        """sha256 of a class's images -> its name, for the classes of one part."""
        return {entry.sha256: entry.name for entry in self.entries(split)}

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        """Episodes with x [T, S|Q, C, H, W] in 0…1 and y int64 [T, S|Q], on the family's device.

        Raises DataError: a shard that is damaged when it is read (memory-mapped sets).
        """
        if weights is None:
            indices = self._indices(split, step, slots, seed=seed)
        else:  # those of later steps are not known yet
            indices = self._draw(split, seed, step, slots.to(self.device), weights)
        images = self._pixels(split, indices)
        shots = self.config.episode(split)[1]
        support, query = images[:, :, :shots], images[:, :, shots:]
        return TaskBatch(
            support_x=self._inputs(support),
            support_y=self._labels(support),
            query_x=self._inputs(query),
            query_y=self._labels(query),
            keys=indices.keys,
            classes=indices.classes,
        )

    def entries(self, split: Split) -> list[shards.ClassEntry]:
        """The classes of one part, in the order of `TaskBatch.classes` (of meta-training: without quarter turns)."""
        return [self.manifest.classes[i] for i in self._members[split].tolist()]

    def examples(self, split: Split, classes: list[int], count: int) -> Tensor:
        """The first images of classes of one part, uint8 [classes, count or the fewest that one has, C, H, W]."""
        numbers = torch.tensor(classes, dtype=torch.int64, device=self.device)
        fewest = min((self.entries(split)[c].count for c in classes), default=0)
        rows = torch.arange(min(count, fewest), device=self.device).expand(1, len(classes), -1)
        return self._images.gather(self._members[split][numbers].unsqueeze(0), rows)[0]

    def pixels(self, split: Split, step: int, slots: Tensor, *, seed: int) -> Tensor:
        """The episodes' images as they are stored: uint8 [T, W, K + Q, C, H, W], each class's support first."""
        return self._pixels(split, self._indices(split, step, slots, seed=seed))

    def _pixels(self, split: Split, indices: EpisodeIndices) -> Tensor:
        rotations = self._rotations(split)
        num_members = len(self._members[split])
        classes = self._members[split][indices.classes % num_members]
        images = self._images.gather(classes, torch.cat([indices.support, indices.query], dim=-1))
        if rotations == "none":
            return images
        turns = indices.turns if rotations == "per_class" else indices.classes // num_members
        return rotate(images, turns[:, :, None, None, None, None])

    def _rotations(self, split: Split) -> str:
        return self.config.rotations if split == "meta_train" else "none"  # test tasks are the data set's own

    def _draw(
        self, split: Split, seed: int, steps: int | Tensor, slots: Tensor, weights: Tensor | None = None
    ) -> EpisodeIndices:
        counts = self._counts[split]
        rotations = self._rotations(split)
        n_way, k_shot, n_query = self.config.episode(split)
        return sample_indices(
            seed=seed,
            split=split,
            step=steps,
            slots=slots,
            class_counts=counts.repeat(4) if rotations == "new_classes" else counts,
            n_way=n_way,
            k_shot=k_shot,
            n_query=n_query,
            turn_classes=rotations == "per_class",
            class_weights=weights,
        )

    def _inputs(self, images: Tensor) -> Tensor:
        """uint8 [T, W, E, C, H, W] -> 0…1 [T, W·E, C, H, W], written once: the division is in place."""
        return images.to(self.dtype).flatten(1, 2).div_(255)

    def _labels(self, images: Tensor) -> Tensor:
        """Images [T, W, E, …] -> int64 [T, W·E]."""
        tasks, n_way, examples = images.shape[:3]
        labels = torch.arange(n_way, device=self.device).view(1, n_way, 1)
        return labels.expand(tasks, n_way, examples).flatten(1)


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

    def __init__(self, folder: str, manifest: shards.Manifest, device: torch.device) -> None:
        with shards.ShardReader(folder, manifest) as reader:
            images = np.concatenate(list(reader))
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
        counts = torch.tensor([entry.count for entry in manifest.classes])
        self._starts = (counts.cumsum(0) - counts).to(device)

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
