"""What a table holds, found by reading it once: classes, kinds of columns, and rows that have no class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.labels import label_problem
from pipeline.datasets.source import Column
from pipeline.errors import DataError

MISSING = [
    "",
    "?",
    "NA",
    "N/A",
    "n/a",
    "NaN",
    "nan",
    "NULL",
    "null",
    "None",
]  # of features; a class may be so named
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
INTEGER = r"^[+-]?\d+([.,]0*)?$"
FRACTION = {  # by the decimal sign: a number with the other one
    ".": r"^[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?$",
    ",": r"^[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?$",
}
THOUSANDS = {".": r"^[+-]?[1-9]\d{0,2}(,\d{3})+$", ",": r"^[+-]?[1-9]\d{0,2}(\.\d{3})+$"}  # the same, of signs between
MAX_CATEGORIES = 1000  # of a column; with more it is no categorical one
LONGEST_CATEGORY = 1000  # characters
CONVERT = (
    "Convert the file to UTF-8: in Excel save it as 'CSV UTF-8', or use iconv -f LATIN1 -t UTF-8 (-f UTF-16 if Excel "
    "saved it as Unicode text)."
)
MAX_CLASSES = 1_000_000
MOSTLY = 0.9  # a column is numeric if more than this share of its values are numbers
LARGEST = float(np.finfo(np.float32).max)
WHOLE = 2.0**24  # float32 holds all whole numbers up to it, and float64 up to EXACT
EXACT = 2.0**53

Kind = Literal["numeric", "categorical"]


class Names(NamedTuple):
    """A column of names: one per row, or None and why not."""

    names: list[str | None]
    reasons: dict[int, str]  # row in the batch -> what is wrong with it


def names_of(array: pa.Array, *, what: str) -> Names:
    """Labels or groups in a batch's column."""
    names: list[str | None] = []
    reasons: dict[int, str] = {}
    problem = cache(label_problem)  # few names are of many rows
    for row, text in enumerate(texts_of(array)):
        name = text.strip() if text is not None else None
        reason = None
        if text is None and is_not_utf8(array, row):
            reason = f"its {what} is not UTF-8"
        elif not name:
            reason = f"has no {what}"
        else:
            wrong = problem(name)
            reason = f"its {what} is {wrong}" if wrong else None
        if reason:
            reasons[row] = reason
        names.append(None if reason else name)
    return Names(names, reasons)


def texts_of(array: pa.Array) -> list[str | None]:
    """A column as texts; None where it is null or no UTF-8. Raises DataError: it holds lists or structs."""
    if pa.types.is_nested(array.type):
        raise DataError(f"of type {array.type}, which holds no names or texts. Name another column.")
    if pa.types.is_floating(array.type):  # labels that were integers until one was missing
        return [None if x is None or x != x else str(int(x)) if x % 1 == 0 else str(x) for x in array.to_pylist()]
    if not is_binary(array.type):
        return [None if x is None else str(x) for x in array.to_pylist()]
    try:
        return array.cast(pa.string()).to_pylist()
    except pa.ArrowInvalid:
        return [_decoded(value) for value in array.to_pylist()]


def is_not_utf8(array: pa.Array, row: int) -> bool:
    """Whether that is why there is no text in a row; a number that is NaN is missing."""
    return is_binary(array.type) and bool(array[row].is_valid)


def undecodable(array: pa.Array) -> np.ndarray:
    """bool [rows]: bytes that are not UTF-8."""
    found = np.zeros(len(array), dtype=bool)
    if is_binary(array.type):
        try:
            array.cast(pa.string())
        except pa.ArrowInvalid:
            found[:] = [value is not None and _decoded(value) is None for value in array.to_pylist()]
    return found


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain(array: pa.Array) -> pa.Array:
    """A column in the type that stands for all of its like: no dictionary, view, run or extension is left.

    What no kernel of Arrow computes with becomes what holds the same values: float16 float32, short decimals long ones.
    """
    kind = array.type
    if isinstance(kind, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.string())
    if isinstance(kind, pa.Bool8Type):
        return array.cast(pa.bool_())
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(array))
    if pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.binary())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return array.cast(pa.large_list(kind.value_type))
    if pa.types.is_float16(kind):
        return array.cast(pa.float32())
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return array.cast(pa.decimal128(kind.precision, kind.scale))
    return array


def like(kind: pa.DataType) -> str | None:
    """What files must agree in about a column; None: it is missing in all rows."""
    if pa.types.is_null(kind):
        return None
    return "numbers" if is_numeric(kind) else "texts" if is_textual(kind) else "lists" if is_list(kind) else str(kind)


def is_textual(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_binary(kind))


