"""Which episodes a model is evaluated on: those of its own task, or of other data, ways, shots and class splits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment
from pipeline.tasks import shards
from pipeline.tasks.classes import ClassTasksConfig
from pipeline.tasks.mixture import MixtureConfig
from pipeline.types import Split

Part = Split | Literal["all"]


class EvaluationTask(NamedTuple):
    """A task's section, and the part of it that is evaluated."""

    task: Any
    part: Split


def of(
    exp: Experiment,
    *,
    data: str | None = None,
    class_split: str | None = None,
    part: Part = "meta_test",
    n_way: int | None = None,
    k_shot: int | None = None,
    n_query: int | None = None,
) -> EvaluationTask:
    """The task of an experiment, with other data or another shape of episodes where that is asked for.

    part: "all" takes every class of the data set, whatever its class splits: for data that was never trained on.
    class_split: of other data, by default the experiment's where it has one of that name, or the only one it has.
    Given ways or shots make the shapes of a task with `variable.evaluation` fixed. Data for a model of a mixture takes
    the shape of its first set's episodes.

    Raises ConfigError: what does not apply to this kind of task. DataError: no data set there.
    """
    task = exp.task
    if isinstance(task, MixtureConfig):
        if data is None:
            if class_split or part == "all":
                raise ConfigError(
                    f"{exp.name}: was trained on a mixture; --class-split and --part all need --data, one of its sets "
                    "or another data set."
                )
            sets = [
                one.model_copy(update={"task": _shaped(one.task, part, n_way=n_way, k_shot=k_shot, n_query=n_query)})
                for one in task.sets
            ]
            return EvaluationTask(task.model_copy(update={"sets": sets}), part)
        task = task.sets[0].task
    if not isinstance(task, ClassTasksConfig):
        if data or class_split or n_way or part == "all":
            raise ConfigError(
                f"{exp.name}: its tasks are procedural; --data, --class-split, --n-way and --part all do not apply."
            )
        return EvaluationTask(_shaped(task, part, k_shot=k_shot, n_query=n_query), part)
    if part == "all":
        if class_split:
            raise ConfigError("--part all: takes every class, whatever its class split. Leave --class-split out.")
        class_split, part = shards.EVERY_CLASS, "meta_test"
    if data is not None:
        task = task.model_copy(update={"data": data, **({"window": None} if hasattr(task, "window") else {})})
        if class_split is None:
            names = shards.read_manifest(data).splits
            class_split = names[0] if len(names) == 1 else None
    if class_split is not None:
        task = task.model_copy(update={"split": class_split})
    return EvaluationTask(_shaped(task, part, n_way=n_way, k_shot=k_shot, n_query=n_query).only(part), part)


def _shaped(task: Any, part: Split, **shape: int | None) -> Any:
    """With other ways, shots and queries, and images as they are. Raises ConfigError."""
    given = {name: value for name, value in shape.items() if value is not None}
    if "n_way" in given and "n_way" not in type(task).model_fields:
        raise ConfigError("--n-way: these tasks have no classes. Leave it out.")
    changes: dict[str, Any] = {f"eval_{name}": value for name, value in given.items()}
    if part == "meta_train":
        changes |= given
    if given.keys() & {"n_way", "k_shot"} and getattr(task, "variable", None) is not None:
        changes["variable"] = None
    if getattr(task, "augmentation", None) is not None:
        changes["augmentation"] = None
    return config.validate(type(task), task.model_dump() | changes, source="evaluation") if changes else task
