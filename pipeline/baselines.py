"""What a meta-learner has to beat on the same episodes: nearest neighbour on pixels, and its own untrained network."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.training.evaluate import episode_batches
from pipeline.types import Split, TaskFamily


def nearest_neighbour(family: TaskFamily, *, split: Split, seed: int, episodes: int) -> Tensor:
    """Accuracy [episodes] of labelling each query like its nearest support example (Euclidean, on the inputs)."""
    scores = torch.zeros(episodes, dtype=torch.float64)
    for slots, batch in episode_batches(family, split, torch.arange(episodes), seed=seed, chunk=None):
        distances = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))  # [T, Q, S]
        predicted = batch.support_y.gather(1, distances.argmin(dim=2))
        scores[slots] = (predicted == batch.query_y).to(torch.float64).mean(dim=1).cpu()
    return scores