class Numbers(NamedTuple):
    """A column of a batch as numbers."""

    values: np.ndarray  # float64 [rows]; NaN where missing or no number
    odd: np.ndarray  # bool [rows]: neither missing nor a number that float32 holds


def numbers_of(array: pa.Array, decimal: str = ".") -> Numbers:
    """decimal: the sign before the fraction of numbers that are written as texts, a point or a comma."""
    if pa.types.is_boolean(array.type) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        values = pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        odd = np.abs(values) > LARGEST
    elif pa.types.is_decimal(array.type):
        values = np.array([np.nan if x is None else float(x) for x in array.to_pylist()], dtype=np.float64)
        odd = np.abs(values) > LARGEST
    else:
        text = stripped(array)
        if decimal == ",":  # what has a point is no number then
            text = pc.replace_substring(pc.replace_substring(text, ".", "\0"), ",", ".")
        number = pc.match_substring_regex(text, NUMBER)
        values = pc.cast(pc.if_else(number, text, None), pa.float64()).to_numpy(zero_copy_only=False)
        missing = pc.or_(pc.is_null(text), pc.is_in(text, pa.array(MISSING))).to_numpy(zero_copy_only=False)
        odd = (np.isnan(values) & ~missing) | (np.abs(values) > LARGEST)
    return Numbers(np.where(odd, np.nan, values), odd)


def _rounded(values: np.ndarray, array: pa.Array) -> int:
    """How many of a column's values, float64 [rows], are whole numbers, also as texts, that float32 does not hold."""
    large = np.abs(values) > WHOLE
    if not large.any():
        return 0
    lost = (values.astype(np.float32) != values) | (np.abs(values) > EXACT)  # beyond it they are rounded already
    whole = np.trunc(values) == values
    if is_textual(array.type):
        whole &= pc.fill_null(pc.match_substring_regex(stripped(array), INTEGER), False).to_numpy(zero_copy_only=False)
    return int((large & lost & whole).sum())


def stripped(array: pa.Array) -> pa.Array:
    """A column's values as texts without blanks around them; what is no UTF-8 becomes U+FFFD, which is no number."""
    try:
        array = array.cast(pa.string())
    except pa.ArrowInvalid:
        array = pa.array([None if v is None else v.decode(errors="replace") for v in array.to_pylist()], pa.string())
    return pc.utf8_trim_whitespace(array)


