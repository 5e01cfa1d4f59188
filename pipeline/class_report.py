"""Which classes and groups of classes are hard, and which are taken for each other, from one evaluation's answers.

Numbers. An accuracy is the share of right answers among a class's (a group's) queries in all episodes that hold it.
Queries of one episode share an adapted learner, so they are no independent draws: intervals are clustered by episode.
With x_e right answers among n_e queries in episode e, r = Σx/Σn has the variance E/(E−1) · Σ(x_e − r·n_e)² / (Σn)²
(the ratio estimator), over the E episodes that hold the class; the half-width is Student's t with E − 1 degrees of
freedom. One episode gives no interval, and classes that are always right an empty one.

A confusion is counted against its opportunities: a query of class a in an episode that also holds class b could have
been answered b. The rate of groups g and h is over all such pairs of a class of g and another one of h, so it does not
depend on how many classes a group has: a group that is often confused with another resembles it.

Classes, and pairs of them even more so, meet in few episodes. So all are ranked by a share that is drawn towards the
mean of all, (x + m·mean)/(n + m), with m the queries that one more episode would add. The hardest of many classes is
partly hard by chance all the same.

Shapes: E episodes · W n_way · Q queries of an episode · C classes · G groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from pipeline import class_pictures
from pipeline.errors import ConfigError
from pipeline.tasks.classes import ClassTasks
from pipeline.tasks.images import ImageTasks
from pipeline.tasks.mixture import MixtureTasks, families_of
from pipeline.training.evaluate import MODES, Evaluation
from pipeline.types import Normalization, TaskFamily

PAIRS_SHOWN = 10
EXAMPLES_SHOWN = 5  # of a class
PAIRS_LISTED = 100
REPORT = "classes.json"


class Shares(NamedTuple):
    """Of several units (classes, groups, pairs of groups): hits among chances, and the 95 % half-widths."""

    hits: np.ndarray
    chances: np.ndarray
    share: np.ndarray  # NaN where there was no chance
    half_width: np.ndarray  # NaN with fewer than two episodes
    episodes: np.ndarray


def clustered(unit: np.ndarray, episode: np.ndarray, hits: np.ndarray, chances: np.ndarray, units: int) -> Shares:
    """Hits among chances, counted in rows of (unit, episode), with intervals over episodes (see above)."""
    cell, inverse = np.unique(unit.astype(np.int64) * (int(episode.max(initial=0)) + 1) + episode, return_inverse=True)
    of_cell = cell // (int(episode.max(initial=0)) + 1)
    x, n = np.bincount(inverse, hits, len(cell)), np.bincount(inverse, chances, len(cell))
    held = n > 0
    of_cell, x, n = of_cell[held], x[held], n[held]
    total_x, total_n = np.bincount(of_cell, x, units), np.bincount(of_cell, n, units)
    episodes = np.bincount(of_cell, minlength=units)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = total_x / total_n
        squares = np.bincount(of_cell, (x - share[of_cell] * n) ** 2, units)
        error = np.sqrt(episodes / (episodes - 1) * squares) / total_n
        half_width = np.where(episodes > 1, stats.t.ppf(0.975, np.maximum(episodes - 1, 1)) * error, np.nan)
    return Shares(total_x, total_n, share, half_width, episodes)


def drawn_to_mean(hits: np.ndarray, chances: np.ndarray, more: float) -> np.ndarray:
    """Shares as if each unit had `more` chances at the mean of all: what rare ones are ranked by."""
    return (hits + more * hits.sum() / chances.sum()) / (chances + more)


class ClassReport(NamedTuple):
    """Of one evaluation, in one normalization mode."""

    mode: Normalization
    names: list[str]  # C
    groups: list[str]  # G
    group_of: np.ndarray  # [C]
    of_class: Shares  # [C]
    of_group: Shares  # [G]
    relation: Shares  # [G·G], row by row: queries of a group's class answered by another class of the column's group
    pairs: list[dict[str, Any]]  # the most confused ones first
    queries: float  # of a class in an episode

    def hardest_classes(self) -> list[int]:
        """Classes that were met, hardest first."""
        return self._hardest(self.of_class)

    def hardest_groups(self) -> list[int]:
        return self._hardest(self.of_group)

    def _hardest(self, shares: Shares) -> list[int]:
        order = np.argsort(drawn_to_mean(shares.hits, shares.chances, self.queries), kind="stable")
        return order[shares.episodes[order] > 0].tolist()

    def to_dict(self) -> dict[str, Any]:
        def row(shares: Shares, i: int) -> dict[str, Any]:
            return {
                "accuracy": _number(shares.share[i]),
                "ci95": _number(shares.half_width[i]),
                "queries": int(shares.chances[i]),
                "episodes": int(shares.episodes[i]),
            }

        size = len(self.groups)
        relation: dict[str, Any] = {
            key: [[_number(v) for v in line] for line in getattr(self.relation, part).reshape(size, size)]
            for key, part in (("rate", "share"), ("ci95", "half_width"), ("opportunities", "chances"))
        }
        return {
            "classes": [
                {"name": self.names[c], "group": self.groups[self.group_of[c]], **row(self.of_class, c)}
                for c in self.hardest_classes()
            ],
            "groups": [{"name": self.groups[g], **row(self.of_group, g)} for g in self.hardest_groups()],
            "pairs": self.pairs,
            "group_confusion": {"groups": self.groups, **relation},
        }


def report(evaluation: Evaluation, family: ClassTasks, mode: Normalization) -> ClassReport:
    """What the evaluation's predictions (see `evaluate`) say about its classes."""
    predictions = evaluation.predictions
    assert predictions is not None
    entries = family.entries(evaluation.split)
    groups = sorted({entry.group for entry in entries})
    group_of = np.array([groups.index(entry.group) for entry in entries])
    classes = predictions.classes.numpy().astype(np.int64)
    held = classes >= 0
    classes = classes % len(entries)  # of meta-training, perhaps, turned ones
    labels = predictions.labels.numpy().astype(np.int64)
    answers = predictions.answers[:, MODES.index(mode)].numpy().astype(np.int64)  # [E, Q]
    episodes, n_way = classes.shape
    counts = np.zeros((episodes, n_way, n_way + 1), dtype=np.int64)  # queries of a label, by their answers; -1: none
    of_episode, query = np.nonzero(labels >= 0)
    np.add.at(counts, (of_episode, labels[of_episode, query], answers[of_episode, query]), 1)
    asked = counts.sum(axis=2)
    counts = counts[..., :n_way]
    right = np.diagonal(counts, axis1=1, axis2=2)
    episode = np.broadcast_to(np.arange(episodes)[:, None], classes.shape)

    def shares(units: np.ndarray, number: int) -> Shares:
        return clustered(units[classes].ravel(), episode.ravel(), right.ravel(), asked.ravel(), number)

    both = held[:, :, None] & held[:, None, :]
    e, true, given = np.nonzero(both & ~np.eye(n_way, dtype=bool))
    a, b, confused, chances = classes[e, true], classes[e, given], counts[e, true, given], asked[e, true]
    return ClassReport(
        mode,
        [entry.name for entry in entries],
        groups,
        group_of,
        of_class=shares(np.arange(len(entries)), len(entries)),
        of_group=shares(group_of, len(groups)),
        relation=clustered(group_of[a] * len(groups) + group_of[b], e, confused, chances, len(groups) ** 2),
        pairs=_pairs(a, b, confused, chances, [entry.name for entry in entries]),
        queries=float(asked[held].mean()),
    )


