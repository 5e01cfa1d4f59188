"""Several data sets as one task family: every outer step of meta-training is of one of them, drawn by weight.

The set is a function of (seed, step), so all tasks of a step are of one set and have one shape, however the sets'
shapes differ; and every worker sees the same global batch. A set's episodes are those it has alone: of step s, its own
step s. Validation and test take the sets in turn, slot i being episode ⌊i / sets⌋ of set i mod sets: each has as many,
whatever its weight, results tell the score of each, and the overall score is their mean.

All sets have one kind of task and one input shape. Tables have the same columns and are encoded as one, with the
categories of all. Classes of different sets never meet in an episode, and a class that several sets hold is in the same
part of each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import keys
from pipeline.config import Section, one_of
from pipeline.errors import ConfigError
from pipeline.tasks.classes import ClassTasks
from pipeline.tasks.images import ImagesConfig
from pipeline.tasks.regression import RegressionConfig
from pipeline.tasks.sinusoid import SinusoidConfig
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tabular import TabularTasks, TabularTasksConfig, joint_encoding
from pipeline.tasks.text import TextTasks, TextTasksConfig
from pipeline.types import SPLITS, Inputs, Split, TaskBatch, TaskFamily

_SETS = 0x73657473  # no small number: those are slots

ONE_SET = (ImagesConfig, TabularTasksConfig, TextTasksConfig, SinusoidConfig, RegressionConfig)
"""The families of one data set, or of one procedure: what a mixture may be of."""

if TYPE_CHECKING:
    OneSetSection: TypeAlias = Any
else:
    OneSetSection = one_of(ONE_SET, "family")


class MixtureSet(Section):
    """One of the sets."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")  # in results and metrics
    weight: float = Field(default=1.0, gt=0)  # how often it is drawn in meta-training, relative to the others
    task: OneSetSection  # as if it were the only one


class MixtureConfig(Section):
    """Several data sets, mixed with weights."""

    family: Literal["mixture"]
    sets: list[MixtureSet] = Field(min_length=2)

    @model_validator(mode="after")
    def _sets_can_be_mixed(self) -> Self:
        names = [part.name for part in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"sets: their names must differ (got {', '.join(names)})")
        for part in self.sets:
            if getattr(part.task, "difficulty", None) is not None:
                raise ValueError(
                    f"sets: {part.name} has difficulty, which is for a family of one data set. Leave it out"
                )
        return self

    def build(self, *, device: torch.device, dtype: torch.dtype) -> MixtureTasks:
        return MixtureTasks(self, device=device, dtype=dtype)

    def absolute(self) -> MixtureConfig:
        """With absolute data paths: workers run in another folder."""
        sets = [
            part.model_copy(update={"task": part.task.absolute()}) if hasattr(part.task, "absolute") else part
            for part in self.sets
        ]
        return self.model_copy(update={"sets": sets})

    def verify(self) -> str:
        """Check every set; returns a digest of theirs. Raises DataError."""
        digests = [part.task.verify() for part in self.sets]
        if all(isinstance(part.task, TabularTasksConfig) for part in self.sets):
            digests.append("one encoding")  # older versions encoded each table by itself: their runs do not go on
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


