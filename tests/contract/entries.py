"""Every algorithm of the registry with what its contract needs to know, and the tiny problems it is tried on.

A new algorithm adds one line to `ENTRIES`. Every variant is tried on the first of the algorithm's problems, the plain
one (the first variant) on all of them. A case costs about a second: few variants, each for code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import experiment as experiments
from pipeline.algorithms import ALGORITHMS
from pipeline.experiment import Components, Experiment
from pipeline.learner import ModelCard, card_of
from pipeline.tasks.tabular import TabularTasks
from pipeline.tasks.text import TextTasks
from pipeline.types import MetaGradient, MetaState, TaskBatch

TASKS = 6

IMAGES = {"family": "images", "split": "random", "n_query": 3, "eval_n_query": 3}
MODULE = {"name": "module", "factory": f"{__name__}:network", "dropout": True}
CONV4 = {"name": "conv4", "hidden": 16, "downsample": "stride"}
# name: task, model, kernel
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "images": (IMAGES, {"name": "mlp", "hidden": [16], "normalization": "batch"}, "auto"),
    "sinusoid": ({"family": "sinusoid"}, {"name": "mlp", "hidden": [16]}, "auto"),
    "module by loop": (IMAGES, {**MODULE, "batching": "loop"}, "auto"),
    "module by vmap": (IMAGES, {**MODULE, "batching": "vmap"}, "auto"),
    "resnet12": (IMAGES, {"name": "resnet12", "widths": [2, 3, 4, 5], "drop_rate": 0.1}, "auto"),
    "conv4": (IMAGES, CONV4, "auto"),  # native kernels where they can be built
    "conv4 pure": (IMAGES, CONV4, "pure"),
    "conv4 closed": (IMAGES, CONV4, "closed"),
}
# a text and a table, which every algorithm must take or refuse: see test_modalities.py
OTHER_MODALITIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": (
        {"family": "text", "split": "random", "n_query": 3, "eval_n_query": 3, "tokens": {"max_tokens": 24}},
        {"name": "text", "buckets": 64, "embedding": 8},
        "auto",
    ),
    "tabular": (
        {"family": "tabular", "split": "random", "n_query": 3, "eval_n_query": 3},
        {"name": "mlp", "hidden": [16]},
        "auto",
    ),
}
CLASSIFICATION = ("images", "module by vmap", "conv4")
ANY_TASK = (*CLASSIFICATION, "sinusoid")  # the other batching and kernels are one algorithm's, MAML's, to try


class Temperature(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def network() -> nn.Module:
    first = [nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Tanh(), Temperature()]
    return nn.Sequential(*first, nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 5))


@dataclass(frozen=True)
class Entry:
    """What the contract needs to know of an algorithm."""

    required: dict[str, Any] = field(default_factory=dict)  # keys without a default, and sizes of networks of its own
    variants: tuple[dict[str, Any], ...] = ({},)  # other keys; the first variant is the plain algorithm
    problems: tuple[str, ...] = ANY_TASK  # that it is for
    outer_lr: float = 0.03  # of Adam's few steps on an easy family, after which the meta-loss must be lower
    has_head: bool = True  # the model's head is among the meta-parameters
    queries_apart: bool = True
    # in inductive training, a query's part of the meta-loss does not depend on the other queries. Not where training
    # takes queries for something else than the loss of an adapted learner; say why beside it


ENTRIES: dict[str, Entry] = {
    "maml": Entry(
        required={"inner_lr": 0.1},
        variants=(
            {},
            {"first_order": True},
            {"adaptation_steps": 3},
            {"normalization": "inductive"},
            {"inductive_statistics": "running"},
            {"inner_optimizer": "adam", "inner_lr": 0.01, "adaptation_steps": 2, "inner_gradient_clip": 1.0},
            {"inner_momentum": 0.9, "inner_weight_decay": 0.01, "adaptation_steps": 2, "recompute_inner_steps": True},
        ),
        problems=tuple(name for name in PROBLEMS if name != "resnet12"),  # which has a test of its own
    ),
    "anil": Entry(required={"inner_lr": 0.1}, variants=({}, {"adaptation_steps": 3, "recompute_inner_steps": True})),
    "boil": Entry(required={"inner_lr": 0.1}),
    "reptile": Entry(
        required={"inner_lr": 0.1},
        variants=(
            {"adaptation_steps": 3},
            {
                "adaptation_steps": 4,
                "inner_optimizer": "adam",
                "inner_lr": 0.01,
                "inner_batch_size": 8,
                "inner_state": "carried",
            },
        ),
    ),
    "imaml": Entry(
        required={"inner_lr": 0.03},
        variants=(
            {"adaptation_steps": 3, "regularization": 1.0, "cg_steps": 2},
            {
                "adaptation_steps": 3,
                "inner_momentum": 0.5,
                "learn_regularization": True,
                "eval_regularization": 0,
                "cg_damping": 0.5,
                "freeze": ["layer1.*"],
            },
        ),
    ),
    "meta_sgd": Entry(variants=({}, {"adaptation_steps": 2, "inner_momentum": 0.9})),
    "maml_plus_plus": Entry(
        required={"inner_lr": 0.1},
        variants=(
            {"adaptation_steps": 2, "per_step_statistics": False, "inductive_statistics": "support"},
            {},
            {"adaptation_steps": 2, "first_order_steps": 5, "multi_step_loss_steps": 10},
        ),
    ),
    "meta_curvature": Entry(required={"inner_lr": 0.1}),
    "lstm_meta_learner": Entry(
        required={"inner_lr": 0.1, "hidden_units": 4},
        variants=({}, {"adaptation_steps": 2, "first_order": False}),
    ),
    "transfer": Entry(
        required={"inner_lr": 0.5, "adaptation_steps": 3},
        variants=({}, {"classifier": "cosine", "inductive_statistics": "running"}, {"fine_tune": "all"}),
        problems=CLASSIFICATION,
        queries_apart=False,  # its training has no adaptation: support and query images are normalized together
    ),
    "mann": Entry(
        required={"controller_units": 16, "memory_rows": 8, "memory_width": 6, "reads": 2},
        variants=({}, {"normalization": "transductive", "inductive_statistics": "running"}),
        problems=CLASSIFICATION,
        queries_apart=False,  # an episode's examples are one sequence, each of which the next ones may remember
    ),
    "proto_maml": Entry(
        required={"inner_lr": 0.1},
        variants=(
            {},
            {"through_initialization": False, "adaptation_steps": 2, "recompute_inner_steps": True},
            {"freeze": ["layer*", "norm*"]},
        ),
        problems=CLASSIFICATION,
        has_head=False,
    ),
    "protonet": Entry(
        variants=({}, {"normalization": "inductive"}, {"distance": "cosine", "learn_scale": True}),
        problems=CLASSIFICATION,
        has_head=False,
    ),
    "matching": Entry(problems=CLASSIFICATION, has_head=False),
}


def registered() -> list[str]:
    """The names of all algorithms of the registry."""
    return [config.model_fields["name"].annotation.__args__[0] for config in ALGORITHMS]


def plain() -> list[Any]:
    """One case of every algorithm, as parameters of a test."""
    return [_parameter(name, _entry(name).variants[0], _entry(name).problems[0]) for name in registered()]


def cases() -> list[Any]:
    """All of them: every variant on the algorithm's first problem, and the plain one on the others."""
    return [
        _parameter(name, variant, problem)
        for name in registered()
        for number, variant in enumerate(_entry(name).variants)
        for problem in (_entry(name).problems if number == 0 else _entry(name).problems[:1])
    ]


