"""A whole experiment: the configuration file's sections put together, and the components built from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, field_serializer, field_validator, model_validator

from pipeline import config, kernels
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.inner_optimizer import not_frozen
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision
from pipeline.models import MODELS
from pipeline.models.torchvision_model import NO_WEIGHTS
from pipeline.storage import Address, absolute
from pipeline.tasks import TASK_FAMILIES
from pipeline.training.outer import OuterConfig
from pipeline.types import Algorithm, TaskFamily, TaskModel

if TYPE_CHECKING:
    TaskSection: TypeAlias = Any
    ModelSection: TypeAlias = Any
    AlgorithmSection: TypeAlias = Any
else:
    TaskSection = config.one_of(TASK_FAMILIES, "family")
    ModelSection = config.one_of(MODELS, "name")
    AlgorithmSection = config.one_of(ALGORITHMS, "name")


class TrainingConfig(Section):
    """The outer loop and where it runs."""

    steps: int = Field(ge=0)  # outer steps; 0: the weights it starts from are evaluated and registered as they are
    meta_batch_size: int = Field(default=32, ge=1)  # episodes per outer step, over all workers
    outer: OuterConfig = OuterConfig()
    init_from: str | None = Field(default=None, min_length=1)
    # weights to start from: a state file (.safetensors, .pt, .pth), a run's folder, a model's folder, or
    # models:/NAME@champion. The network must be the same; a head of another shape stays fresh
    freeze: list[str] = Field(default=[], examples=[["block1.*", "*.norm.*"]])
    # patterns of meta-parameters that outer steps leave as they are; inner steps may still change them
    validate_every: int = Field(default=100, ge=1)  # outer steps; a checkpoint is written after each validation
    max_nonfinite_steps: int = Field(default=10, ge=1)  # skipped in a row before the run stops
    task_chunk: int | None = Field(default=None, ge=1)
    # most tasks adapted at once. None: what was measured fastest on CPU, the whole share on a GPU
    memory_budget: str | None = Field(default=None, pattern=r"^\d+(\.\d+)?\s*[MG]i?B$", examples=["4 GB"])
    # of one worker's step beyond its idle memory; fewer tasks are adapted at once where they need more. None: no limit
    # on a CPU, the free memory on a GPU
    dtype: Literal["float32", "float64"] = "float32"
    kernel: Kernel = "auto"
    # of conv4, all of them exact. auto: native (C++, on CPUs with a compiler) where it can be built, else closed
    # (PyTorch alone, any device); pure: PyTorch's own derivatives, slow, the reference
    precision: Precision = "float32"
    # mixed: the query pass of training in bfloat16, adaptation and evaluation in float32 (conv4; on CPUs its native
    # kernels, on GPUs the closed ones)
    tf32: bool = False  # on GPUs: convolutions in TF32, whose factors have 10 bits; not exact any more
    compile: bool = False
    # the meta-gradient as one compiled program (inductor): the same but for rounding. It is made at the start of a run,
    # which takes up to a minute, and kept for the next. Pays in runs of minutes where ops take longer to launch than
    # to compute (the sinusoid MLP: 4 times as fast); not for conv4 on a CPU
    backend: Literal["ray", "processes", "local"] = "ray"  # processes: gloo without Ray; local: in this process
    num_workers: int | tuple[int, int] = 1  # or [fewest, most]: as many as there is room for, changing as it does
    resize_seconds: float = Field(default=60.0, gt=0)  # between looks at whether there is room for more workers (ray)
    cpus_per_worker: int = Field(default=1, ge=1)  # threads too: one thread per process is fastest on CPU
    use_gpu: bool = False  # one GPU per worker
    max_failures: int = Field(default=3, ge=0)  # restarts of the worker group after a lost worker

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _a_number_or_a_range(cls, value: Any) -> int | tuple[int, int]:
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("should be a whole number of at least 1, or two of them: [fewest, most]")
        if len(numbers) == 1 and not isinstance(value, list | tuple):
            return value
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError("should be two numbers, [fewest, most]")
        return (numbers[0], numbers[1])

    @field_serializer("num_workers")
    def _as_it_was_given(self, value: int | tuple[int, int]) -> int | list[int]:
        return value if isinstance(value, int) else list(value)

    @model_validator(mode="after")
    def _kernels_fit(self) -> TrainingConfig:
        if self.kernel == "native" and self.use_gpu:
            raise ValueError("kernel: native is for CPUs and use_gpu is true: set kernel to auto or closed")
        fitting = "closed" if self.use_gpu else "native"
        if self.precision == "mixed" and self.kernel not in ("auto", fitting):
            where = "a GPU" if self.use_gpu else "a CPU"
            raise ValueError(
                f"precision: mixed needs the {fitting} kernels on {where}, which kernel: {self.kernel} rules out: set "
                "precision to float32, or kernel to auto"
            )
        if self.tf32 and not self.use_gpu:
            raise ValueError("tf32 is for GPUs and use_gpu is false: leave it out")
        if self.precision == "mixed" and self.dtype != "float32":
            raise ValueError(f"precision: mixed keeps parameters in float32, dtype is {self.dtype}")
        return self

    @model_validator(mode="after")
    def _every_worker_has_a_slot(self) -> TrainingConfig:
        if self.max_workers > self.meta_batch_size:
            raise ValueError(
                f"num_workers ({self.max_workers}) is more than meta_batch_size ({self.meta_batch_size}): some workers "
                "would have no task"
            )
        if self.backend == "local" and self.max_workers > 1:
            raise ValueError(f"backend local has one worker, num_workers is {self.max_workers}: use ray or processes")
        return self

    def absolute(self) -> TrainingConfig:
        """With an absolute path of the weights to start from: a run is resumed from any folder."""
        if self.init_from is None or self.init_from.startswith(("models:/", "runs:/")):
            return self
        return self.model_copy(update={"init_from": absolute(self.init_from)})

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def memory_bytes(self) -> int | None:
        if self.memory_budget is None:
            return None
        number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", self.memory_budget).groups()  # type: ignore[union-attr]
        return int(float(number) * {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}[unit])

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class EvaluationConfig(Section):
    """Fixed episodes. The seeds do not follow the experiment's, so that different runs meet the same episodes."""

    validation_episodes: int = Field(default=200, ge=2)  # for checkpoint selection and plateaus
    test_episodes: int = Field(default=1000, ge=2)
    curve_episodes: int | None = Field(default=None, ge=2)
    # of the test episodes: so many are scored after every adaptation step, the others after the last alone. None: all
    promotion_episodes: int = Field(default=600, ge=2)  # candidate against champion, paired
    selection_mode: Literal["transductive", "inductive"] = "inductive"  # the mode that picks the best checkpoint


