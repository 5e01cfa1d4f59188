"""Episodes whose shape varies: Meta-Dataset's numbers of classes and shots, which differ by class within an episode.

Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples", section 3.2
and its appendix on sampling. The paper draws one episode at a time. Here an outer step holds many, so what their
tensors' shapes depend on (n_way W, the size S of the whole support set, queries per class Q) is drawn once per step and
shared by its tasks; which classes, and how S is dealt out among them, is drawn per task. So tensors stay dense: no
padding, hence no masks, and normalization, losses and memory see real examples only.

    W ~ U{least_n_way … n_way}
    S = min(most_support, W · ⌈β · min(most_shots, m − Q)⌉),   β ~ U(0, 1],  m examples in the smallest class there is
    k_c = 1 + a share of S − W in proportion to exp(α_c) · |c|,   α_c ~ U[log ½, log 2),  |c| examples of class c

The paper has the episode's own classes in place of m. It takes the floor of each share and gives up what a small class
cannot hold; here what is left over goes to the other classes, so that the shots of an episode are exactly S, each class
has at least one, and k_c + Q ≤ |c|. Q is the configuration's n_query (the paper: 10, or half of the smallest class).

Shapes: T tasks · W n_way · S examples of a support set · Q queries of a class · N = S + W·Q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline import keys
from pipeline.config import Section
from pipeline.tasks.sampler import draw_classes, draw_turns, draw_without_replacement, example_keys
from pipeline.types import SPLITS, Split, TaskBatch

_SHAPES = 0x736861706573  # no small number: those are slots, and the streams of an episode's key
_SHOTS = 0x73686F7473
WEIGHT_BITS = 20  # of a class's weight: integers, so that their sums are the same on every device


class VariableConfig(Section):
    """Meta-training's classes and shots vary from outer step to outer step, and shots from class to class."""

    least_n_way: int = Field(default=5, ge=2)  # classes of an episode; the most are task.n_way
    most_shots: int = Field(default=100, ge=1)  # of a class, on average over the classes of an episode
    most_support: int = Field(default=500, ge=2)  # support examples of an episode
    imbalance: bool = True  # shots differ among the classes of an episode; false: all have as many
    evaluation: bool = False  # validation and test too, each episode with a shape of its own; false: fixed shapes

    def check(self, n_way: int, eval_n_way: int) -> None:
        """Raises ValueError: bounds that leave no episode, given task.n_way and task.eval_n_way."""
        least = min(n_way, eval_n_way) if self.evaluation else n_way
        if self.least_n_way > least:
            raise ValueError(f"variable.least_n_way ({self.least_n_way}) is more than n_way, the most ({least})")
        most = max(n_way, eval_n_way) if self.evaluation else n_way
        if self.most_support < most:
            raise ValueError(
                f"variable.most_support ({self.most_support}) is less than n_way ({most}): every class has one at least"
            )

    def shape(self, *, n_way: int, n_query: int, smallest: int, key: Tensor | None) -> Shape:
        """Drawn by a scalar key on the CPU; None: the largest there is.

        n_way: the most classes. smallest: examples of the smallest class, more than `n_query`.
        """
        u, beta = (1.0, 1.0) if key is None else keys.uniform(key, 2).tolist()
        ways = n_way if key is None else self.least_n_way + int(u * (n_way - self.least_n_way + 1))
        beta = 1.0 if key is None else 1.0 - beta  # of (0, 1]
        shots = math.ceil(beta * min(self.most_shots, smallest - n_query))
        if not self.imbalance:
            shots = min(shots, self.most_support // ways)
        return Shape(ways, min(self.most_support, ways * shots), n_query)


class Shape(NamedTuple):
    """What the tensors of an outer step's tasks are made for."""

    n_way: int
    support: int  # S, of all classes together
    n_query: int  # Q, of each class


class UnequalEpisodes(NamedTuple):
    """One episode a row; examples lie by class, first those of the support set, then the queries."""

    classes: Tensor  # int64 [T, W], without repetition; the position is the label
    labels: Tensor  # int64 [T, N]
    examples: Tensor  # int64 [T, N], numbers within the class
    turns: Tensor  # int64 [T, W], quarter turns (zeros where not asked for)
    keys: Tensor  # int64 [T]
    support: int  # S


class OneShape:
    """What a task family says of its shapes where they are all the same (see `TaskFamily`)."""

    variable_shapes = False
    sets: tuple[str, ...] = ()

    def alike(self, split: Split, slots: Tensor) -> list[Tensor]:
        return [slots]

    def largest(self, tasks: int, *, seed: int) -> TaskBatch:
        return self.sample("meta_train", 0, torch.arange(tasks), seed=seed)

    def sample(self, split: Split, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> TaskBatch:
        raise NotImplementedError


def key_of_step(seed: int, split: Split, step: int) -> Tensor:
    """What the shape of meta-training's outer step is drawn by."""
    return keys.fold(keys.make(seed, SPLITS.index(split), step), _SHAPES)


def key_of_episode(seed: int, split: Split, step: int, slot: int) -> Tensor:
    """What the shape of an evaluation's episode is drawn by."""
    return keys.fold(key_of_step(seed, split, step), slot)


def sample_unequal(
    *,
    seed: int,
    split: Split,
    step: int,
    slots: Tensor,
    class_counts: Tensor,
    smallest: int,
    largest: int,
    shape: Shape,
    imbalance: bool = True,
    turn_classes: bool = False,
    class_weights: Tensor | None = None,
    candidates: Tensor | None = None,
) -> UnequalEpisodes:
    """Draw the episodes of `slots` (int64 [T]) of one shape from classes with `class_counts` (int64 [C]) examples.

    smallest, largest: examples of these classes, so that nothing waits for a GPU. Otherwise as
    `sampler.sample_indices`, which draws the same classes. The caller has checked that even the smallest class has a
    share of the support set and queries.
    """
    n_way, support, n_query = shape
    episode = keys.of_episodes(seed, SPLITS.index(split), step, slots)
    classes = draw_classes(episode, class_counts, n_way, class_weights, candidates)
    counts = class_counts[classes]
    if imbalance:
        shots = deal_shots(keys.uniform(keys.fold(episode, _SHOTS), n_way), counts, n_query, support)
        most = most_of_a_class(shape, smallest=smallest, largest=largest)
    else:
        most = support // n_way
        shots = torch.full_like(classes, most)
    uniforms = keys.uniform(example_keys(episode, n_way), n_query + most)
    drawn = draw_without_replacement(uniforms, counts)  # [T, W, Q + most], more of a class than it is asked for
    ends = shots.cumsum(-1)  # [T, W]
    positions = torch.arange(support, device=slots.device)
    labels = (positions.view(1, -1, 1) >= ends.unsqueeze(1)).sum(-1)  # [T, S]
    number = positions - (ends - shots).gather(1, labels)  # of its class
    of_support = drawn.flatten(1).gather(1, labels * (n_query + most) + n_query + number)
    of_queries = drawn[..., :n_query].flatten(1)
    query_labels = torch.arange(n_way, device=slots.device).repeat_interleave(n_query).expand(len(slots), -1)
    return UnequalEpisodes(
        classes,
        torch.cat([labels, query_labels], dim=1),
        torch.cat([of_support, of_queries], dim=1),
        draw_turns(episode, n_way) if turn_classes else torch.zeros_like(classes),
        episode,
        support,
    )


def most_of_a_class(shape: Shape, *, smallest: int, largest: int) -> int:
    """A bound of `deal_shots`: no class has more shots. Drawing examples costs its square.

    A class that gets f beyond its first shot has λ ≥ f / w_max, so each other one has min(f r, room) at least, with
    r = w_min / w_max and the room of the smallest class; and all together have S − W.
    """
    n_way, support, n_query = shape
    left, others, room = support - n_way, n_way - 1, smallest - n_query - 1
    r = 0.25 * smallest / largest  # exp(α) is from ½ to 2
    most = left / (1 + others * r)
    if most * r > room:
        most = max(room / r, left - others * room)
    return min(int(most) + 3, left + 1, largest - n_query)  # with the first, one more by rounding, and a spare one


def deal_shots(u: Tensor, counts: Tensor, n_query: int, support: int) -> Tensor:
    """Uniforms and class sizes [T, W] -> shots int64 [T, W]: at least 1, at most counts − n_query, `support` in all.

    Class c gets 1 + min(λ w_c, room_c), w_c = exp(α_c) · counts_c, room_c = counts_c − n_query − 1, with the one λ that
    gives `support` in all; fractions are rounded by the largest remainders. No host sync.
    """
    weights = ((2.0 * u - 1.0).mul(math.log(2)).exp() * 2**WEIGHT_BITS).round().to(torch.int64) * counts
    room, left = counts - n_query - 1, support - counts.shape[-1]
    order = (room / weights).argsort(dim=-1, stable=True)  # in which classes are full as λ grows
    full, rest = room.gather(-1, order), weights.gather(-1, order)
    before = full.cumsum(-1) - full
    heavier = rest.sum(-1, keepdim=True) - rest.cumsum(-1) + rest
    # λ ↦ Σ min(λ w, room) is concave: each of its lines meets `left` no later than it does itself
    level = ((left - before) / heavier).amax(-1, keepdim=True).clamp(min=0)
    share = torch.minimum(level * weights, room)
    whole = share.floor()
    remainder = torch.where(whole < room, share - whole, -1.0)
    rank = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    more = left - whole.sum(-1, keepdim=True)
    return 1 + whole.to(torch.int64) + (rank < more)