def is_numeric(kind: pa.DataType) -> bool:
    """Whether its values are numbers, bools among them, or all missing."""
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numbers or pa.types.is_boolean(kind) or pa.types.is_null(kind))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def vectors_of(array: pa.Array, width: int) -> Numbers:
    """Lists of numbers as float64 [rows, width]; odd: of another length, or with one that float32 does not hold."""
    values = np.full((len(array), width), np.nan)
    odd = np.zeros(len(array), dtype=bool)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    right = lengths == width
    if right.any():
        flat = pc.list_flatten(array.filter(pa.array(right)))
        values[right] = pc.cast(flat, pa.float64(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, width)
    odd = (~right & (lengths >= 0)) | (np.abs(values) > LARGEST).any(axis=1)
    return Numbers(np.where(odd[:, None], np.nan, values), odd)


@dataclass
class ColumnScan:
    """What is known of a column so far."""

    name: str
    asked: Kind | None = None  # as the user says
    decimal: str = "."
    numbers: int = 0
    odd: int = 0  # values that are no numbers
    fractions: int = 0  # of them, those that are with the other decimal sign
    thousands: int = 0  # of those, the ones whose sign may as well part thousands
    missing: int = 0
    rounded: int = 0  # whole numbers that float32 does not hold
    undecodable: int = 0  # values that are not UTF-8
    longest: int = 0  # characters of a text
    lists: bool = False
    width: int | None = None  # of a column of lists
    values: set[str] = field(default_factory=set)  # at most MAX_CATEGORIES + 1

    def add(self, array: pa.Array) -> None:
        """Raises DataError: neither numbers nor texts."""
        if is_list(array.type):
            self._add_lists(array)
            return
        texts = is_textual(array.type)
        if not (texts or is_numeric(array.type)):
            raise self._no_feature(array.type)
        found = numbers_of(array, self.decimal)
        if texts and found.odd.any():
            thousands = pc.match_substring_regex(stripped(array), THOUSANDS[self.decimal])
            fractions = pc.or_(thousands, pc.match_substring_regex(stripped(array), FRACTION[self.decimal]))
            self.fractions += pc.sum(fractions, min_count=0).as_py()
            self.thousands += pc.sum(thousands, min_count=0).as_py()
        if not (pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):  # those of floats are measured
            self.rounded += _rounded(found.values, array)
        there = int((~np.isnan(found.values)).sum())
        self.numbers += there
        self.odd += int(found.odd.sum())
        self.missing += len(array) - there - int(found.odd.sum())
        if (texts or self.asked == "categorical") and self.asked != "numeric" and len(self.values) <= MAX_CATEGORIES:
            self.undecodable += int(undecodable(array).sum())
            distinct = [text for text in categories_of(pc.unique(array)) if text is not None]
            self.longest = max(self.longest, *map(len, distinct), 0)
            self.values.update(text[:LONGEST_CATEGORY] for text in distinct[: MAX_CATEGORIES + 1])

    def _add_lists(self, array: pa.Array) -> None:
        self.lists = True
        if self.asked == "categorical" or not is_numeric(array.type.value_type):
            raise self._no_feature(array.type)
        if self.width is None:
            lengths = Counter(length for length in pc.list_value_length(array).to_pylist() if length)
            if not lengths:
                self.missing += array.null_count
                return
            self.width = lengths.most_common(1)[0][0]  # a row of another length is a problem of that row
        found = vectors_of(array, self.width)
        self.missing += int(np.isnan(found.values[~found.odd]).sum())

    def _no_feature(self, kind: pa.DataType) -> DataError:
        return DataError(
            f"column {self.name!r}: of type {kind}, which is no feature. Leave it out (--leave-out {self.name})."
        )

    def remark(self) -> str | None:
        """What the user should know of it, once it is read."""
        if not self.rounded or self.lists or self.columns()[0].kind != "numeric":
            return None
        return (
            f"column {self.name!r}: {self.rounded} whole numbers above {WHOLE:,.0f} are rounded, as a feature is a "
            f"float32 of 24 bits, so neighbours become equal. Leave out what is no quantity (--leave-out {self.name}), "
            f"make categories of it (--categorical {self.name}), or subtract what all have in common."
        )

    def _check_fractions(self) -> None:
        """Raises DataError: numbers with the other decimal sign, which would become categories."""
        if self.asked == "categorical" or not self.fractions:
            return
        if self.numbers <= MOSTLY * (self.numbers + self.odd) < self.numbers + self.fractions:
            written, other = ("commas", ",") if self.decimal == "." else ("points", ".")
            if self.thousands == self.fractions:
                raise DataError(
                    f"column {self.name!r}: {self.fractions} of its values are numbers with {written} that may part "
                    f"thousands. If so, write them without; if they are decimal {written}, read them with --decimal "
                    f"'{other}'; or as categories with --categorical {self.name}."
                )
            raise DataError(
                f"column {self.name!r}: {self.fractions} of its values are numbers with decimal {written}. Read them "
                f"with --decimal '{other}', or as categories with --categorical {self.name}."
            )

    def columns(self) -> list[Column]:
        """What becomes of it in a vector.

        Raises DataError: too many different texts, empty lists alone, or numbers with the other decimal sign.
        """
        if self.lists and self.width is None:
            raise DataError(f"column {self.name!r}: its lists are all empty. Leave it out (--leave-out {self.name}).")
        if self.width is not None:
            return [Column(name=f"{self.name}[{i}]", missing=self.missing > 0) for i in range(self.width)]
        if self.undecodable > len(self.values):  # in another encoding, and not a few broken ones
            raise DataError(f"column {self.name!r}: {self.undecodable} of its values are not UTF-8. {CONVERT}")
        self._check_fractions()
        numeric = self.asked == "numeric" or not self.values
        if self.asked is None and self.values:
            numeric = self.numbers > MOSTLY * (self.numbers + self.odd)
        if numeric:
            return [Column(name=self.name, missing=self.missing > 0)]
        if len(self.values) > MAX_CATEGORIES:
            raise DataError(
                f"column {self.name!r}: more than {MAX_CATEGORIES} different texts, too many for categories. Leave it "
                f"out (--leave-out {self.name}), or, if the rows are texts, use it as the text (--text {self.name})."
            )
        if self.longest > LONGEST_CATEGORY:
            raise DataError(
                f"column {self.name!r}: a text of {self.longest:,} characters, too long for a category. Leave it out "
                f"(--leave-out {self.name}), or, if the rows are texts, use it as the text (--text {self.name})."
            )
        return [Column(name=self.name, kind="categorical", categories=sorted(self.values))]


def categories_of(array: pa.Array) -> list[str | None]:
    """Categories in a column: texts without blanks around them; None where there is none."""
    texts = (text.strip() if text is not None else None for text in texts_of(array))
    return [None if text in MISSING else text for text in texts]
