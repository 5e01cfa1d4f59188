"""The contracts between the rooms: task families, task-batched models and algorithms.

Shapes: T tasks · S support examples (n_way·k_shot) · Q query examples (n_way·n_query) · N either of them.
Everything carries a leading task axis T. Tasks are independent, so the gradient of a sum over tasks is each
task's own gradient; that is why `loss` returns one number per task and never their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]
"""Named parameters; `[...]` per leaf as meta-parameters, `[T, ...]` per leaf once adapted."""

Statistics = dict[str, Tensor]
"""Named normalization statistics, `[T, channels]` per leaf (running ones: `[channels]` or `[steps, channels]`)."""

Split = Literal["meta_train", "meta_val", "meta_test"]
SPLITS: tuple[Split, ...] = ("meta_train", "meta_val", "meta_test")

Inputs = Literal["images", "vectors", "tokens"]
"""What a network takes: numbers [C, H, W] in 0…1, numbers of any shape, or token numbers (int64 [L], 0: no token)."""

Normalization = Literal["transductive", "inductive"]
"""How a query set is normalized: by its own batch statistics (transductive: queries see each other, as the
papers report), or by statistics that do not depend on it (inductive: one answer never depends on another)."""


class TaskBatch(NamedTuple):
    """Episodes, stacked over tasks. A pytree."""

    support_x: Tensor  # [T, S, ...], in which classes may differ in shots
    support_y: Tensor  # [T, S] class labels, or [T, S, D] regression targets
    query_x: Tensor  # [T, Q, ...]
    query_y: Tensor  # [T, Q] or [T, Q, D]
    keys: Tensor | None = None  # int64 [T], of (seed, split, step, slot): what training draws at random comes from them
    classes: Tensor | None = None  # int64 [T, n_way]: which of the split's classes an episode's labels stand for

    @property
    def num_classes(self) -> int | None:
        """n_way of these episodes; None where there are no classes."""
        return None if self.classes is None else self.classes.shape[1]

    def tasks(self, which: slice | Tensor) -> TaskBatch:
        """The tasks at some positions."""
        return TaskBatch(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]


class Objective(Protocol):
    """The loss and the score of a kind of task."""

    name: str
    score_name: str  # "accuracy" or "mse"
    higher_is_better: bool

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[T, N, num_outputs], targets -> [T, N]: each example's loss."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[T, N, num_outputs], targets -> [T]: each task's mean loss over its N examples."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[T, N, num_outputs], targets -> [T]: each task's mean score over its N examples."""
        ...

    def answers(self, outputs: Tensor) -> Tensor:
        """Outputs as a user wants them: class probabilities, or predicted values."""
        ...


class ClassWeighting(Protocol):
    """How often meta-training draws each class: pure functions of a state that training keeps and checkpoints.

    Shapes: C classes that meta-training draws from.
    """

    def start(self) -> Statistics:
        """The state before the first outer step."""
        ...

    def weights(self, state: Statistics, step: int, *, completed: int) -> Tensor | None:
        """[C] for outer step `step`, `completed` or the one after it, by the state after `completed` steps.

        None: uniform.
        """
        ...

    def after_step(self, state: Statistics, observed: Statistics, finite: Tensor) -> Statistics:
        """The state after one more outer step. observed: `MetaGradient.classes`, over all ranks, up to a factor.

        finite (bool, scalar): whether what was observed counts.
        """
        ...

    def describe(self, state: Statistics) -> dict[str, float]:
        """For the metrics of a validation."""
        ...


class TaskFamily(Protocol):
    """Where episodes come from, and the objective that fits them."""

    objective: Objective
    inputs: Inputs
    input_shape: tuple[int, ...]  # of one example, e.g. (C, H, W)
    num_outputs: int  # n_way of meta-training, or the dimension of the regression target
    train_classes: int | None  # that meta-training draws from; None where there are no classes
    description: dict[str, Any]  # of its evaluation episodes, for results
    weighting: ClassWeighting | None  # of meta-training's classes; None: they are uniform
    prefetch: bool  # True if sampling waits for a disk, so that the loop should sample one step ahead
    variable_shapes: bool  # whether meta-training's episodes have other shapes from outer step to outer step
    sets: tuple[
        str, ...
    ]  # data sets that evaluation takes in turn, slot i from sets[i % len(sets)]; () where it is one

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        """The episodes of `slots` (int64 [T]): a pure function of (seed, split, step, slot, weights).

        weights: float64 [train_classes], how often a class is drawn relative to the others, in meta-training and where
        there are classes; None: equally often. Slots lie on the CPU, with weights on the family's device.
        In meta-training the episodes of a step have one shape; elsewhere those have that `alike` puts together.
        """
        ...

    def alike(self, split: Split, slots: Tensor) -> list[Tensor]:
        """Slots of one step of a part (int64, on the CPU) in groups of one shape each, which `sample` takes at once."""
        ...

    def largest(self, tasks: int, *, seed: int) -> TaskBatch:
        """Episodes of the largest shape that meta-training has: what memory must hold."""
        ...


