"""Fixed episodes: what is scored does not depend on how much of the adaptation path is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline import experiment as experiments
from pipeline.training.evaluate import Estimate, Evaluation, evaluate
from tests.faults import experiment


def test_fewer_steps_are_scored_as_among_all(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(experiment(tmp_path, tiny_data), device=torch.device("cpu"))
    state = parts.algorithm.init(0)

    def scored(**how: Any) -> Evaluation:
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
            **how,
        )

    whole, last = scored(), scored(last_only=True)
    assert whole.scores.shape[2] == 4
    assert last.scores.shape[2] == 1
    assert torch.equal(last.scores[..., 0], whole.scores[..., -1])
    assert torch.equal(last.losses[..., 0], whole.losses[..., -1])
    assert not torch.equal(whole.losses[..., 0], whole.losses[..., -1])

    some = scored(curve_episodes=3)  # in chunks of two: the second one holds an episode of either kind
    assert torch.equal(some.scores[..., -1], whole.scores[..., -1])
    assert torch.equal(some.losses[:3], whole.losses[:3])
    assert some.losses[3:, :, :-1].isnan().all()
    assert some.loss("inductive") == whole.loss("inductive")
    assert some.loss("inductive", 1) == Estimate.of(whole.losses[:3, 0, 1])
    assert some.to_dict()["episodes_before_the_last_step"] == 3