def _entry(name: str) -> Entry:
    return ENTRIES.get(name, Entry())  # that none is missing is a test's to say


def _parameter(name: str, variant: dict[str, Any], problem: str) -> Any:
    return pytest.param(
        (name, variant, problem), id="-".join([name, problem, *(f"{k}={v}" for k, v in variant.items())])
    )


class Case:
    """An algorithm on a problem, with what many tests start from. Only read."""

    def __init__(self, name: str, variant: dict[str, Any], problem: str, data: Path | dict[str, Path]) -> None:
        self.name, self.entry = name, _entry(name)
        self._variant, self._problem = variant, problem
        self._places = data if isinstance(data, dict) else {"images": data}
        self.experiment = self.with_keys()
        self.parts = build(self.experiment)
        self.algorithm = self.parts.algorithm
        self.state = self.algorithm.init(3)
        self.batch = sample(self.parts)
        self.gradient = self.algorithm.meta_grad(self.state, self.batch, step=0)

    @cached_property
    def later(self) -> tuple[MetaState, MetaGradient]:
        """A state whose running statistics and carried inner state are those after a step, and its meta-gradient."""
        state = observed(self)
        return state, self.algorithm.meta_grad(state, self.batch, step=1)

    def has(self, key: str) -> bool:
        """Whether the algorithm has this key."""
        return key in type(self.experiment.algorithm).model_fields

    def with_keys(self, *, training: dict[str, Any] | None = None, runs: Path | None = None, **keys: Any) -> Experiment:
        """The case's experiment with other keys of its algorithm and its training."""
        task, model, kernel = (PROBLEMS | OTHER_MODALITIES)[self._problem]
        content = {
            "name": "contract",
            "task": {**task, "data": str(self._places[task["family"]])} if task["family"] in self._places else task,
            "model": model,
            "algorithm": {"name": self.name, **self.entry.required, **self._variant, **keys},
            "training": {
                "steps": 1,
                "backend": "local",
                "dtype": "float64",
                "meta_batch_size": TASKS,
                "kernel": kernel,
                **(training or {}),
            },
            "evaluation": {"validation_episodes": 2},
            "tracking": {"runs": str(runs or "runs")},
        }
        return experiments.from_dict(content, source="contract")


def build(experiment: Experiment) -> Components:
    return experiments.build(experiment, device=torch.device("cpu"))


def sample(parts: Components, tasks: int = TASKS) -> TaskBatch:
    return parts.family.sample("meta_train", 0, torch.arange(tasks), seed=1)


def observed(case: Case) -> MetaState:
    """The case's state with the running statistics of one step."""
    return MetaState(case.state.params, case.algorithm.update_buffers({}, case.gradient.statistics))


def card(case: Case) -> ModelCard:
    family = case.parts.family
    return card_of(
        case.experiment,
        objective=family.objective.name,
        input_shape=family.input_shape,
        num_outputs=family.num_outputs,
        preprocessing=getattr(family, "preprocessing", None) if family.inputs != "images" else None,
        data_digest="x",
        checkpoint={},
    )


def raw(case: Case) -> tuple[Any, Any]:
    """The first task's examples as a user has them: support and query."""
    family, slots = case.parts.family, torch.arange(1)
    if isinstance(family, TextTasks):
        return family.sentences("meta_train", 0, slots, seed=1)[0]
    assert isinstance(family, TabularTasks)
    support, query = family.rows("meta_train", 0, slots, seed=1)
    return support[0].numpy(), query[0].numpy()
