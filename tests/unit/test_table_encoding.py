"""Rows as inputs: normalized by their support set, missing values, categories."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.datasets.source import Column
from pipeline.shown import table_rows
from pipeline.tasks.tables import MatchedColumns, TableEncoding

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


CATEGORIES = st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=6, unique=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_another_tables_rows_are_as_if_they_were_shown_by_name(data: st.DataObject) -> None:
    """Columns in any order, categories in any order, some of them unknown, columns that the model has not."""
    kinds = data.draw(st.lists(st.sampled_from(["numeric", "categorical"]), min_size=1, max_size=4))

    def column(number: int) -> Column:
        kind: Any = kinds[number]
        categories = data.draw(CATEGORIES) if kind == "categorical" else []
        return Column(name=f"c{number}", kind=kind, categories=categories, missing=True)

    theirs = [column(number) for number in data.draw(st.permutations(range(len(kinds))))]
    wanted = [column(number) for number in range(len(kinds)) if number == 0 or data.draw(st.booleans())]
    rows = [
        [data.draw(st.one_of(st.none(), st.integers(0, len(c.categories or "123") - 1).map(float))) for c in theirs]
        for _ in range(3)
    ]
    named = [
        {
            c.name: c.categories[int(v)] if c.categories and v is not None else v
            for c, v in zip(theirs, row, strict=True)
        }
        for row in rows
    ]
    numeric = [0.0] * sum(c.kind == "numeric" for c in wanted)
    made = TableEncoding(columns=wanted, normalize="none", prior_examples=0, mean=numeric, variance=numeric)
    stored = torch.tensor([[np.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)
    before = stored.clone()
    matched = MatchedColumns(theirs, wanted, source="data", device=torch.device("cpu"))
    found, expected = matched(stored), table_rows(named, made, torch.float64, "rows")
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(stored, before, equal_nan=True)
    for c in wanted:
        of_theirs = next(other for other in theirs if other.name == c.name)
        assert set(matched.unknown.get(c.name, [])) == set(of_theirs.categories) - set(c.categories)
