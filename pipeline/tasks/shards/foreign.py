"""Files that another program wrote (pandas, Polars, DuckDB, Spark, a hub): their columns in our terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.source import Modality
from pipeline.tasks.shards import bounds
from pipeline.tasks.shards.examples import arrow_type
from pipeline.tasks.shards.footer import RowGroupFooter
from pipeline.tasks.shards.manifest import Layout

BETWEEN = "\0"  # a group and a label; neither may hold it


def check_row_groups(file: pq.ParquetFile, footers: Sequence[RowGroupFooter], layout: Layout) -> None:
    """Raises ValueError: a column is missing, or a row group would be larger in memory than is read at once."""
    names = {path.split(".")[0] for path in layout.columns}
    for name in sorted(names - set(file.schema_arrow.names)):
        raise ValueError(f"it has no column {name!r}")
    for number, footer in enumerate(footers):
        size = sum(chunk.uncompressed for chunk in footer.chunks if chunk.column in names)
        if size > bounds.MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"row group {number} is of {size >> 20} MiB; {bounds.MAX_ROW_GROUP_BYTES >> 20} MiB are read at once"
            )


def column_of(table: pa.Table | pa.RecordBatch, path: str) -> pa.Array:
    """A column, or a field of a struct column. Raises KeyError, ValueError."""
    name, *fields = path.split(".")
    column = table.column(name)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    for field in fields:
        if not pa.types.is_struct(array.type):
            raise ValueError(f"column {name!r} is no struct")
        array = pc.struct_field(array, field)
    if isinstance(array.type, pa.BaseExtensionType):  # tensors of Ray Data, known where it is imported
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def labels_of(table: pa.Table | pa.RecordBatch, layout: Layout) -> pa.Array:
    """Each row's group and label in one text; null where one of them is missing. Raises ValueError: no such text."""
    labels = _texts(column_of(table, layout.label))
    if layout.group is None:
        return labels
    return pc.binary_join_element_wise(_texts(column_of(table, layout.group)), labels, BETWEEN)


def all_are(labels: pa.Array, group: str | None, label: str) -> bool:
    wanted = label if group is None else f"{group}{BETWEEN}{label}"
    return bool(pc.all(pc.fill_null(pc.equal(labels, wanted), False), min_count=0).as_py())


def is_no_text(table: pa.Table | pa.RecordBatch, layout: Layout, row: int) -> str | None:
    """The label or group of a row that is there and is neither a text nor a whole number, as a user knows it."""
    for path in filter(None, (layout.label, layout.group)):
        given = column_of(table, path).slice(row, 1)
        if given.null_count or _texts(given).null_count == 0:
            continue
        shown = given.cast(pa.float64())[0].as_py() if pa.types.is_floating(given.type) else _bytes(given)[0].as_py()
        if shown == shown:  # NaN is what pandas writes for a missing one
            return repr(shown)[:40]
    return None


def _texts(array: pa.Array) -> pa.Array:
    """Each value as text; null where there is none, or one that is no whole number or not UTF-8."""
    if pa.types.is_floating(array.type):  # integers, until pandas met one that is missing
        numbers = array.cast(pa.float64())
        whole = pc.and_(pc.equal(numbers, pc.trunc(numbers)), pc.less(pc.abs(numbers), 2.0**63))
        array = pc.if_else(whole, numbers, pa.scalar(None, pa.float64())).cast(pa.int64())
    if not _is_text(array.type):
        return array.cast(pa.string())
    values = _bytes(array)
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in values.to_pylist()], pa.string())


def _is_text(kind: pa.DataType) -> bool:
    of_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return of_bytes or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _bytes(array: pa.Array) -> pa.Array:
    """Texts without their promise to be UTF-8, which a file need not keep and pyarrow does not check."""
    return array.cast(pa.binary())


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def usable(modality: Modality, shape: Sequence[int], array: pa.Array) -> np.ndarray:
    """Whether each row is an example: bool [rows]. Raises ValueError: the column is of another type."""
    _check_type(modality, array.type)
    if modality == "image":
        good = pc.equal(pc.binary_length(array), math.prod(shape))
    elif modality == "vector":
        good = pc.equal(pc.list_value_length(array), shape[0])
    else:
        good = array.is_valid()
    good = pc.fill_null(good, False).to_numpy(zero_copy_only=False)
    if modality == "vector" and good.any():
        kept = np.flatnonzero(good)
        good[kept[np.isinf(_numbers(array.take(pa.array(kept)), shape[0])).any(axis=1)]] = False
    return good


def normalized(modality: Modality, shape: Sequence[int], array: pa.Array) -> pa.Array:
    """Usable rows as our own files have them. Raises ValueError and pyarrow's errors: they are not."""
    if array.null_count:
        raise ValueError("an example is missing")
    _check_type(modality, array.type)
    if modality == "vector":
        numbers = _numbers(array, shape[0])
        if len(numbers) != len(array) or np.isinf(numbers).any():
            raise ValueError("a vector is of another length, or infinite")
        floats = pa.array(numbers.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(floats, type=arrow_type("vector", shape))
    return array.cast(arrow_type(modality, shape))


def _numbers(array: pa.Array, length: int) -> np.ndarray:
    """float32 [rows, length]; NaN where one is missing. Raises ValueError: lists of another length."""
    values = array.flatten()
    if len(values) != len(array) * length:
        raise ValueError(f"vectors are not all of {length} numbers")
    with np.errstate(over="ignore"):
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return np.where(np.isnan(numbers), np.float32("nan"), numbers).reshape(len(array), length)


def _check_type(modality: Modality, kind: pa.DataType) -> None:
    of_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    of_lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    fits = {
        "image": of_bytes or pa.types.is_fixed_size_binary(kind),
        "encoded_image": of_bytes,
        "vector": of_lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)),
        "text": pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
    }
    if not fits[modality]:
        raise ValueError(f"a column of type {kind} holds no examples of modality {modality}")
