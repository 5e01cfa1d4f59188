"""What a user shows a learner (arrays, sentences, rows) -> the inputs of its network.

How queries become inputs may depend on the support set: rows of a table are normalized by its statistics.

Shapes: S support · Q query · D columns of a table · L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.tables.scanning import LARGEST, MISSING
from pipeline.errors import DataError
from pipeline.tasks.shards.manifest import Column
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tokens import Tokens


class Shown(NamedTuple):
    """A support set as inputs [S, ...], and what makes inputs [Q, ...] of queries."""

    support: Tensor
    query: Callable[[Any], Tensor]


def shown(
    support_x: Any,
    preprocessing: Preprocessing | Tokens | TableEncoding | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Shown:
    """The support set of a network whose inputs have this shape and type. Raises DataError: see the functions below."""
    if isinstance(preprocessing, Tokens):
        tokens = preprocessing
        return Shown(token_numbers(support_x, tokens, "support_x"), lambda x: token_numbers(x, tokens, "query_x"))
    if isinstance(preprocessing, TableEncoding):
        encoding = preprocessing
        rows = table_rows(support_x, encoding, dtype, "support_x")
        scale = encoding.scale(rows)
        return Shown(encoding(rows, scale), lambda x: encoding(table_rows(x, encoding, dtype, "query_x"), scale))
    pictures = preprocessing is not None

    def array(x: Any, name: str) -> Tensor:
        return checked_array(x, shape, dtype, name, pictures=pictures)

    return Shown(array(support_x, "support_x"), lambda x: array(x, "query_x"))


def checked_array(x: Any, shape: Sequence[int], dtype: torch.dtype, name: str, *, pictures: bool) -> Tensor:
    """[N, *shape]. Raises DataError: another shape, NaN or infinite values, pictures that are not in 0…1."""
    tensor = torch.as_tensor(np.asarray(x)).to(dtype)
    if list(tensor.shape[1:]) != list(shape) or len(tensor) == 0:
        raise DataError(f"{name}: expected an array [N, {', '.join(map(str, shape))}], got {list(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite values.")
    if pictures and (tensor.min() < 0 or tensor.max() > 1):
        low, high = float(tensor.min()), float(tensor.max())
        raise DataError(f"{name}: values from {low:g} to {high:g}; pictures are expected in 0…1 (divide by 255).")
    return tensor


def token_numbers(x: Any, tokens: Tokens, name: str) -> Tensor:
    """Texts, or token numbers [N, L] as a task family gives them, -> int64 [N, L].

    Raises DataError: neither, or a text that is empty.
    """
    if isinstance(x, Tensor | np.ndarray) and x.ndim == 2 and np.issubdtype(np.asarray(x).dtype, np.integer):
        return torch.as_tensor(np.asarray(x), dtype=torch.int64)
    if isinstance(x, str | bytes) or not hasattr(x, "__len__"):
        raise DataError(f"{name}: expected a list of texts, got {type(x).__name__}.")
    texts = np.asarray(x, dtype=object).reshape(-1).tolist()
    if not texts:
        raise DataError(f"{name}: holds no text.")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{name}: entry {number} is {text!r:.60} and no text.")
    return torch.from_numpy(tokens(texts))


def table_rows(
    x: Any, encoding: TableEncoding, dtype: torch.dtype, name: str, *, place: Callable[[int], str] | None = None
) -> Tensor:
    """Rows -> [N, D] as they are stored: numbers, codes of categories, NaN where a value is missing.

    x: a DataFrame or a list of dicts, by the columns' names (others are left out), or an array [N, D] in the order of
    the columns, where a category is its code or, among objects, its name. One that training did not know is none.
    name: of x, in messages. place: of its i-th row; by default its entry i.

    Raises DataError: a column is missing, another number of columns, or a number that is none.
    """
    if place is None:

        def place(index: int) -> str:
            return f"{name}: entry {index}"

    if hasattr(x, "to_dict") and hasattr(x, "columns"):  # a DataFrame, of whichever library
        x = x.to_dict("records")
    if isinstance(x, Sequence) and x and isinstance(x[0], Mapping):
        absent = [column.name for column in encoding.columns if not any(column.name in row for row in x)]
        if absent:
            raise DataError(f"{name}: has no column {absent[0]!r}. The model's columns are: {_names(encoding)}.")
        cells = [[_cell(row.get(c.name), c, place, i, named=True) for c in encoding.columns] for i, row in enumerate(x)]
        return torch.tensor(cells, dtype=dtype)
    array = np.asarray(x)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] != len(encoding.columns):
        raise DataError(
            f"{name}: expected rows of {len(encoding.columns)} columns ({_names(encoding)}), got {list(array.shape)}."
        )
    if not np.issubdtype(array.dtype, np.number):
        rows = np.asarray(x, dtype=object).tolist()
        cells = [
            [_cell(value, c, place, i) for value, c in zip(row, encoding.columns, strict=True)]
            for i, row in enumerate(rows)
        ]
        return torch.tensor(cells, dtype=dtype)
    if np.isinf(array).any():
        raise DataError(f"{name}: holds infinite values. Give NaN where a value is missing.")
    return torch.as_tensor(array).to(dtype)


def _cell(value: Any, column: Column, place: Callable[[int], str], row: int, *, named: bool = False) -> float:
    """named: a category is its name, even if it is a number. What `data prepare` takes as missing is NaN here too."""
    if value is None or value != value or (isinstance(value, str) and value.strip() in MISSING):
        return math.nan
    if column.kind == "categorical" and (named or isinstance(value, str)):
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        return float(column.categories.index(text)) if text in column.categories else math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if abs(number) > LARGEST:
        raise DataError(f"{place(row)}: column {column.name!r} holds {value!r:.60}, which is no finite number.")
    return number


def _names(encoding: TableEncoding) -> str:
    names = [column.name for column in encoding.columns]
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
