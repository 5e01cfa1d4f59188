"""Fixed episodes: what is scored does not depend on how much of the adaptation path is."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline import experiment as experiments
from pipeline.training.evaluate import Evaluation, evaluate
from tests.faults import experiment


def test_the_last_step_alone_is_scored_as_among_all(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(experiment(tmp_path, tiny_data), device=torch.device("cpu"))
    state = parts.algorithm.init(0)

    def scored(*, last_only: bool) -> Evaluation:
        return evaluate(
            parts.algorithm,
            parts.family,
            state,
            split="meta_val",
            seed=1,
            episodes=5,
            data_digest="x",
            chunk=2,
            steps=3,
            last_only=last_only,
        )

    whole, last = scored(last_only=False), scored(last_only=True)
    assert whole.scores.shape[2] == 4
    assert last.scores.shape[2] == 1
    assert torch.equal(last.scores[..., 0], whole.scores[..., -1])
    assert torch.equal(last.losses[..., 0], whole.losses[..., -1])
    assert not torch.equal(whole.losses[..., 0], whole.losses[..., -1])
