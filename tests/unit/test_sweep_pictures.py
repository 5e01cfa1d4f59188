"""The picture of a sweep is drawn whatever the trials were."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import sweep_pictures

INNER, OUTER = "algorithm.inner_lr", "training.outer_lr"


def trial(params: dict[str, Any], score: float | None, status: str = "finished") -> sweep_pictures.TrialData:
    records = [] if score is None else [{"step": 10, "val_accuracy": score / 2}, {"step": 20, "val_accuracy": score}]
    return params, score, status, records


@pytest.mark.parametrize(
    "trials",
    [
        [trial({INNER: 0.1, OUTER: 0.001}, 0.8)],
        [trial({INNER: 0.1, OUTER: 0.001}, 0.8), trial({INNER: 0.3, OUTER: 0.001}, 0.8)],  # no spread of scores
        [trial({INNER: 10.0**-i, OUTER: 10.0**-j}, 0.1 * (i + j)) for i in range(3) for j in range(2)],  # a grid
        [trial({INNER: 0.1, OUTER: 0.01}, 0.8), trial({INNER: 9.0, OUTER: 0.01}, None, "failed")],
        [trial({OUTER: 0.01}, 0.8), trial({OUTER: 0.1}, 0.7, "stopped")],  # one key
        [trial({"model.name": name, "algorithm.first_order": name is None}, 0.5) for name in ("conv4", None, "mlp")],
        [trial({"a": "x", "b": 1, OUTER: 0.1}, 0.5), trial({"a": 2, "b": 1, OUTER: 0.2}, 0.6)],  # words and numbers
        [trial({INNER: -1.0, OUTER: 0.0}, -0.5), trial({INNER: 1.0, OUTER: 0.5}, -2.0)],  # negative and zero
    ],
)
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_any_sweep_has_a_picture(
    trials: list[sweep_pictures.TrialData], higher_is_better: bool, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.png"
    sweep_pictures.sweep(trials, metric="val_accuracy", higher_is_better=higher_is_better, file=file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000
