"""Fixed episodes -> mean and 95 % interval, inductive and transductive side by side, after 0…k adaptation steps.

Every model that is compared meets the same episodes: slot i of step 0 under the evaluation's own seed. One model
is evaluated, never an ensemble and never the best of several.

Shapes: E episodes · M normalization modes · K + 1 adaptation steps, step 0 being the meta-initialization itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.ahead import results
from pipeline.training.context import Context, LocalContext
from pipeline.types import Algorithm, MetaState, Normalization, Split, TaskBatch, TaskFamily

MODES: tuple[Normalization, ...] = ("inductive", "transductive")
EPISODES_AT_ONCE = 32
Z_95 = 1.959963984540054

# Seeds of the fixed episode sets. Each set is used for one thing only.
SELECTION_SEED = 1_000_001  # validation during training: checkpoint selection, plateaus, sweeps
PROMOTION_SEED = 2_000_003  # candidate against champion
TEST_SEED = 3_000_017  # reported results
FRESH_SEED = 4_000_037  # the best trial of a sweep, chosen on the selection episodes


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95 % confidence interval (normal, 1.96·s/√E)."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """values [E]; needs two at least for an interval (one gives an infinite one)."""
        values = values.to(torch.float64)
        spread = float(values.std(correction=1)) if len(values) > 1 else math.inf
        return cls(float(values.mean()), Z_95 * spread / math.sqrt(len(values)))


class Predictions(NamedTuple):
    """What each query was answered after the last adaptation step. int32, on the CPU: a few bytes an answer.

    Where episodes differ in shape, -1 stands for the classes and queries that an episode does not have, and -1 is the
    answer of outputs that are NaN.
    """

    classes: Tensor  # [E, n_way], which of the split's classes a label stands for
    labels: Tensor  # [E, Q], right ones
    answers: Tensor  # [E, M, Q], labels


@dataclass(frozen=True)
class Evaluation:
    """Scores [E, M, K + 1] and losses of the same shape, on the episodes of (seed, split).

    NaN before the last step where an episode's queries were scored after the last step alone: see `curve_episodes`.
    """

    scores: Tensor
    losses: Tensor
    score_name: str
    split: Split
    seed: int
    data_digest: str
    task: dict[str, Any]  # the family's description: class split, n_way, k_shot, n_query
    predictions: Predictions | None = None  # where they were kept
    curve_episodes: int | None = None  # the first so many are scored after every step, the others after the last alone
    sets: tuple[str, ...] = ()  # data sets whose episodes these are in turn; () where it is one

    @property
    def episodes(self) -> int:
        return self.scores.shape[0]

    @property
    def adaptation_steps(self) -> int:
        return self.scores.shape[2] - 1

    def final_scores(self, mode: Normalization) -> Tensor:
        """[E]: each episode's score after the last adaptation step."""
        return self.scores[:, MODES.index(mode), -1]

    def score(self, mode: Normalization, step: int = -1) -> Estimate:
        return Estimate.of(self._scored(self.scores[:, MODES.index(mode)], step))

    def loss(self, mode: Normalization, step: int = -1) -> Estimate:
        return Estimate.of(self._scored(self.losses[:, MODES.index(mode)], step))

    def _scored(self, values: Tensor, step: int) -> Tensor:
        """Values [E, K + 1] -> those after `step` of the episodes that were scored there."""
        is_last = step in (-1, values.shape[1] - 1)
        return values[:, step] if is_last else values[: self.curve_episodes, step]

    def of_sets(self) -> dict[str, Evaluation]:
        """Of each data set's episodes; empty where it is one."""
        count = len(self.sets)
        first = self.curve_episodes
        return {
            name: replace(
                self,
                scores=self.scores[number::count],
                losses=self.losses[number::count],
                task=self.task.get("sets", {}).get(name, self.task),
                predictions=self.predictions and Predictions(*(part[number::count] for part in self.predictions)),
                curve_episodes=None if first is None else len(range(number, first, count)),
                sets=(),
            )
            for number, name in enumerate(self.sets[: self.episodes])
        }

    def to_dict(self) -> dict[str, Any]:
        """The result with all that is needed to get it again; None for what is not finite, which JSON has not."""
        on_fewer = {} if self.curve_episodes is None else {"episodes_before_the_last_step": self.curve_episodes}
        return {
            "split": self.split,
            "task": self.task,
            "episodes": self.episodes,
            **on_fewer,
            "episode_seed": self.seed,
            "data_digest": self.data_digest,
            "score": self.score_name,
            "interval": "95 % over episodes, 1.96·s/√n",
            **{
                mode: [
                    {
                        "adaptation_step": k,
                        "mean": _number(e.mean),
                        "ci95": _number(e.half_width),
                        "loss": _number(self.loss(mode, k).mean),
                    }
                    for k in range(self.adaptation_steps + 1)
                    for e in [self.score(mode, k)]
                ]
                for mode in MODES
            },
            **({"sets": {name: each.to_dict() for name, each in self.of_sets().items()}} if self.sets else {}),
        }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def paired(candidate: Tensor, champion: Tensor) -> Estimate:
    """The mean difference candidate − champion over the same episodes ([E] each), with its interval."""
    return Estimate.of(candidate.to(torch.float64) - champion.to(torch.float64))


