"""Result tables as Parquet and CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
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


def write_trials(rows: list[dict[str, Any]], folder: Path) -> None:
    """A sweep's trials, one row each, as `trials.parquet` and `trials.csv`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    pq.write_table(table, folder / "trials.parquet")
    csv.write_csv(table, folder / "trials.csv")


def _column(values: list[Any]) -> pa.Array:
    """Of one type: numbers, or text for anything else (a choice may mix them)."""
    numbers = all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values)
    if numbers:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())
