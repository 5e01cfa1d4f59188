"""What the task families share whose tasks are classes of a prepared data set: sizes, class splits and draws.

A subclass is one modality: it says how the drawn examples become inputs (`_inputs`).

Shapes: T tasks · W n_way · S support · Q query examples.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from pipeline import keys
from pipeline.config import Section
from pipeline.errors import DataError
from pipeline.storage import ReadAddress, absolute, readable
from pipeline.tasks import shards
from pipeline.tasks.ahead import StepsAhead
from pipeline.tasks.cached_rows import CachedRows
from pipeline.tasks.class_arrays import ClassArrays, Convert
from pipeline.tasks.difficulty import ClassDifficulty, DifficultyConfig
from pipeline.tasks.objectives import Classification
from pipeline.tasks.rows import DeviceRows, MappedRows
from pipeline.tasks.sampler import EpisodeIndices, draw_classes, sample_indices
from pipeline.tasks.shapes import (
    OneShape,
    Shape,
    UnequalEpisodes,
    VariableConfig,
    key_of_episode,
    key_of_step,
    sample_unequal,
)
from pipeline.tasks.upcoming import Upcoming
from pipeline.tasks.windows import WindowConfig, Windows
from pipeline.types import SPLITS, ClassWeighting, Inputs, Objective, Split, TaskBatch

RowsT = TypeVar("RowsT", bound=CachedRows)

FAMILY_OF = {"image": "images", "encoded_image": "images", "vector": "tabular", "text": "text"}


class ClassTasksConfig(Section):
    """Keys of every family of N-way K-shot classification."""

    data: ReadAddress  # folder of a prepared data set, relative to where the command is run; or s3://, gs://, https://
    split: str = "alphabet"  # which of the data set's class splits
    n_way: int = Field(default=5, ge=2)  # classes of an episode
    eval_n_way: int | None = Field(default=None, ge=2)  # in validation and test; None: as in meta-training
    k_shot: int = Field(default=1, ge=1)  # support examples per class
    eval_k_shot: int | None = Field(default=None, ge=1)  # in validation and test; None: as in meta-training
    n_query: int = Field(default=5, ge=1)  # query examples per class in meta-training
    eval_n_query: int = Field(default=15, ge=1)  # query examples per class in validation and test
    memory_limit_mb: int = Field(default=2048, ge=0)  # larger data sets stay memory-mapped
    window: WindowConfig | None = None
    # {classes: N, steps: M}: M outer steps draw from N classes, the next M from others. For sets larger than memory
    cache_mb: int = Field(default=1024, ge=1)
    # of whole classes in memory, per worker: with `window`, or where a set larger than memory_limit_mb is not mapped
    difficulty: DifficultyConfig | None = None  # draws hard classes of meta-training more often; None: all equally
    variable: VariableConfig | None = None
    # classes and shots vary as in Meta-Dataset: n_way is the most classes, k_shot is evaluation's. None: they are fixed

    _parts: tuple[Split, ...] = PrivateAttr(default=SPLITS)

    @model_validator(mode="after")
    def _variable_shapes_fit(self) -> Self:
        if self.variable is not None:
            self.variable.check(self.n_way, self.eval_n_way or self.n_way)
        return self

    def absolute(self) -> Self:
        """With an absolute data path: workers run in another folder."""
        return self.model_copy(update={"data": absolute(self.data)})

    def verify(self) -> str:
        """Check the data set's bytes and that it is large enough; returns its digest. Raises DataError.

        Of a large set with a window a class is checked when it is read: here the sizes are.
        """
        manifest = shards.read_manifest(self.data)
        shards.verify(self.data, manifest, sizes_only=self.checked_when_read(manifest))
        for split in self.parts:
            self.check_size(manifest, split)
        return manifest.digest

    def checked_when_read(self, manifest: shards.Manifest) -> bool:
        """Whether `verify` looks at the sizes of the files alone."""
        return self.window is not None and sum(shard.bytes for shard in manifest.shards) > self.memory_limit_mb << 20

    def check_size(self, manifest: shards.Manifest, split: Split) -> None:
        """Raises DataError where a part has too few classes for `n_way` or a class too few examples."""
        of_evaluation = self.split == shards.EVERY_CLASS and len(self.parts) == 1
        if self.split not in manifest.splits and not of_evaluation:
            raise DataError(
                f"{self.data}: has no class split {self.split!r} (task.split); it has: {', '.join(manifest.splits)}."
            )
        members = [manifest.classes[i] for i in manifest.members(self.split, split)]
        n_way, k_shot, n_query = self.episode(split)
        k_shot = 1 if self.varies(split) else k_shot
        in_training = split == "meta_train"
        if len(members) < n_way:
            key = "n_way" if in_training or self.eval_n_way is None else "eval_n_way"
            raise DataError(
                f"{self.data}: {split} of the split {self.split!r} has {len(members)} classes, too few for "
                f"task.{key}={n_way}. Lower {key}, or prepare more classes."
            )
        smallest = min(members, key=lambda entry: entry.count)
        if smallest.count < k_shot + n_query:
            command = "prepare" if manifest.layout is None else "adopt"
            shots = "k_shot" if in_training or self.eval_k_shot is None else "eval_k_shot"
            queries = "n_query" if in_training else "eval_n_query"
            least = max((1 if self.varies(part) else k) + q for part in self.parts for _, k, q in [self.episode(part)])
            raise DataError(
                f"{self.data}: class {smallest.name} ({split}) has {smallest.count} examples, too few for "
                f"task.{shots}={k_shot} plus task.{queries}={n_query}. Lower them, or leave such classes out: "
                f"`metapipe data {command} … --min-examples {least} --overwrite`."
            )

    @property
    def parts(self) -> tuple[Split, ...]:
        """The parts of the class split that are asked for."""
        return self._parts

    def only(self, part: Split) -> Self:
        """For an evaluation of one part: the others may be too small, or hold no classes at all."""
        copy = self.model_copy()
        copy._parts = (part,)
        return copy

    def episode(self, split: Split) -> tuple[int, int, int]:
        """n_way, and support and query examples per class."""
        if split == "meta_train":
            return self.n_way, self.k_shot, self.n_query
        return self.eval_n_way or self.n_way, self.eval_k_shot or self.k_shot, self.eval_n_query

    def varies(self, split: Split) -> bool:
        """Whether the episodes of a part differ in shape."""
        return self.variable is not None and (split == "meta_train" or self.variable.evaluation)


class Store(Protocol):
    """Examples of a data set, by class and number."""

    def gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        """Class numbers [T, W] and example numbers [T, W, E] -> [T, W, E, ...] on the device."""
        ...


class ClassTasks(OneShape):
    """Task family: the label of an example is its class's position in the episode.

    A subclass sets `modalities`, `inputs` and `input_shape`, says how much memory an example takes, and has a store of
    them. Where they do not lie on the device (`prefetch`), episodes are drawn on the CPU, which reads them: from mapped
    shards (`_mapped`), or from whole classes in a bounded cache (`_cached`), those of the next window being read while
    the current one is used.
    """

    objective: Objective = Classification()
    modalities: tuple[str, ...]  # of its data sets
    inputs: Inputs
    input_shape: tuple[int, ...]

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DataError: no data set there, a damaged one, or one that is too small for the episodes."""
        self.config = config
        self.device = device
        self.dtype = dtype
        self.manifest = shards.read_manifest(config.data)
        if self.manifest.modality not in self.modalities:
            raise DataError(
                f"{config.data}: holds examples of modality {self.manifest.modality}; task.family: {config.family} is "
                f"of {' and '.join(self.modalities)}. Choose {FAMILY_OF[self.manifest.modality]}."
            )
        self.num_outputs: int = config.n_way
        self.description: dict[str, Any] = {
            "family": config.family,
            "class_split": config.split,
            **dict(zip(("n_way", "k_shot", "n_query"), config.episode("meta_test"), strict=True)),
        }
        if config.varies("meta_test"):
            self.description |= {"k_shot": "variable", "variable": config.variable.model_dump(mode="json")}
        self.variable_shapes = config.varies("meta_train")
        self._sizes: dict[Split, tuple[int, int]] = {}  # of the smallest and the largest class
        self._members: dict[Split, Tensor] = {}
        self._counts: dict[Split, Tensor] = {}
        self.prefetch = self.manifest.num_examples * self._example_bytes() > config.memory_limit_mb << 20
        if not self.prefetch and config.checked_when_read(self.manifest):
            # larger on the disk than in memory, where all of it is read at once and no class is checked
            shards.verify(config.data, self.manifest)
        self._drawn_on = torch.device("cpu") if self.prefetch else device
        counts = torch.tensor([entry.count for entry in self.manifest.classes], device=self._drawn_on)
        for split in SPLITS:
            if split in config.parts:
                config.check_size(self.manifest, split)
            members = torch.tensor(self.manifest.members(config.split, split), dtype=torch.int64, device=self._drawn_on)
            self._members[split] = members
            self._counts[split] = counts[members]
            sizes = [entry.count for entry in self.entries(split)]
            self._sizes[split] = min(sizes, default=0), max(sizes, default=0)
        self._trained_on: list[int] = self._members["meta_train"].tolist()
        self._windows: Windows | None = None
        if config.window is not None:
            self._windows = Windows(config.window, {split: len(self._members[split]) for split in SPLITS})
            self._check_window()
            if self._windows.applies("meta_test"):
                self.description["window"] = config.window.model_dump(mode="json")
        self._cache: CachedRows | None = None
        self._upcoming: Upcoming | None = None
        if self._windows is not None:
            self._upcoming = Upcoming(self._windows, self._drawn_classes)
        self._expected: object = None
        classes = len(self._members["meta_train"]) * self._copies("meta_train")
        self.train_classes: int | None = classes
        self.weighting: ClassWeighting | None = (
            ClassDifficulty(config.difficulty, classes=classes, device=device) if config.difficulty else None
        )
        self._indices = StepsAhead(self._draw, self._drawn_on)

    def class_digests(self, split: Split) -> dict[str, str]:
        """sha256 of a class's examples -> its name, for the classes of one part."""
        return {entry.sha256: entry.name for entry in self.entries(split)}

    def entries(self, split: Split) -> list[shards.ClassEntry]:
        """The classes of one part, in the order of `TaskBatch.classes` (of meta-training: without quarter turns)."""
        return [self.manifest.classes[i] for i in self._members[split].tolist()]

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        """Episodes with x [T, S|Q, *input_shape] and y int64 [T, S|Q], on the family's device.

        With windows, what later steps of meta-training need is read in the background.

        Raises DataError: a shard that is damaged when it is read (sets that do not lie in memory).
        """
        if split == "meta_train":
            self.expect(step, slots, seed=seed)
        if self.config.varies(split):
            if split == "meta_train":
                key = key_of_step(seed, split, step)
            else:
                (slot,) = slots.tolist()  # see `alike`
                key = key_of_episode(seed, split, step, slot)
            return self._of_shape(self._shape(split, key), split, step, slots, seed=seed, weights=weights)
        if weights is None:
            indices = self._indices(split, step, slots, seed=seed)
        else:  # those of later steps are not known yet
            indices = self._draw(split, seed, step, slots.to(self._drawn_on), weights.to(self._drawn_on))
        return self._batch(split, indices)

    def alike(self, split: Split, slots: Tensor) -> list[Tensor]:
        each = split != "meta_train" and self.config.varies(split)
        return list(slots.split(1)) if each else [slots]

    def largest(self, tasks: int, *, seed: int) -> TaskBatch:
        slots = torch.arange(tasks)
        if not self.variable_shapes:
            return self.sample("meta_train", 0, slots, seed=seed)
        return self._of_shape(self._shape("meta_train", None), "meta_train", 0, slots, seed=seed)

    def _shape(self, split: Split, key: Tensor | None) -> Shape:
        """Drawn by a key; None: the largest one."""
        n_way, _, n_query = self.config.episode(split)
        return self.config.variable.shape(n_way=n_way, n_query=n_query, smallest=self._sizes[split][0], key=key)

    def _of_shape(
        self, shape: Shape, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None
    ) -> TaskBatch:
        """Episodes of one shape, whose classes may differ in shots."""
        episodes = sample_unequal(
            seed=seed,
            split=split,
            step=step,
            slots=slots.to(self._drawn_on),
            class_counts=self._counts[split].repeat(self._copies(split)),
            smallest=self._sizes[split][0],
            largest=self._sizes[split][1],
            shape=shape,
            imbalance=self.config.variable.imbalance,
            turn_classes=self._turns_classes(split),
            class_weights=None if weights is None else weights.to(self._drawn_on),
            candidates=self._candidates(split, seed, step, slots),
        )
        return self._batch(split, episodes)

    def _batch(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> TaskBatch:
        support_x, query_x = self._inputs(split, indices)
        labels = torch.arange(indices.classes.shape[1], device=self._drawn_on).expand_as(indices.classes)
        support_y, query_y, keys, classes = map(
            self._on_device, (*self._of_examples(labels, indices), indices.keys, indices.classes)
        )
        return TaskBatch(support_x, support_y, query_x, query_y, keys, classes)

    def _on_device(self, drawn: Tensor) -> Tensor:
        """What was drawn, without waiting for a GPU."""
        if self.device.type != "cuda" or drawn.is_cuda:
            return drawn
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def _example_bytes(self) -> int:
        """Of an example in memory. The manifest is there, what is drawn by is not yet."""
        raise NotImplementedError

    def _check_window(self) -> None:
        """Raises DataError: too few classes for an episode, or too many for the cache."""
        number, data = self.config.window.classes, self.config.data
        n_way = max(self.config.episode(split)[0] for split in SPLITS)
        if number < n_way:
            raise DataError(f"{data}: task.window.classes={number} is too few for {n_way}-way episodes. Raise it.")
        counts = sorted((entry.count for entry in self.entries("meta_train")), reverse=True)
        need = sum(counts[: 2 * number]) * self._example_bytes()
        if self.prefetch and need > self.config.cache_mb << 20:
            raise DataError(
                f"{data}: two windows of task.window.classes={number} classes take up to {-(-need >> 20)} MB, and "
                f"task.cache_mb={self.config.cache_mb} holds fewer. Raise cache_mb, or lower window.classes."
            )

    @property
    def _mapped(self) -> bool:
        """Whether rows are to be read from the files as they are asked for."""
        return self.prefetch and self._windows is None and isinstance(readable(self.config.data), Path)

    def _cached(self, rows: RowsT) -> RowsT:
        """Have this store read ahead what windows there are."""
        self._cache = rows
        weakref.finalize(self, rows.close)  # its threads hold the rows, and not the family
        return rows

    def _row_store(self, convert: Convert, shape: tuple[int, ...], dtype: str) -> Store:
        """Of rows that `convert` makes of examples. It must not hold this family, or its threads would keep it."""
        place = self.config.data, self.manifest
        if not self.prefetch:
            return DeviceRows(*place, convert, self.device)
        if self._mapped:
            return MappedRows(*place, convert, self.device)
        classes = ClassArrays(*place, shape=shape, dtype=dtype, convert=convert)
        return self._cached(CachedRows(classes, self.device, capacity=self.config.cache_mb << 20))

    def expect(self, step: int, slots: Tensor, *, seed: int) -> None:
        """Have read what these slots need from a step of meta-training on, as far as memory holds it."""
        if self._upcoming is None or self._cache is None:  # asking a GPU for the slots would wait for it
            return
        asked = (step, slots.tolist(), seed)
        if self._expected == asked:
            return
        self._expected = asked
        members = self._trained_on
        known = self.weighting is None  # else draws depend on how training goes
        near = self._upcoming.near(step, slots, seed=seed, known=known)
        spare = self._upcoming.spare(step, slots, seed=seed, known=known)
        self._cache.expect([members[each] for each in near], (members[each] for each in spare))

    def _drawn_classes(self, seed: int, steps: Tensor, slots: Tensor) -> Tensor:
        """The classes of meta-training's episodes, numbers within the part: int64 [B, T, n_way].

        Where n_way varies, with those that an episode of the most classes had; the first ones are the same.
        """
        members = len(self._members["meta_train"])
        counts = self._counts["meta_train"].repeat(self._copies("meta_train"))
        episodes = keys.of_episodes(seed, SPLITS.index("meta_train"), steps, slots)
        candidates = self._candidates("meta_train", seed, steps, slots)
        return draw_classes(episodes, counts, self.config.episode("meta_train")[0], None, candidates) % members

    def _candidates(self, split: Split, seed: int, steps: int | Tensor, slots: Tensor) -> Tensor | None:
        """The only classes that an episode may hold, int64 [..., N] broadcast against the episodes; None: all."""
        if self._windows is None or not self._windows.applies(split):
            return None
        numbers = self._windows.numbers(split, steps, slots)
        return self._windows.candidates(seed, split, numbers, copies=self._copies(split)).to(self._drawn_on)

    def _inputs(self, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        """The network's inputs [T, S, *input_shape] and [T, Q, *input_shape], each class's examples in a row."""
        raise NotImplementedError

    def _gathered(self, store: Store, split: Split, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        """The drawn examples as they are stored, [T, S, ...] and [T, Q, ...]."""
        members = self._members[split]
        classes = members[indices.classes % len(members)]
        if isinstance(indices, UnequalEpisodes):
            rows = store.gather(classes.gather(1, indices.labels), indices.examples.unsqueeze(-1)).squeeze(2)
            return rows[:, : indices.support], rows[:, indices.support :]
        rows = store.gather(classes, torch.cat([indices.support, indices.query], dim=-1))
        shots = indices.support.shape[-1]
        return rows[:, :, :shots].flatten(1, 2), rows[:, :, shots:].flatten(1, 2)

    def _of_examples(self, values: Tensor, indices: EpisodeIndices | UnequalEpisodes) -> tuple[Tensor, Tensor]:
        """A value for each class of the episodes [T, W] -> for each example: [T, S] and [T, Q]."""
        if isinstance(indices, UnequalEpisodes):
            each = values.gather(1, indices.labels)
            return each[:, : indices.support], each[:, indices.support :]
        shots, queries = indices.support.shape[-1], indices.query.shape[-1]
        return values.repeat_interleave(shots, dim=1), values.repeat_interleave(queries, dim=1)

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
            candidates=self._candidates(split, seed, steps, slots),
        )
