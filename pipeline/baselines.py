"""What a meta-learner has to beat on the same episodes: nearest neighbour on pixels, and its own untrained network."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.training.evaluate import EPISODES_AT_ONCE
from pipeline.types import Split, TaskFamily


def nearest_neighbour(family: TaskFamily, *, split: Split, seed: int, episodes: int) -> Tensor:
    """Accuracy [episodes] of labelling each query like its nearest support example (Euclidean, on the inputs)."""
    scores = []
    for slots in torch.arange(episodes).split(EPISODES_AT_ONCE):
        batch = family.sample(split, 0, slots, seed=seed)
        distances = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))  # [T, Q, S]
        predicted = batch.support_y.gather(1, distances.argmin(dim=2))
        scores.append((predicted == batch.query_y).to(torch.float64).mean(dim=1))
    return torch.cat(scores).cpu()
