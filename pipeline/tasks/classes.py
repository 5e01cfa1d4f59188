"""What the task families share whose tasks are classes of a prepared data set: sizes, class splits and draws.

A subclass is one modality: it says how the drawn examples become inputs (`_inputs`).

Shapes: T tasks · W n_way · K k_shot · S n_way·k_shot · Q n_way·n_query.
"""

from __future__ import annotations

from typing import Any, Self

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


class ClassTasksConfig(Section):
    """Keys of every family of N-way K-shot classification."""

    data: Address  # folder of a prepared data set, relative to where the command is run, or s3://…, gs://…
    split: str = "alphabet"  # which of the data set's class splits
    n_way: int = Field(default=5, ge=2)  # classes of an episode
    eval_n_way: int | None = Field(default=None, ge=2)  # in validation and test; None: as in meta-training
    k_shot: int = Field(default=1, ge=1)  # support examples per class
    eval_k_shot: int | None = Field(default=None, ge=1)  # in validation and test; None: as in meta-training
    n_query: int = Field(default=5, ge=1)  # query examples per class in meta-training
    eval_n_query: int = Field(default=15, ge=1)  # query examples per class in validation and test
    memory_limit_mb: int = Field(default=2048, ge=0)  # larger data sets stay memory-mapped
    difficulty: DifficultyConfig | None = None  # draws hard classes of meta-training more often; None: all equally

    def absolute(self) -> Self:
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


class ClassTasks:
    """Task family: the label of an example is its class's position in the episode.

    A subclass sets `input_shape`, and `prefetch` where its examples do not lie in memory.
    """

    objective = Classification()
    input_shape: tuple[int, ...]
    prefetch = False

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DataError: no data set there, a damaged one, or one that is too small for the episodes."""
        self.config = config
        self.device = device
        self.dtype = dtype
        self.manifest = shards.read_manifest(config.data)
        self.num_outputs: int = config.n_way
        self.description: dict[str, Any] = {
            "family": config.family,
            "class_split": config.split,
            **dict(zip(("n_way", "k_shot", "n_query"), config.episode("meta_test"), strict=True)),
        }
        self._members: dict[Split, Tensor] = {}
        self._counts: dict[Split, Tensor] = {}
        counts = torch.tensor([entry.count for entry in self.manifest.classes], device=device)
        for split in SPLITS:
            config.check_size(self.manifest, split)
            members = torch.tensor(self.manifest.members(config.split, split), device=device)
            self._members[split] = members
            self._counts[split] = counts[members]
        self.train_classes = len(self._members["meta_train"]) * self._copies("meta_train")
        self.weighting = (
            ClassDifficulty(config.difficulty, classes=self.train_classes, device=device) if config.difficulty else None
        )
        self._indices = StepsAhead(self._draw, device)

    def class_digests(self, split: Split) -> dict[str, str]:
        """sha256 of a class's examples -> its name, for the classes of one part."""
        return {entry.sha256: entry.name for entry in self.entries(split)}

    def entries(self, split: Split) -> list[shards.ClassEntry]:
        """The classes of one part, in the order of `TaskBatch.classes` (of meta-training: without quarter turns)."""
        return [self.manifest.classes[i] for i in self._members[split].tolist()]

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        """Episodes with x [T, S|Q, *input_shape] and y int64 [T, S|Q], on the family's device.

        Raises DataError: a shard that is damaged when it is read (memory-mapped sets).
        """
        if weights is None:
            indices = self._indices(split, step, slots, seed=seed)
        else:  # those of later steps are not known yet
            indices = self._draw(split, seed, step, slots.to(self.device), weights)
        support_x, query_x = self._inputs(split, indices)
        return TaskBatch(
            support_x=support_x,
            support_y=self._labels(indices.support),
            query_x=query_x,
            query_y=self._labels(indices.query),
            keys=indices.keys,
            classes=indices.classes,
        )

    def _inputs(self, split: Split, indices: EpisodeIndices) -> tuple[Tensor, Tensor]:
        """The network's inputs [T, S, *input_shape] and [T, Q, *input_shape], each class's examples in a row."""
        raise NotImplementedError

    def _copies(self, split: Split) -> int:
        """How many classes to draw from each class of the data set makes."""
        return 1

    def _turns_classes(self, split: Split) -> bool:
        """Whether a number of quarter turns is drawn per class and task."""
        return False

    def _draw(
        self, split: Split, seed: int, steps: int | Tensor, slots: Tensor, weights: Tensor | None = None
    ) -> EpisodeIndices:
        n_way, k_shot, n_query = self.config.episode(split)
        return sample_indices(
            seed=seed,
            split=split,
            step=steps,
            slots=slots,
            class_counts=self._counts[split].repeat(self._copies(split)),
            n_way=n_way,
            k_shot=k_shot,
            n_query=n_query,
            turn_classes=self._turns_classes(split),
            class_weights=weights,
        )

    def _labels(self, examples: Tensor) -> Tensor:
        """Example numbers [T, W, E] -> int64 [T, W·E]."""
        tasks, n_way, count = examples.shape
        labels = torch.arange(n_way, device=self.device).view(1, n_way, 1)
        return labels.expand(tasks, n_way, count).flatten(1)
