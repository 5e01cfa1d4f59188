"""Pickles of NumPy arrays that somebody else made: CIFAR-100's archive, mini-ImageNet's caches.

A pickle can run any code when it is loaded. This reader admits numbers, texts, lists, dicts and arrays of numbers, and
refuses every other name by itself; arrays are rebuilt here from their bytes, not by NumPy's own hooks.

Rows are then read from where they lie in the file, by any process, so no process but the one that lists the file holds
it in memory, and that one just once.
"""

from __future__ import annotations

import mmap
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import DataError

NUMBER = re.compile(r"[biuf][1248]")  # a dtype's kind and bytes; no objects, no texts
MAX_DEPTH = 3  # of dicts in dicts
FAILURES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class RowsInFile(NamedTuple):
    """An array whose bytes lie in a row in a file: light and picklable, whatever its size."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """Read-only, mapped. Raises DataError: the file was cut short since."""
        try:
            return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}). Fetch it again.") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle: its values are numbers, texts, lists, dicts, or arrays.

    Raises DataError: no such file, damaged, not a dict, or it names anything else than arrays.
    """
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (*FAILURES, OSError) as error:
        raise DataError(f"{path}: not read as a pickle of arrays ({error}). Fetch it again.") from error
    plain = _plain(content)
    if not isinstance(plain, dict):
        raise DataError(f"{path}: holds {type(plain).__name__}, where a dict was expected. Fetch it again.")
    return plain


def in_file(path: Path, array: np.ndarray) -> RowsInFile:
    """Where an array that `read_pickle` gave lies in its file. Raises DataError: its bytes are not there in a row."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(flat[:4096].tobytes())
        while start >= 0:
            if start + len(flat) <= len(content):
                there = np.frombuffer(content, np.uint8, count=len(flat), offset=start)
                same = np.array_equal(there, flat)
                del there  # the map cannot be closed while something looks into it
                if same:
                    return RowsInFile(path, start, array.dtype.str, array.shape)
            start = content.find(flat[:4096].tobytes(), start + 1)
    raise DataError(
        f"{path}: its arrays are not stored as plain bytes (an old protocol). Load the pickle where you trust it and "
        "write it again with protocol=4."
    )


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        kind = module.replace("numpy._core", "numpy.core"), name
        if kind not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a pickle of somebody else may run code")
        return _ADMITTED[kind]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside the file")


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, kind: str, *_: Any) -> None:
        if not isinstance(kind, str) or not NUMBER.fullmatch(kind):
            raise pickle.UnpicklingError(f"an array of {kind!r:.40}, where numbers were expected")
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]
        if self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"an array of byte order {self.order!r:.40}")

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.kind)


class _Array:
    """Stands in for numpy.ndarray until its state is set."""

    array: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("an array that is not of plain numbers")
    return np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.array = _array(raw, dtype, shape, order)
    return array


def _scalar(dtype: Any, raw: Any) -> int | float:
    value = _array(raw, dtype, (1,), "C")[0].item()
    assert isinstance(value, int | float)
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes as Python 3 writes them in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("a text in an encoding other than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """The same of none: `bytes()`."""
    return b""


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): dict,
}


def _plain(value: Any, depth: int = 0) -> Any:
    """With arrays in the place of what stands in for them; keys as texts."""
    if isinstance(value, _Array):
        return getattr(value, "array", None)
    if isinstance(value, dict) and depth < MAX_DEPTH:
        return {
            key.decode("latin1") if isinstance(key, bytes) else key: _plain(inner, depth + 1)
            for key, inner in value.items()
        }
    return value
