"""(seed, split, step, slot) -> class and example indices: pure and vectorized over slots.

No state, no global random numbers, no worker number: any worker can draw any slot, so any number of workers
sees the same global batch, and the data position of a resumed run is just its step.

Shapes: T slots · W n_way · K k_shot · Q n_query (per class) · C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import keys
from pipeline.types import SPLITS, Split

_CLASSES, _EXAMPLES, _TURNS = 0, 1, 2  # streams of one episode's key


class EpisodeIndices(NamedTuple):
    """One episode a row. A class's position along W is its label, so labels are shuffled with the classes."""

    classes: Tensor  # int64 [T, W], without repetition
    support: Tensor  # int64 [T, W, K], example numbers within the class
    query: Tensor  # int64 [T, W, Q], disjoint from the support's
    turns: Tensor  # int64 [T, W], quarter turns drawn per class and task (zeros where not asked for)


def draw_without_replacement(u: Tensor, population: Tensor | int) -> Tensor:
    """Uniforms [..., k] -> int64 [..., k]: an ordered uniform sample without repetition from range(population).

    `population` broadcasts against [...]. The i-th draw picks the r-th number not yet taken. With the taken ones
    sorted as c_1 < c_2 < …, c_m − (m − 1) free numbers lie below c_m, so the pick is r + #{m : c_m − (m − 1) ≤ r}.
    """
    k = u.shape[-1]
    ranks = torch.arange(k, device=u.device)
    if isinstance(population, int):
        population = torch.full((), population, device=u.device)
    picked = keys.below(u[..., :1], population.unsqueeze(-1))
    for i in range(1, k):
        rank = keys.below(u[..., i], population - i).unsqueeze(-1)
        taken = picked.sort(dim=-1).values
        pick = rank + (taken - ranks[:i] <= rank).sum(dim=-1, keepdim=True)
        picked = torch.cat([picked, pick], dim=-1)
    return picked


def sample_indices(
    *,
    seed: int,
    split: Split,
    step: int,
    slots: Tensor,
    class_counts: Tensor,
    n_way: int,
    k_shot: int,
    n_query: int,
    turn_classes: bool = False,
) -> EpisodeIndices:
    """Draw the episodes of `slots` (int64 [T]) from classes with `class_counts` (int64 [C]) examples each.

    Classes are uniform, whatever their sizes. The caller has checked that there are `n_way` classes and that each
    has at least `k_shot + n_query` examples. `turn_classes` draws a number of quarter turns per class and task.
    """
    episode = keys.fold(keys.make(seed, SPLITS.index(split), step, device=slots.device), slots)  # [T]
    class_uniforms = keys.uniform(keys.fold(episode, _CLASSES), n_way)
    classes = draw_without_replacement(class_uniforms, len(class_counts))
    positions = torch.arange(n_way, device=slots.device)
    per_class = keys.fold(keys.fold(episode, _EXAMPLES).unsqueeze(-1), positions)  # [T, W]
    examples = draw_without_replacement(keys.uniform(per_class, k_shot + n_query), class_counts[classes])
    if turn_classes:
        turns = keys.below(keys.uniform(keys.fold(episode, _TURNS), n_way), 4)
    else:
        turns = torch.zeros_like(classes)
    return EpisodeIndices(classes, examples[..., :k_shot], examples[..., k_shot:], turns)
