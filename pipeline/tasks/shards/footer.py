"""What a Parquet file's footer says of its column chunks, read without pyarrow's view of it.

`pyarrow.parquet.ColumnChunkMetaData` ends the process where a footer is damaged in certain places (pyarrow 25: size
statistics of a wrong length; writing such metadata too), so it is never asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.storage import Readable

MAGIC, TAIL = b"PAR1", 8  # a file ends with the footer's length (4 bytes) and the magic
UNCOMPRESSED = 0
MAX_DEPTH = 16  # of structures in structures; a footer has six
# ids in parquet.thrift
_ROW_GROUPS, _COLUMNS, _NUM_ROWS, _META_DATA = 4, 1, 3, 3
_PATH, _CODEC, _UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 3, 4, 6, 7, 9, 11
_WANTED = (_PATH, _CODEC, _UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE)


class Chunk(NamedTuple):
    """One column of a row group."""

    column: str  # of the file's schema, the first part of the path
    codec: int
    uncompressed: int  # bytes, pages' headers and all
    compressed: int
    data_page: int  # offset in the file
    has_dictionary: bool


class RowGroupFooter(NamedTuple):
    rows: int
    chunks: list[Chunk]


def row_groups(file: Readable) -> list[RowGroupFooter]:
    """Every row group of a file. Raises ValueError, OSError: not a footer that can be understood, or no file."""
    with file.open("rb") if isinstance(file, Path) else file.open_input() as stream:
        stream.seek(0, 2)
        size = stream.tell()
        if size < len(MAGIC) + TAIL:
            raise ValueError("it is too short to be a Parquet file")
        stream.seek(size - TAIL)
        tail = bytes(stream.read(TAIL))
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or length > size - len(MAGIC) - TAIL:
            raise ValueError("it does not end as a Parquet file does")
        stream.seek(size - TAIL - length)
        content = bytes(stream.read(length))
    return parse(content)


def parse(content: bytes) -> list[RowGroupFooter]:
    """Every row group of a footer. Raises ValueError: it cannot be understood."""
    reader = _Compact(content)
    try:
        groups = reader.struct({_ROW_GROUPS: lambda r: r.items(lambda r: r.struct(_ROW_GROUP))}).get(_ROW_GROUPS, [])
        return [RowGroupFooter(group[_NUM_ROWS], [_chunk(column) for column in group[_COLUMNS]]) for group in groups]
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its footer is damaged ({error})") from error


def _chunk(column: dict[int, Any]) -> Chunk:
    content = column[_META_DATA]
    path = content[_PATH]
    sizes = (content[_UNCOMPRESSED_SIZE], content[_COMPRESSED_SIZE], content[_DATA_PAGE])
    if not path or min(sizes) < 0:
        raise KeyError("a size below zero")
    return Chunk(path[0].decode(), content[_CODEC], *sizes, content.get(_DICTIONARY_PAGE) is not None)


class _Compact:
    """Thrift's compact protocol, as far as it is needed."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._depth = 0

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._content[self._at]
            self._at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def binary(self) -> bytes:
        length = self.varint()
        start, self._at = self._at, self._at + length
        if self._at > len(self._content):
            raise IndexError("cut short")
        return self._content[start : self._at]

    def items(self, read: Callable[[_Compact], Any]) -> list[Any]:
        size, _ = self._list()
        return [read(self) for _ in range(size)]

    def struct(self, wanted: dict[int, Callable[[_Compact], Any]]) -> dict[int, Any]:
        """The wanted fields, by id; the others are passed over."""
        found: dict[int, Any] = {}
        for number, kind in self._fields():
            if number in wanted:
                found[number] = wanted[number](self)
            else:
                self._skip(kind)
        return found

    def _fields(self) -> Iterator[tuple[int, int]]:
        number = 0
        while (head := self._content[self._at]) != 0:
            self._at += 1
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 0x0F
        self._at += 1

    def _list(self) -> tuple[int, int]:
        head = self._content[self._at]
        self._at += 1
        size = head >> 4 if head >> 4 != 15 else self.varint()
        if size > len(self._content) - self._at:  # an item takes a byte at least
            raise IndexError("cut short")
        return size, head & 0x0F

    def _skip(self, kind: int) -> None:
        if kind in (1, 2):  # true and false are in the head
            return
        if kind == 3:
            self._at += 1
        elif kind in (4, 5, 6):
            self.varint()
        elif kind == 7:
            self._at += 8
        elif kind == 8:
            self.binary()
        elif kind in (9, 10):
            size, of = self._list()
            for _ in range(size):
                self._at += 1 if of in (1, 2) else 0
                self._skip(of)
        elif kind == 12:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise RecursionError("too deep")
            for _, inner in self._fields():
                self._skip(inner)
            self._depth -= 1
        else:
            raise TypeError(f"type {kind}")


_INTEGERS = {number: _Compact.integer for number in _WANTED if number != _PATH}
_COLUMN: dict[int, Callable[[_Compact], Any]] = {
    _META_DATA: lambda r: r.struct({**_INTEGERS, _PATH: lambda r: r.items(_Compact.binary)})
}
_ROW_GROUP: dict[int, Callable[[_Compact], Any]] = {
    _COLUMNS: lambda r: r.items(lambda r: r.struct(_COLUMN)),
    _NUM_ROWS: _Compact.integer,
}