def episode_batches(
    family: TaskFamily, split: Split, slots: Tensor, *, seed: int, chunk: int | None
) -> Iterator[tuple[Tensor, TaskBatch]]:
    """Slots and their episodes of step 0, of one shape and at most `chunk` (None: 32) at a time.

    Where drawing waits for a disk, the next ones are drawn while these are used.
    """
    groups = [alike for some in slots.split(chunk or EPISODES_AT_ONCE) for alike in family.alike(split, some)]
    draws = [partial(family.sample, split, 0, alike, seed=seed) for alike in groups]
    with closing(results(draws, ahead=family.prefetch)) as batches:
        yield from zip(groups, batches, strict=True)


def evaluate(
    algorithm: Algorithm,
    family: TaskFamily,
    state: MetaState,
    *,
    split: Split,
    seed: int,
    episodes: int,
    data_digest: str,
    chunk: int | None,
    steps: int | None = None,
    curve_episodes: int | None = None,
    last_only: bool = False,
    keep_predictions: bool = False,
    context: Context | None = None,
) -> Evaluation:
    """Evaluate on `episodes` fixed episodes, shared among the context's ranks; every rank gets the whole result.

    steps: adaptation steps, by default the algorithm's own for evaluation. chunk: episodes adapted at once (None: 32);
    half as many from where a GPU's memory does not hold them.
    curve_episodes: score the queries of the first so many episodes after every step, of the others after the last step
    alone: with tens of steps that takes longer than adapting. None: of all after every step.
    last_only: score the queries after the last adaptation step alone, [E, M, 1]: validation needs no more.
    keep_predictions: keep what was answered, where tasks have classes; in one process.
    """
    context = context or LocalContext()
    assert not keep_predictions or context.world_size == 1, "predictions are kept by one process"
    kept: list[tuple[Tensor, Predictions]] = []
    steps = algorithm.eval_steps if steps is None else steps
    # float64 and zeros for the other ranks' rows: the sum over ranks is then exact, whatever the number of ranks
    scored = 1 if last_only else steps + 1
    results = torch.zeros(2, episodes, len(MODES), scored, dtype=torch.float64, device=context.device)
    if last_only or (curve_episodes is not None and curve_episodes >= episodes):
        curve_episodes = None

    def score(slots: Tensor, batch: TaskBatch) -> None:
        at_the_end = last_only or (curve_episodes is not None and int(slots[0]) >= curve_episodes)
        rows = slots.to(context.device)
        classes = batch.num_classes
        path = algorithm.adaptation_path(
            state,
            batch.support_x,
            batch.support_y,
            steps=steps,
            inductive=True,
            num_classes=classes,
            last_only=at_the_end,
        )
        answers = []
        for step, adapted in enumerate(path, start=scored - 1 if at_the_end else 0):
            with torch.no_grad():
                for m, mode in enumerate(MODES):
                    outputs = algorithm.predict(adapted, batch.query_x, mode)[..., :classes]
                    results[0, rows, m, step] = family.objective.score(outputs, batch.query_y).to(torch.float64)
                    results[1, rows, m, step] = family.objective.loss(outputs, batch.query_y).to(torch.float64)
                    if keep_predictions and step == scored - 1:
                        answers.append(outputs.argmax(dim=-1).masked_fill_(outputs.isnan().any(dim=-1), -1))
        if keep_predictions and batch.classes is not None:
            told = (batch.classes, batch.query_y, torch.stack(answers, dim=1))
            kept.append((slots, Predictions(*(part.to("cpu", torch.int32) for part in told))))

    mine = torch.arange(episodes)[context.rank :: context.world_size]
    left, at_once = mine, chunk or EPISODES_AT_ONCE
    while len(left):
        done = [left[:0]]
        try:
            for slots, batch in episode_batches(family, split, left, seed=seed, chunk=at_once):
                score(slots, batch)
                done.append(slots)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once = max(min(at_once, len(left)) // 2, 1)
        left = left[~torch.isin(left, torch.cat(done))]
    if context.world_size > 1:
        context.all_reduce(results)
    if curve_episodes is not None:
        results[:, curve_episodes:, :, :-1] = math.nan
    scores, losses = results.cpu()
    predictions = _in_one(kept, episodes) if kept else None
    task = family.description
    name = family.objective.score_name
    return Evaluation(scores, losses, name, split, seed, data_digest, task, predictions, curve_episodes, family.sets)


def _in_one(kept: list[tuple[Tensor, Predictions]], episodes: int) -> Predictions:
    """Predictions of some slots each -> of all episodes, in the order of their slots."""
    n_way = max(predictions.classes.shape[1] for _, predictions in kept)
    queries = max(predictions.labels.shape[1] for _, predictions in kept)
    shapes = ([n_way], [queries], [len(MODES), queries])
    whole = Predictions(*(torch.full((episodes, *shape), -1, dtype=torch.int32) for shape in shapes))
    for slots, predictions in kept:
        for target, part in zip(whole, predictions, strict=True):
            target[slots] = F.pad(part, (0, target.shape[-1] - part.shape[-1]), value=-1)
    return whole


def curves(
    algorithm: Algorithm,
    family: TaskFamily,
    state: MetaState,
    *,
    split: Split,
    seed: int,
    episodes: int,
    chunk: int | None,
) -> dict[str, list[Estimate]]:
    """What the algorithm shows of fixed episodes besides their scores, by name: an estimate for each of 1, 2, …"""
    pieces = []
    for _, batch in episode_batches(family, split, torch.arange(episodes), seed=seed, chunk=chunk):
        pieces.append(algorithm.curves(state, batch))
        if not pieces[0]:
            return {}
    values = {}
    for name in pieces[0]:
        points = min(piece[name].shape[1] for piece in pieces)  # episodes of several shapes may have more or fewer
        values[name] = torch.cat([piece[name][:, :points] for piece in pieces]).cpu()
    return {name: [Estimate.of(point) for point in of_episodes.unbind(1)] for name, of_episodes in values.items()}


def summarize(evaluation: Evaluation, prefix: str, modes: Sequence[Normalization] = MODES) -> dict[str, float]:
    """Flat metrics, e.g. `val_accuracy_inductive` and `val_accuracy_inductive_ci95`; of a mixture each set's too."""
    metrics = {}
    for mode in modes:
        estimate = evaluation.score(mode)
        metrics[f"{prefix}_{evaluation.score_name}_{mode}"] = estimate.mean
        metrics[f"{prefix}_{evaluation.score_name}_{mode}_ci95"] = estimate.half_width
        metrics[f"{prefix}_loss_{mode}"] = evaluation.loss(mode).mean
    for name, of_set in evaluation.of_sets().items():
        metrics |= summarize(of_set, f"{prefix}_{name}", modes)
    return metrics
