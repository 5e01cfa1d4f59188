"""What a meta-learner has to beat on the same episodes without learning: the nearest example, the nearest class mean.

They see what the network sees: pixels, a table's inputs, or bags of tokens.

Shapes: T tasks · S support · Q query · W classes · L tokens · V different tokens of an episode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tasks.text import Rarity, TextTasks
from pipeline.training.evaluate import episode_batches
from pipeline.types import Split, TaskBatch, TaskFamily


def scores(family: TaskFamily, *, split: Split, seed: int, episodes: int) -> dict[str, Tensor]:
    """Accuracies [episodes] by the name of the baseline, of classification tasks."""
    if family.inputs == "images":
        return {"nearest neighbour on pixels": nearest_neighbour(family, split=split, seed=seed, episodes=episodes)}
    if family.inputs == "vectors":
        return {
            "nearest neighbour on the inputs": nearest_neighbour(family, split=split, seed=seed, episodes=episodes),
            "nearest centroid on the inputs": nearest_centroid(family, split=split, seed=seed, episodes=episodes),
        }
    found = {"nearest centroid on tokens": nearest_bag(family, None, split=split, seed=seed, episodes=episodes)}
    if isinstance(family, TextTasks):
        rarity = Rarity(family.texts("meta_train"))
        name = "nearest centroid on tokens by their rarity in meta-training (TF-IDF)"
        found[name] = nearest_bag(family, rarity, split=split, seed=seed, episodes=episodes)
    return found


def nearest_neighbour(family: TaskFamily, *, split: Split, seed: int, episodes: int) -> Tensor:
    """Accuracy [episodes] of labelling each query like its nearest support example (Euclidean, on the inputs)."""

    def answers(batch: TaskBatch) -> Tensor:
        distances = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))  # [T, Q, S]
        return batch.support_y.gather(1, distances.argmin(dim=2))

    return _accuracies(family, answers, split=split, seed=seed, episodes=episodes)


def nearest_centroid(family: TaskFamily, *, split: Split, seed: int, episodes: int) -> Tensor:
    """Accuracy [episodes] of the class whose support examples' mean is nearest (Euclidean, on the inputs)."""

    def answers(batch: TaskBatch) -> Tensor:
        return torch.cdist(batch.query_x.flatten(2), _means(batch.support_x.flatten(2), batch)).argmin(dim=2)

    return _accuracies(family, answers, split=split, seed=seed, episodes=episodes)


def nearest_bag(
    family: TaskFamily, weight: Callable[[Tensor], Tensor] | None, *, split: Split, seed: int, episodes: int
) -> Tensor:
    """Accuracy [episodes] of the class whose mean bag of tokens makes the smallest angle with the query's.

    Bags are counts, times `weight` of their tokens, of length 1.
    """

    def of_task(batch: TaskBatch) -> Tensor:
        texts = torch.cat([batch.support_x, batch.query_x], dim=1)[0]
        tokens, place = texts.unique(return_inverse=True)
        there = (tokens != 0).to(torch.float64)
        weights = there if weight is None else there * weight(tokens)
        bags = torch.zeros(len(texts), len(tokens), dtype=torch.float64, device=texts.device)
        bags = bags.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64)) * weights  # [S + Q, V]
        bags = F.normalize(bags, dim=-1)[None]
        shots = batch.support_x.shape[1]
        means = F.normalize(_means(bags[:, :shots], batch), dim=-1)
        return torch.bmm(bags[:, shots:], means.transpose(1, 2)).argmax(dim=2)

    def answers(batch: TaskBatch) -> Tensor:
        return torch.cat([of_task(batch.tasks(slice(t, t + 1))) for t in range(len(batch.support_x))])

    return _accuracies(family, answers, split=split, seed=seed, episodes=episodes)


def _means(support: Tensor, batch: TaskBatch) -> Tensor:
    """Means [T, W, F] of the classes' support examples [T, S, F]."""
    classes = int(batch.support_y.max()) + 1
    members = F.one_hot(batch.support_y, classes).to(support.dtype)
    return torch.bmm(members.transpose(1, 2), support) / members.sum(dim=1).unsqueeze(-1)


def _accuracies(
    family: TaskFamily, answers: Callable[[TaskBatch], Tensor], *, split: Split, seed: int, episodes: int
) -> Tensor:
    """Of answers [T, Q] to episodes."""
    found = torch.zeros(episodes, dtype=torch.float64)
    for slots, batch in episode_batches(family, split, torch.arange(episodes), seed=seed, chunk=None):
        found[slots] = (answers(batch) == batch.query_y).to(torch.float64).mean(dim=1).cpu()
    return found
