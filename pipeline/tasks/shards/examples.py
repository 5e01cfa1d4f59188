"""Examples of each modality: how they are checked, hashed, and held in a Parquet column.

A fixed modality (image, vector) has examples of one size, as arrays; one of varying size (text, encoded_image) has
them as a list.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.datasets.source import Examples, Modality
from pipeline.errors import DataError

FIXED: tuple[Modality, ...] = ("image", "vector")
COLUMN: dict[Modality, str] = {"image": "image", "encoded_image": "image", "vector": "features", "text": "text"}
DTYPE: dict[Modality, str] = {"image": "uint8", "encoded_image": "uint8", "vector": "float32", "text": "string"}
AXES: dict[Modality, int] = {"image": 3, "encoded_image": 3, "vector": 1, "text": 0}  # of one example's shape
MAX_EXAMPLE_BYTES = 32 << 20  # of a text or an encoded image


def example_bytes(modality: Modality, shape: Sequence[int]) -> int | None:
    """Bytes of one example; None where they vary."""
    if modality not in FIXED:
        return None
    return math.prod(shape) * np.dtype(DTYPE[modality]).itemsize


def arrow_type(modality: Modality, shape: Sequence[int]) -> pa.DataType:
    """Of the column that holds the examples."""
    if modality == "image":
        return pa.binary(math.prod(shape))
    if modality == "vector":
        return pa.list_(pa.field("element", pa.float32(), nullable=False), shape[0])
    return pa.string() if modality == "text" else pa.binary()


def checked(modality: Modality, examples: Examples, *, name: str, shape: tuple[int, ...] | None) -> Examples:
    """The examples of class `name` in the one form that is written and hashed. shape: of the others, if known.

    Raises DataError: not of this modality, of another shape, or too long.
    """
    if modality in FIXED:
        wanted = "uint8 images [count, H, W, C]" if modality == "image" else "float32 vectors [count, D]"
        if (
            not isinstance(examples, np.ndarray)
            or examples.dtype != DTYPE[modality]
            or examples.ndim != 1 + AXES[modality]
            or 0 in examples.shape[1:]
        ):
            given = type(examples).__name__
            if isinstance(examples, np.ndarray):
                given = f"{examples.dtype} {list(examples.shape)}"
            raise DataError(f"class {name}: expected {wanted}, got {given}.")
        if shape is not None and examples.shape[1:] != tuple(shape):
            kind = "images" if modality == "image" else "vectors"
            raise DataError(f"class {name}: {kind} of {examples.shape[1:]}, the others of {tuple(shape)}.")
        if modality == "vector":
            if np.isinf(examples).any():
                raise DataError(f"class {name}: infinite values. Give NaN where a value is missing.")
            return np.where(np.isnan(examples), np.float32("nan"), examples)  # one of the many NaNs
        return np.ascontiguousarray(examples)
    element = str if modality == "text" else bytes
    if not isinstance(examples, list) or not all(isinstance(example, element) for example in examples):
        raise DataError(f"class {name}: expected a list of {element.__name__}, got {type(examples).__name__}.")
    for example in examples:
        try:
            length = len(example.encode()) if isinstance(example, str) else len(example)
        except UnicodeEncodeError as error:
            raise DataError(f"class {name}: a text that is not Unicode ({error}).") from None
        if length > MAX_EXAMPLE_BYTES:
            raise DataError(f"class {name}: an example of {length} bytes; {MAX_EXAMPLE_BYTES} are the most.")
    return examples


def lengths(examples: Examples) -> np.ndarray:
    """Bytes of each example, int64 [n]."""
    if isinstance(examples, np.ndarray):
        return np.full(len(examples), examples[0].nbytes if len(examples) else 0)
    encoded = (example.encode() if isinstance(example, str) else example for example in examples)
    return np.fromiter(map(len, encoded), dtype=np.int64, count=len(examples))


def concatenated(parts: Iterable[Examples]) -> Examples:
    """Parts of at least one example in all, one after the other."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return list(itertools.chain.from_iterable(parts))


def to_arrow(modality: Modality, examples: Examples) -> pa.Array:
    if not isinstance(examples, np.ndarray):
        return pa.array(examples, arrow_type(modality, ()))
    kind = arrow_type(modality, examples.shape[1:])
    values = pa.py_buffer(np.ascontiguousarray(examples))
    if modality == "image":
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(examples), [None, values])
    floats = pa.Array.from_buffers(pa.float32(), examples.size, [None, values])
    return pa.FixedSizeListArray.from_arrays(floats, type=kind)


def from_arrow(modality: Modality, shape: Sequence[int], column: pa.ChunkedArray | pa.Array) -> Examples:
    """Examples in a column; those of a fixed modality lie where Arrow has them. Raises ValueError: missing values."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError("an example is missing")
    if modality not in FIXED:
        return array.to_pylist()
    if modality == "vector":
        values = array.flatten()
        if values.null_count or len(values) != len(array) * shape[0]:
            raise ValueError("a number of a vector is missing")
        return values.to_numpy(zero_copy_only=True).reshape(len(array), *shape)
    size = math.prod(shape)
    pixels = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    start = array.offset * size
    return pixels[start : start + len(array) * size].reshape(len(array), *shape)


class ExamplesDigest:
    """sha256 over examples in order, however they are cut into parts.

    Of arrays: their bytes, little-endian. Of texts and files: each one's length in bytes (8 bytes, little-endian) and
    the bytes themselves, of a text in UTF-8.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, examples: Examples) -> None:
        if isinstance(examples, np.ndarray):
            self._hash.update(np.ascontiguousarray(examples).data)
            return
        for part in _prefixed(examples):
            self._hash.update(part)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _prefixed(examples: Sequence[str] | Sequence[bytes]) -> Iterator[bytes]:
    for example in examples:
        content = example.encode() if isinstance(example, str) else example
        yield struct.pack("<Q", len(content))
        yield content


def examples_sha256(examples: Examples) -> str:
    """Of all examples of a class."""
    digest = ExamplesDigest()
    digest.update(examples)
    return digest.hexdigest()
