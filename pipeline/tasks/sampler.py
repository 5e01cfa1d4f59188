"""(seed, split, step, slot) -> class and example indices: pure and vectorized over slots.

With weights of the classes it is a function of these too. No state, no global random numbers, no worker number: any
worker can draw any slot, so any number of workers sees the same global batch, and the data position of a resumed run is
just its step.

Shapes: T slots · W n_way · K k_shot · Q n_query (per class) · C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import keys
from pipeline.types import SPLITS, Split

_CLASSES, _EXAMPLES, _TURNS, _ARRIVALS = 0, 1, 2, 3  # streams of one episode's key


class EpisodeIndices(NamedTuple):
    """One episode a row. A class's position along W is its label, so labels are shuffled with the classes."""

    classes: Tensor  # int64 [T, W], without repetition
    support: Tensor  # int64 [T, W, K], example numbers within the class
    query: Tensor  # int64 [T, W, Q], disjoint from the support's
    turns: Tensor  # int64 [T, W], quarter turns drawn per class and task (zeros where not asked for)
    keys: Tensor  # int64 [T], the episodes' own, for whatever else is drawn for them


def draw_without_replacement(u: Tensor, population: Tensor | int) -> Tensor:
    """Uniforms [..., k] -> int64 [..., k]: an ordered uniform sample without repetition from range(population).

    `population` broadcasts against [...]. The i-th draw picks the r_i-th number not yet taken: r is the Lehmer code of
    the sample. From the last draw back to the first, those drawn later count up over the number that is taken.
    """
    k = u.shape[-1]
    if isinstance(population, int):
        left = torch.arange(population, population - k, -1, device=u.device)
    else:
        left = population.unsqueeze(-1) - torch.arange(k, device=u.device)
    picked = keys.below(u, left).movedim(-1, 0).contiguous()  # [k, ...]
    for i in reversed(range(k - 1)):
        later = picked[i + 1 :]
        later += later >= picked[i]
    return picked.movedim(0, -1)


def draw_weighted(u: Tensor, weights: Tensor, k: int) -> Tensor:
    """Uniforms [..., C] and weights [C] -> int64 [..., k]: one after the other, in proportion to the weights left.

    The first k arrivals of C exponential clocks with these rates (Efraimidis, Spirakis 2006, "Weighted random sampling
    with a reservoir"); the logarithms of the times are the keys of Gumbel top-k.
    """
    times = u.log().neg_().div_(weights)
    return times.topk(k, dim=-1, largest=False, sorted=True).indices


def sample_indices(
    *,
    seed: int,
    split: Split,
    step: int | Tensor,
    slots: Tensor,
    class_counts: Tensor,
    n_way: int,
    k_shot: int,
    n_query: int,
    turn_classes: bool = False,
    class_weights: Tensor | None = None,
    candidates: Tensor | None = None,
) -> EpisodeIndices:
    """Draw the episodes of `slots` (int64 [T]) from classes with `class_counts` (int64 [C]) examples each.

    Classes are uniform, whatever their sizes, or drawn with `class_weights` (float64 [C], all above zero).
    `candidates` (int64 [..., N], broadcast against the episodes) are the only classes to draw from. The caller has
    checked that there are `n_way` classes and that each has at least `k_shot + n_query` examples. With steps [B, 1]
    all that is returned has an axis B in front of T. `turn_classes` draws a number of quarter turns per class and task.
    """
    episode = keys.of_episodes(seed, SPLITS.index(split), step, slots)  # [T]
    classes = draw_classes(episode, class_counts, n_way, class_weights, candidates)
    examples = draw_without_replacement(
        keys.uniform(example_keys(episode, n_way), k_shot + n_query), class_counts[classes]
    )
    turns = draw_turns(episode, n_way) if turn_classes else torch.zeros_like(classes)
    return EpisodeIndices(classes, examples[..., :k_shot], examples[..., k_shot:], turns, episode)


def draw_classes(
    episode: Tensor,
    class_counts: Tensor,
    n_way: int,
    class_weights: Tensor | None,
    candidates: Tensor | None = None,
) -> Tensor:
    """The classes int64 [T, W] of episodes by their keys [T], as `sample_indices` has them."""
    class_uniforms = keys.uniform(keys.fold(episode, _CLASSES), n_way)
    population = len(class_counts) if candidates is None else candidates.shape[-1]
    if class_weights is None:
        classes = draw_without_replacement(class_uniforms, population)
    else:
        arrivals = keys.uniform(keys.fold(episode, _ARRIVALS), population)
        classes = draw_weighted(arrivals, class_weights if candidates is None else class_weights[candidates], n_way)
        order = draw_without_replacement(class_uniforms, n_way)  # or the first labels would have the hardest classes
        classes = classes.gather(-1, order)
    if candidates is None:
        return classes
    return candidates.expand(*classes.shape[:-1], population).gather(-1, classes)


def example_keys(episode: Tensor, n_way: int) -> Tensor:
    """By which the examples of each of an episode's classes are drawn: [T] -> [T, W]."""
    positions = torch.arange(n_way, device=episode.device)
    return keys.fold(keys.fold(episode, _EXAMPLES).unsqueeze(-1), positions)


def draw_turns(episode: Tensor, n_way: int) -> Tensor:
    """Quarter turns int64 [T, W] of the classes of episodes by their keys [T]."""
    return keys.below(keys.uniform(keys.fold(episode, _TURNS), n_way), 4)