def _pairs(a: np.ndarray, b: np.ndarray, confused: np.ndarray, chances: np.ndarray, names: list[str]) -> list[Any]:
    """Unordered pairs of classes with a confusion, most confused first."""
    pair, inverse = np.unique(np.minimum(a, b) * len(names) + np.maximum(a, b), return_inverse=True)
    x, n = np.bincount(inverse, confused), np.bincount(inverse, chances)
    first_taken = np.bincount(inverse, np.where(a < b, confused, 0))
    ranked = drawn_to_mean(x, n, 2 * chances.mean())
    order = [i for i in np.argsort(-ranked, kind="stable").tolist()[:PAIRS_LISTED] if x[i]]
    return [
        {
            "classes": [names[pair[i] // len(names)], names[pair[i] % len(names)]],
            "confused": [int(first_taken[i]), int(x[i] - first_taken[i])],  # the first taken for the second; vice versa
            "queries": int(n[i]),
            "rate": float(x[i] / n[i]),
            "ranked_by": float(ranked[i]),
        }
        for i in order
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def check(family: TaskFamily) -> None:
    """Raises ConfigError: these tasks, those of a mixture's data sets, have no classes to report on."""
    if not any(isinstance(one, ClassTasks) for one in families_of(family)):
        raise ConfigError("--report: is about classes, and these tasks have none. Leave it out.")


def write(evaluation: Evaluation, family: ClassTasks, folder: Path, *, mode: Normalization) -> ClassReport:
    """classes.json with both modes; pictures of `mode`: classes.png, groups.png, and confusions.png of images."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = {each: report(evaluation, family, each) for each in MODES}
    content: dict[str, Any] = {
        "split": evaluation.split,
        "task": evaluation.task,
        "episodes": evaluation.episodes,
        "episode_seed": evaluation.seed,
        "data_digest": evaluation.data_digest,
        "interval": "95 %, clustered by episode: ratio estimator, Student's t over the episodes that hold the class",
        "rate": "confusions among the queries of one class in episodes that hold the other as well",
        "pictures": mode,
    }
    content |= {each: one.to_dict() for each, one in reports.items()}
    (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n")
    ours = reports[mode]
    number = {name: c for c, name in enumerate(ours.names)}
    shown = ours.pairs[:PAIRS_SHOWN]
    wanted = [number[name] for pair in shown for name in pair["classes"]]
    class_pictures.hard_classes(ours, folder / "classes.png")
    if isinstance(family, ImageTasks):
        images = family.examples(evaluation.split, wanted, EXAMPLES_SHOWN)
        class_pictures.confusions(shown, images, folder / "confusions.png")
    class_pictures.group_confusions(ours, folder / "groups.png")
    return ours


def by_set(evaluation: Evaluation, family: TaskFamily, folder: Path) -> Iterator[tuple[str, Evaluation, Any, Path]]:
    """Of a mixture each data set's name, episodes, family and folder, sets/NAME; else "" and what was given."""
    if not isinstance(family, MixtureTasks):
        yield "", evaluation, family, folder
        return
    for (name, own), of_set in zip(evaluation.of_sets().items(), family.families, strict=False):
        place = folder / "sets" / name
        place.mkdir(parents=True, exist_ok=True)
        yield name, own, of_set, place


def metrics(ours: ClassReport, of_set: str = "") -> dict[str, float]:
    """The few numbers that compare runs. of_set: the data set's name, in a mixture."""
    hardest, group = ours.hardest_classes()[0], ours.hardest_groups()[0]
    test = f"test_{of_set}" if of_set else "test"
    return {
        f"{test}_hardest_class_accuracy_{ours.mode}": float(ours.of_class.share[hardest]),
        f"{test}_hardest_group_accuracy_{ours.mode}": float(ours.of_group.share[group]),
    }


def tags(ours: ClassReport, of_set: str = "") -> dict[str, str]:
    """Their names."""
    hardest, group = ours.hardest_classes()[0], ours.hardest_groups()[0]
    named = {"class": ours.names[hardest], "group": ours.groups[group]}
    if ours.pairs:
        named["pair"] = " | ".join(ours.pairs[0]["classes"])
    kind = f"hardest.{of_set}" if of_set else "hardest"
    return {f"{kind}.{of}": name for of, name in named.items()}