class TrackingConfig(Section):
    """Where results go."""

    runs: Address = "runs"  # folder of run directories (checkpoints, metrics, results), or s3://…, gs://…
    experiment: str = "metapipe"  # MLflow experiment
    register_model: bool = True  # register the best checkpoint and promote it if it beats the champion


class Experiment(Section):
    """A configuration file. `name` is also the registered model's name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    task: TaskSection
    model: ModelSection
    algorithm: AlgorithmSection
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Experiment:
        if self.training.init_from is not None and getattr(self.model, "weights", NO_WEIGHTS) != NO_WEIGHTS:
            raise ValueError("training.init_from and model.weights both name weights to start from: leave one out")
        starts_from = getattr(self.model, "starts_from", None)
        if self.training.init_from is not None and starts_from is not None:
            raise ValueError(f"training.init_from and model.{starts_from} both say what to start from: leave one out")
        if getattr(self.model, "batch_norm", None) == "pretrained" and initial_weights(self) is None:
            raise ValueError(
                "model.batch_norm: pretrained takes statistics that come with weights: set training.init_from, or the "
                "weights of model.name: torchvision"
            )
        return self

    def absolute(self) -> Experiment:
        """With absolute paths: workers run in another folder. Raises ConfigError: see `storage.location`."""
        sections = {"task": self.task, "model": self.model, "training": self.training}
        changes = {k: section.absolute() for k, section in sections.items() if hasattr(section, "absolute")}
        return self.model_copy(update=changes)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Components(NamedTuple):
    family: TaskFamily
    model: TaskModel
    algorithm: Algorithm


def load(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment in a YAML file, with `dotted.key=value` overrides.

    Raises ConfigError: names the file, the key and what to do.
    """
    content = config.apply_overrides(config.read_yaml(path), overrides)
    return config.validate(Experiment, content, source=str(path))


def from_dict(content: dict[str, Any], *, source: str, stored: bool = False) -> Experiment:
    """The experiment that `Experiment.to_dict` wrote. stored: see `config.validate`. Raises ConfigError."""
    return config.validate(Experiment, content, source=source, stored=stored)


def initial_weights(experiment: Experiment) -> str | None:
    """Where the weights come from that training starts from; None: they are random."""
    weights = getattr(experiment.model, "weights", NO_WEIGHTS)
    given = experiment.training.init_from or (None if weights == NO_WEIGHTS else weights)
    return given or getattr(experiment.model, "starts_from", None)