class MixtureTasks:
    """Task family: one of several for each outer step."""

    weighting = None

    def __init__(self, config: MixtureConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DataError as the sets' families do. ConfigError: sets that do not go together."""
        self.config = config
        self.families: list[TaskFamily] = [part.task.build(device=device, dtype=dtype) for part in config.sets]
        self.sets = tuple(part.name for part in config.sets)
        first = self.families[0]
        tables = [each for each in self.families if isinstance(each, TabularTasks)]
        if len(tables) == len(self.sets):
            named = dict(zip(self.sets, tables, strict=True))
            self.use(joint_encoding(named, [part.weight for part in config.sets]))
        for name, family in zip(self.sets, self.families, strict=True):
            ours, theirs = _kind(family), _kind(first)
            if ours != theirs:
                raise ConfigError(
                    f"task.sets: a network takes one kind of input and task, and {self.sets[0]} has {theirs}, {name} "
                    f"has {ours}. Prepare the data sets alike (data prepare --size, --kind), and give texts the same "
                    "task.tokens."
                )
        self._check_parts()
        self.objective = first.objective
        self.inputs: Inputs = first.inputs
        self.input_shape = first.input_shape
        self.num_outputs = max(family.num_outputs for family in self.families)
        counts = [family.train_classes for family in self.families]
        self.train_classes = None if counts[0] is None else sum(count or 0 for count in counts)
        self._first_class = list(itertools.accumulate((count or 0 for count in counts), initial=0))
        self.prefetch = any(family.prefetch for family in self.families)
        shapes = {(getattr(p.task, "n_way", None), p.task.k_shot, p.task.n_query) for p in config.sets}
        self.variable_shapes = len(shapes) > 1 or any(family.variable_shapes for family in self.families)
        self.description = {
            "family": config.family,
            "n_way": max(family.description.get("n_way", 0) for family in self.families) or None,
            "sets": {name: family.description for name, family in zip(self.sets, self.families, strict=True)},
        }
        total = sum(part.weight for part in config.sets)
        self._ends = [weight / total for weight in itertools.accumulate(part.weight for part in config.sets)]

    def _check_parts(self) -> None:
        """Raises ConfigError: a class that two sets hold, known by its examples, is in different parts of them."""
        digests = [{split: _class_digests(family, split) for split in SPLITS} for family in self.families]
        for one, other in itertools.permutations(range(len(self.sets)), 2):
            for early, late in itertools.combinations(SPLITS, 2):
                candidates = digests[other][late]
                seen = sorted(candidates[digest] for digest in candidates.keys() & digests[one][early].keys())
                if seen:
                    names = ", ".join(seen[:3]) + (", …" if len(seen) > 3 else "")
                    raise ConfigError(
                        f"task.sets: {len(seen)} of the {len(candidates)} {late} classes of {self.sets[other]} are in "
                        f"{early} of {self.sets[one]} ({names}), so the scores there would mean nothing. Give sets of "
                        "the same data one class split: the same task.split, and data prepared with the same --seed "
                        "or --class-lists."
                    )

    def drawn(self, seed: int, step: int) -> int:
        """Which set outer step `step` of meta-training is of."""
        key = keys.fold(keys.make(seed, SPLITS.index("meta_train"), step), _SETS)
        return min(bisect_right(self._ends, keys.uniform(key, 1).item()), len(self.sets) - 1)

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        assert weights is None, "classes of a mixture are not weighted"
        if split == "meta_train":
            for family in self.families:
                if isinstance(family, ClassTasks):  # windows go on while other sets are drawn
                    family.expect(step, slots, seed=seed)
            return self._sampled(self.drawn(seed, step), split, step, slots, seed=seed)
        batches, places = [], []
        for number in range(len(self.sets)):
            mine = slots % len(self.sets) == number
            if bool(mine.any()):
                batches.append(self._sampled(number, split, step, slots[mine] // len(self.sets), seed=seed))
                places.append(mine.nonzero().flatten())
        if len(batches) == 1:
            return batches[0]
        parts = (None if part[0] is None else torch.cat(part) for part in zip(*batches, strict=True))
        joined = TaskBatch(*parts)  # type: ignore[arg-type]
        return joined.tasks(torch.cat(places).argsort())

    def _sampled(self, number: int, split: Split, step: int, slots: Tensor, *, seed: int) -> TaskBatch:
        batch = self.families[number].sample(split, step, slots, seed=seed)
        if batch.classes is None or split != "meta_train":
            return batch
        return batch._replace(classes=batch.classes + self._first_class[number])

    def alike(self, split: Split, slots: Tensor) -> list[Tensor]:
        if split == "meta_train":
            return [slots]
        count = len(self.sets)
        groups = []
        for number, family in enumerate(self.families):
            mine = slots[slots % count == number]
            if len(mine):
                groups += [group * count + number for group in family.alike(split, mine // count)]
        return groups

    def largest(self, tasks: int, *, seed: int) -> TaskBatch:
        each = [family.largest(1, seed=seed) for family in self.families]
        sizes = [batch.support_x.numel() + batch.query_x.numel() for batch in each]
        return self.families[sizes.index(max(sizes))].largest(tasks, seed=seed)

    def use(self, encoding: TableEncoding) -> None:
        """Make inputs of tables as a model was trained on. Raises DataError as `TabularTasks.use` does."""
        for family in self.families:
            if isinstance(family, TabularTasks):
                family.use(encoding)
        self.input_shape = self.families[0].input_shape

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """What makes a user's example one of these sets'; None where they differ in it, or have none."""
        each = [getattr(family, "preprocessing", None) for family in self.families]
        return each[0] if all(one == each[0] for one in each) else None

    def class_digests(self, split: Split) -> dict[str, str]:
        """sha256 of a class's examples -> its set and name, for the classes of one part."""
        found: dict[str, str] = {}
        for name, family in zip(self.sets, self.families, strict=True):
            for digest, of_class in _class_digests(family, split).items():
                found[digest] = f"{name}: {of_class}"
        return found


def families_of(family: TaskFamily) -> list[TaskFamily]:
    """Those of a mixture's sets; the family itself where it is none."""
    return family.families if isinstance(family, MixtureTasks) else [family]


def _class_digests(family: TaskFamily, split: Split) -> dict[str, str]:
    """As `ClassTasks.class_digests`; none where tasks have no classes."""
    return family.class_digests(split) if isinstance(family, ClassTasks) else {}


def _kind(family: TaskFamily) -> str:
    kind = f"{family.objective.name} of {family.inputs} {list(family.input_shape)}"
    if isinstance(family, TextTasks):  # a token's number means a word
        return f"{kind} cut by {family.config.tokens.model_dump_json(exclude={'kind'})}"
    return f"{kind}, {family.num_outputs} outputs" if family.objective.name == "regression" else kind
