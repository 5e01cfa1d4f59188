"""Rows as inputs: normalized by their support set, missing values, categories."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.datasets.source import Column
from pipeline.tasks.tables import TableEncoding

NAN = float("nan")
COLUMNS = [
    Column(name="a"),
    Column(name="colour", kind="categorical", categories=["blue", "red"]),
    Column(name="b", missing=True),
]
SUPPORT = torch.tensor([[1.0, 0, 2.0], [3.0, 1, NAN], [5.0, NAN, 6.0]], dtype=torch.float64)


def encoding(normalize: str = "support", prior: float = 0.0) -> TableEncoding:
    content = {"columns": COLUMNS, "normalize": normalize, "prior_examples": prior}
    return TableEncoding.model_validate({**content, "mean": [10, 20], "variance": [4, 9]})


def encoded(made: TableEncoding, rows: Tensor = SUPPORT) -> Tensor:
    return made(rows, made.scale(SUPPORT))


def test_numbers_masks_and_categories() -> None:
    """Columns a and b normalized, whether b is missing, blue, red."""
    made = encoding()
    assert made.width == 5
    wide = np.sqrt(8 / 3)
    expected = [[-2 / wide, -1, 0, 1, 0], [0, 0, 1, 0, 1], [2 / wide, 1, 0, 0, 0]]
    torch.testing.assert_close(encoded(made), torch.tensor(expected, dtype=torch.float64))


def test_each_task_is_normalized_by_its_own_support_set() -> None:
    """Measured in other units, a task is the same task."""
    made = encoding()
    tasks = torch.stack([SUPPORT, SUPPORT * torch.tensor([1000.0, 1, 0.01]) + torch.tensor([5.0, 0, 7])])
    both = made(tasks, made.scale(tasks))
    torch.testing.assert_close(both[0], encoded(made))
    torch.testing.assert_close(both[1], both[0])


@pytest.mark.parametrize("prior", [0.5, 1, 100])
def test_statistics_are_drawn_towards_training_as_by_so_many_more_rows(prior: float) -> None:
    """The mean and variance of the support rows and `prior` rows of training's, by their mixture's moments."""
    scale = encoding(prior=prior).scale(SUPPORT)
    for column, (there, mean, variance) in enumerate((([1, 3, 5], 10, 4), ([2, 6], 20, 9))):
        n = len(there)
        first = (sum(there) + prior * mean) / (n + prior)
        second = (sum(x * x for x in there) + prior * (variance + mean * mean)) / (n + prior)
        assert float(scale.mean[0, column]) == pytest.approx(first)
        assert float(scale.deviation[0, column]) ** 2 == pytest.approx(second - first**2)


def test_what_a_support_set_does_not_tell_is_as_in_training_or_left_alone() -> None:
    mute = torch.tensor([[3.0, 0, NAN], [3.0, 0, NAN]], dtype=torch.float64)
    query = torch.tensor([[4.0, 0, 23.0]], dtype=torch.float64)
    alone, drawn = encoding(prior=0), encoding(prior=1)
    torch.testing.assert_close(alone(query, alone.scale(mute))[0, :2], torch.tensor([1.0, 1], dtype=torch.float64))
    torch.testing.assert_close(drawn.scale(mute).mean[0, 1], torch.tensor(20.0, dtype=torch.float64))
    torch.testing.assert_close(drawn(query, drawn.scale(mute))[0, 1], torch.tensor(1.0, dtype=torch.float64))


def test_by_training_or_not_at_all() -> None:
    training, none = encoded(encoding("training")), encoded(encoding("none"))
    assert training[:, 0].tolist() == [-4.5, -3.5, -2.5]
    assert training[:, 1].tolist() == [-5, 0, pytest.approx(-14 / 3)]  # six deviations are cut to five
    assert none[:, 0].tolist() == [1, 3, 5]
    assert none[:, 1].tolist() == [2, 0, 6]