def frozen_names(experiment: Experiment, parts: Components, names: Iterable[str]) -> set[str]:
    """The meta-parameters that outer steps leave as they are.

    Raises ConfigError: a pattern that matches nothing, or nothing is left to learn.
    """
    every = list(names)
    key = "training.freeze"
    learned = not_frozen(every, [*experiment.training.freeze, *parts.model.constant_names], key=key)
    return set(every) - set(learned)


def task_chunk(experiment: Experiment, parts: Components, device: torch.device) -> int | None:
    """Tasks to adapt at once on a device; None: all of them."""
    fastest = parts.model.cpu_task_chunk if device.type == "cpu" else None
    return experiment.training.task_chunk or fastest


def _kernel_on(device: torch.device, kernel: Kernel) -> Kernel:
    """A run on CPUs may be evaluated on a GPU, where its native kernels do not exist."""
    return "auto" if kernel == "native" and device.type != "cpu" else kernel


def build(experiment: Experiment, *, device: torch.device) -> Components:
    """The experiment's components on a device.

    Raises DataError: the data set is missing, damaged or too small. ConfigError: parts that do not fit together.
    """
    dtype = getattr(torch, experiment.training.dtype)
    family = experiment.task.build(device=device, dtype=dtype)
    if family.inputs not in experiment.model.inputs:
        raise ConfigError(
            f"model.name: {experiment.model.name} takes {' and '.join(experiment.model.inputs)}, and task.family: "
            f"{experiment.task.family} gives {family.inputs}. Choose another model."
        )
    model = experiment.model.build(
        input_shape=family.input_shape,
        num_outputs=family.num_outputs,
        dtype=dtype,
        device=device,
        kernel=_kernel_on(device, experiment.training.kernel),
        precision=experiment.training.precision,
    )
    if device.type == "cuda":
        kernels.allow_tf32(experiment.training.tf32)
    algorithm = experiment.algorithm.build(model=model, objective=family.objective, train_classes=family.train_classes)
    if experiment.training.compile and family.variable_shapes:
        raise ConfigError(
            "training.compile: a program is for one shape of episodes, and with this task their shape changes from "
            "outer step to outer step. Set training.compile to false, or give the task one shape."
        )
    n_way = family.description.get("n_way") or 0
    if n_way > family.num_outputs and not algorithm.any_way:
        raise ConfigError(
            f"task.eval_n_way: {n_way} is more than task.n_way ({family.num_outputs}), and the head that "
            f"{experiment.algorithm.name} trains has that many outputs. Lower it, or raise task.n_way."
        )
    if family.weighting is not None:
        if not getattr(algorithm, "tells_class_losses", False):
            raise ConfigError(
                f"task.difficulty: weights classes by their query losses in meta-training, which "
                f"{experiment.algorithm.name} does not tell. Leave it out, or choose an algorithm that learns by the "
                "query loss of episodes."
            )
        algorithm.watch_classes(family.train_classes)
    return Components(family, model, algorithm)


def check_device(experiment: Experiment, *, under_ray: bool | None = None) -> None:
    """Raises ConfigError: it asks for a GPU and there is none. under_ray: as in `check_fits`."""
    if under_ray is None:
        under_ray = experiment.training.backend == "ray"
    elsewhere = under_ray and "RAY_ADDRESS" in os.environ
    if experiment.training.use_gpu and not elsewhere and not torch.cuda.is_available():
        raise ConfigError("training.use_gpu: true, but no CUDA device is visible here. Set it to false.")


def _on_cpu(experiment: Experiment) -> Experiment:
    """Where it trains on GPUs: with kernels that exist on both, so that nothing is built or said for a CPU."""
    if not experiment.training.use_gpu:
        return experiment
    changes = {"kernel": "closed", "precision": "float32"}
    return experiment.model_copy(update={"training": experiment.training.model_copy(update=changes)})


def check_fits(experiment: Experiment, *, under_ray: bool | None = None) -> str:
    """Check everything that can be checked before any worker starts; returns the data set's digest.

    under_ray: whether Ray starts what trains; None: as the backend says. A Ray cluster may have GPUs that are not here.

    Raises UserError as `build` does, and where the data set's bytes are damaged.
    """
    check_device(experiment, under_ray=under_ray)
    digest = experiment.task.verify()
    parts = build(_on_cpu(experiment), device=torch.device("cpu"))
    frozen_names(experiment, parts, parts.algorithm.init(experiment.seed).params)
    return digest
