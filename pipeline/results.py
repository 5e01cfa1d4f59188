"""Result tables as Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.training.evaluate import MODES, Evaluation


def write(evaluation: Evaluation, file: Path) -> None:
    """One row per episode, mode and adaptation step; the summary with seed and digest is the file's metadata."""
    episodes, modes, steps = evaluation.scores.shape
    episode, mode, step = np.meshgrid(np.arange(episodes), np.arange(modes), np.arange(steps), indexing="ij")
    table = pa.table(
        {
            "episode": episode.ravel(),
            "mode": np.array(MODES)[mode.ravel()],
            "adaptation_step": step.ravel(),
            evaluation.score_name: evaluation.scores.numpy().ravel(),
            "loss": evaluation.losses.numpy().ravel(),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"evaluation": json.dumps(evaluation.to_dict())}), file)