class TaskModel(Protocol):
    """A network whose parameters and inputs carry a leading task axis: a body that makes features, a linear head."""

    parameter_names: list[str]  # without "/", which begins the names of what algorithms learn besides
    constant_names: list[str]  # what `init` gives besides and nothing learns: statistics of pretrained weights
    head: tuple[str, str]  # the names of the head's weight [T, num_outputs, F] and bias [T, num_outputs]
    norm_layers: list[str]  # batch normalizations: NAME.weight and NAME.bias among the parameters
    cpu_task_chunk: int | None  # tasks at once that are fastest on CPU, as measured; None: as many as there are
    kernel: str  # what it computes with, and how precisely: see `pipeline.kernels`
    precision: str
    stochastic: bool  # whether passes that are given keys draw random numbers (dropout)

    def init(self, seed: int) -> Params:
        """Fresh meta-parameters (no task axis), a pure function of `seed`."""
        ...

    def prepare(self, x: Tensor) -> Any:
        """x [T, N, ...] made ready for several passes over it: what `apply` takes in its place."""
        ...

    def apply(
        self,
        params: Params,
        x: Any,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """Parameters [T, ...] and x [T, N, ...] -> outputs [T, N, num_outputs] and normalization statistics.

        With `statistics` None each task is normalized by the batch statistics of its own `x`; otherwise by the
        given ones. `observe` returns the batch statistics of this pass (differentiable); else the dict is empty.
        `low_precision` permits activations in bfloat16 where the model was built for it.
        `keys` (int64 [T]) are a training pass's own: the same keys, the same random numbers. None: nothing is random.
        """
        ...

    def features(
        self,
        params: Params,
        x: Any,
        *,
        statistics: Statistics | None = None,
        observe: bool = False,
        low_precision: bool = False,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Statistics]:
        """What the head gets, [T, N, F]; otherwise as `apply`."""
        ...


class MetaState(NamedTuple):
    """What meta-learning learns: parameters by gradient, buffers (running statistics, a carried state) without one."""

    params: Params
    buffers: Statistics


class Adapted(NamedTuple):
    """Parameters adapted to T support sets, and the statistics for inductive prediction (None: not asked for)."""

    params: Params
    statistics: Statistics | None


class MetaGradient(NamedTuple):
    """Sums over the tasks of a batch, so that ranks and chunks of any size add up to the same mean."""

    grads: Params
    metrics: dict[str, Tensor]  # scalars
    statistics: Statistics  # observed, for the running buffers; empty where none are kept
    classes: Statistics = {}  # noqa: RUF012 - a tuple's default, which nobody changes
    # `loss` and `count` [train_classes]: over the tasks that hold a class, the sum of its mean query losses and how
    # many tasks these are; empty where `watch_classes` was not called


class Algorithm(Protocol):
    """Pure functions over parameter pytrees: no collectives, no global random numbers.

    `meta_grad` and not `meta_loss`, because Reptile and iMAML have no loss to differentiate.
    """

    train_steps: int  # adaptation steps in training
    eval_steps: int  # adaptation steps in evaluation and serving
    any_way: bool  # whether an episode may have more classes than the model has outputs

    def describe(self, state: MetaState) -> dict[str, float]:
        """What was learned besides the network's parameters (rates, λ), by name, for the metrics of a validation."""
        ...

    def curves(self, state: MetaState, batch: TaskBatch) -> dict[str, Tensor]:
        """What an evaluation of episodes shows besides their scores, by name ("accuracy_by_instance"): [T, points].

        A point is for 1, 2, … of what the name says. Mostly empty.
        """
        ...

    def init(self, seed: int) -> MetaState: ...

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        """The adapted learner after 0, 1, … `steps` adaptation steps, without a graph.

        `inductive` also computes the statistics that inductive prediction needs. `num_classes` of the
        episodes, where it is below the number of outputs, leaves the unused ones out of the support loss; an algorithm
        of `any_way` has that many outputs instead (None: as many as the model). Classes may differ in examples.
        `last_only` yields the learner after the last step alone, and computes nothing for the others.
        """
        ...

    def predict(self, adapted: Adapted, query_x: Tensor, normalization: Normalization) -> Tensor:
        """Query inputs [T, Q, ...] -> outputs [T, Q, num_outputs] (logits, or regression values)."""
        ...

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        """The meta-gradient of the batch's tasks, summed over them. `step` drives annealing."""
        ...

    def update_buffers(self, buffers: Statistics, observed: Statistics) -> Statistics:
        """New buffers from the global mean of the observed statistics (empty in, empty out)."""
        ...
