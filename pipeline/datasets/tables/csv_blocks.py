"""The bytes of a CSV file, in blocks of whole rows.

Arrow's streaming reader would cut them itself. But it parses in threads of its own, which abort a process that ends
meanwhile, and it stops at a row with too many cells that is not UTF-8. So it parses one block at a time, in our thread,
and bytes that are not UTF-8 are marked before and told from others after.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.errors import ConfigError

BLOCK_BYTES = 2 << 20
MAX_ROW_BYTES = 32 << 20
MARK = 0x10FF00  # the last characters of Unicode, which are for private use; the byte b becomes MARK + b
MARKED = re.compile(rb"\xf4\x8f[\xbe\xbf][\x80-\xbf]")
ESCAPE = "metapipe.bytes"


class Cut(NamedTuple):
    """Where rows of a file with one delimiter end."""

    rows: re.Pattern[bytes]  # matches all rows at the start that are whole
    row: re.Pattern[bytes]  # the first one, which may end with the content

    @classmethod
    def by(cls, delimiter: str) -> Cut:
        d = re.escape(delimiter.encode())
        # a quotation mark is one at a cell's start alone, as for Arrow; possessive, since nothing is tried twice
        cell = rb'(?:"[^"]*+(?:""[^"]*+)*+"[^%b\r\n]*+|(?!")[^%b\r\n]*+)' % (d, d)
        row = rb"(?>(?:%b%b)*+%b(?:\r\n|\r|\n))" % (cell, d, cell)
        return cls(re.compile(rb"%b*+" % row), re.compile(rb"(?:%b|(?s:.*))" % row))


def delimiter_of(given: str) -> str:
    """What an option names: one character, or tab. Raises ConfigError."""
    delimiter = "\t" if given in ("tab", "\\t") else given
    if len(delimiter.encode()) != 1 or delimiter in '"\r\n':
        raise ConfigError(f"--delimiter {given!r}: should be one character, such as ; or tab.")
    return delimiter


def blocks(stream: Any, cut: Cut) -> Iterator[bytes]:
    """What a binary stream holds, cut after rows. Raises ValueError: a row of more than MAX_ROW_BYTES."""
    rest = stream.read(len(codecs.BOM_UTF8))
    rest = b"" if rest == codecs.BOM_UTF8 else rest
    while new := stream.read(BLOCK_BYTES):
        rest += new
        found = cut.rows.match(rest) if b'"' in rest else None
        end = found.end() if found else 0 if b'"' in rest else max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
        if end:
            yield rest[:end]
            rest = rest[end:]
        if len(rest) > MAX_ROW_BYTES:
            raise ValueError(
                f"a row of more than {MAX_ROW_BYTES >> 20} MiB, as a quotation mark that is not closed makes it"
            )
    if rest:
        yield rest


def marked(block: bytes) -> bytes:
    """A block in UTF-8: the same bytes where it is, else with marks for those that are not."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return block.decode(errors=ESCAPE).encode()
    return block


def unmarked(column: pa.Array) -> pa.Array:
    """A binary column of a block that was marked, with its own bytes."""
    return pa.array([MARKED.sub(_byte, value) for value in column.to_pylist()], pa.binary())


def _byte(found: re.Match[bytes]) -> bytes:
    return bytes([ord(found.group().decode()) - MARK])


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(MARK + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE, _mark)
