"""Tables of any bytes and types: a data set whose rows are right, or a UserError that names the file and the column."""

from __future__ import annotations

import codecs
import datetime
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.labels import label_problem
from pipeline.datasets.sources import read_options
from pipeline.datasets.tables import csv_blocks, scanning
from pipeline.errors import DataError, UserError

LARGEST = float(np.finfo(np.float32).max)


def read(name: str, file: Path, **options: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The examples of each class that has some, and the problems."""
    source = read_options(name, {"directory": file, **options}).open(seed=0)
    source.work_in(file.parent / uuid.uuid4().hex)
    found, problems = {}, []
    for raw in source.classes():
        examples, wrong = source.read(list(raw.items))
        problems += [(each.item, each.reason) for each in wrong]
        if len(examples):
            found[raw.name] = examples
    return found, problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


# --- CSV

WORDS = [
    "a",
    "grün",
    "日本",
    " b ",
    "x,y",
    'say "no"',
    "two\nlines",
    "two\r\nlines",
    "",
    " ",
    "NA",
    "'",
    "😀",
    "\t",
    "\x07",
]
BYTES = [word.encode() for word in WORDS] + [b"gr\xfcn", b"\xff\xfe", b"\xe4", b"\xc3", b"\xed\xa0\x80", b"\x93x\x94"]
ROW = st.tuples(st.sampled_from(BYTES), st.sampled_from(BYTES) | st.binary(max_size=5))


def cell(content: bytes, delimiter: bytes, quoted: bool) -> bytes:
    if quoted or any(byte in content for byte in (delimiter, b'"', b"\r", b"\n")):
        return b'"' + content.replace(b'"', b'""') + b'"'
    return content


def decoded(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROW, max_size=12),
    lines=st.lists(st.sampled_from(["row", "row", "blank", "short", "long"]), min_size=12, max_size=12),
    delimiter=st.sampled_from([b",", b";", b"\t", b"|"]),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    before=st.integers(0, 2),
    quoted=st.booleans(),
    bom=st.booleans(),
    ends=st.booleans(),
    block=st.sampled_from([1, 7, 64, 1 << 20]),
)
def test_rows_of_any_csv_are_right_or_told(
    folder: Path,
    rows: list[tuple[bytes, bytes]],
    lines: list[str],
    delimiter: bytes,
    newline: bytes,
    before: int,
    quoted: bool,
    bom: bool,
    ends: bool,
    block: int,
) -> None:
    """Against what the bytes say: UTF-8 with and without a mark, other encodings, quotes, blank and ragged rows."""
    rows = [(a, b) for a, b in rows if b"\0" not in b] + [(b"a", b"first"), (b"a", b"last")]
    written = [b""] * before + [cell(b"label", delimiter, quoted) + delimiter + cell(b"text", delimiter, quoted)]
    expected: dict[str, list[str]] = {}
    wrong: set[int] = set()  # rows as a spreadsheet counts them
    for (label, text), line in zip(rows, [*lines, "row", "row"], strict=False):
        if line == "blank":
            written.append(b"")
        if line == "short":
            written.append(b"gr\xfcn")
        if line == "long":
            written.append(delimiter.join([b"a", b'"b\n\xe4"', b"c"]))
        if line in ("short", "long"):
            wrong.add(len(written))
        written.append(delimiter.join([cell(label, delimiter, quoted), cell(text, delimiter, quoted)]))
        name, content = (decoded(label) or "").strip(), decoded(text)
        if label_problem(name) is None and content is not None and content.strip():
            expected.setdefault(name, []).append(content)
        else:
            wrong.add(len(written))
    file = folder / "t.csv"
    file.write_bytes(codecs.BOM_UTF8 * bom + newline.join(written) + newline * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_blocks, "BLOCK_BYTES", block)
        found, problems = read("csv", file, text="text", delimiter=delimiter.decode())
    assert found == expected
    assert sorted(item for item, _ in problems) == sorted(f"t.csv: row {row}" for row in wrong)


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"label,x\n", b'label,x\na,1\nb,"', b"\xef\xbb\xbflabel\n"]),
)
@pytest.mark.parametrize("no_header", [False, True])
def test_csv_of_any_bytes_is_read_or_refused(folder: Path, content: bytes, head: bytes, no_header: bool) -> None:
    file = folder / "bytes.csv"
    file.write_bytes(head + content)
    try:
        found, _ = read("csv", file, label="f0" if no_header else "label", no_header=no_header)
    except UserError as error:
        if "bytes.csv: " not in str(error) and "--label" not in str(error):
            raise
    else:
        assert found


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("no_header", [False, True])
def test_two_bytes_a_character_are_refused(tmp_path: Path, encoding: str, no_header: bool) -> None:
    (tmp_path / "t.csv").write_bytes("label,x\na,1\nb,2\n".encode(encoding))
    with pytest.raises(DataError, match=r"t\.csv: its first row is not UTF-8 but UTF-16.*iconv"):
        read("csv", tmp_path / "t.csv", label="f0" if no_header else "label", no_header=no_header)


def test_categories_in_another_encoding_are_told_and_not_missing(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"label,colour\n" + b"a,red\nb,blue\na,green\n" * 3 + b"a,gr\xfcn\n")
    found, problems = read("csv", file)
    assert problems == [("t.csv: row 11", "column 'colour' is not UTF-8")]
    assert found["a"].ravel().tolist() == [2, 1] * 3
    file.write_bytes(b"label,colour\n" + b"a,gr\xfcn\nb,wei\xdf\n" * 3)
    with pytest.raises(DataError, match=r"t\.csv: column 'colour': 6 of its values are not UTF-8\. Convert"):
        read("csv", file)


def test_headers_and_fields_that_are_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(csv_blocks, "MAX_ROW_BYTES", 150)
    monkeypatch.setattr(scanning, "LONGEST_CATEGORY", 80)
    file = tmp_path / "t.csv"
    for content, words in (
        (b"label,x,x\na,1,2\n", r"t\.csv: two columns are named 'x'"),
        (b"label,x\n", r"t\.csv: no row has a label"),
        (b"label,x\na,1,2\nb,2,3\n", r"t\.csv: no row has a label .*row 2 has 3 cells and not 2"),
        (b"label,w\na," + b"x" * 90 + b"\nb,y\n", r"t\.csv: column 'w': a text of 90 characters, too long for a c"),
        (
            b"label,w\n" + b"a,x\n" * 9 + b'b,"' + b"y\n" * 100,
            r"t\.csv: not a table .*row of more than 0 MiB.*not closed",
        ),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read("csv", file)


# --- Parquet

finite = st.floats(allow_nan=True, allow_infinity=True)
small = st.integers(-100, 100)
words = st.sampled_from(["red", "blue", " red ", "grün", "1", "-2.5", "?", "NA", ""])
day = st.dates(datetime.date(1990, 1, 1), datetime.date(2030, 1, 1))
moment = st.datetimes(datetime.datetime(1990, 1, 1), datetime.datetime(2030, 1, 1))
decimals = st.decimals(-99, 99, places=2, allow_nan=False)


def dictionary(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind).dictionary_encode()


def extension(kind: pa.DataType) -> Callable[..., pa.Array]:
    return lambda values, storage: pa.ExtensionArray.from_storage(kind, pa.array(values, storage))


NUMBERS: dict[str, Any] = {
    "int8": (small, pa.int8()),
    "uint64": (st.integers(0, 2**64 - 1), pa.uint64()),
    "float16": (st.floats(-100, 100, width=16), pa.float16()),
    "float32": (st.floats(width=32), pa.float32()),
    "float64": (finite, pa.float64()),
    "bool": (st.booleans(), pa.bool_()),
    "decimal32": (decimals, pa.decimal32(6, 2)),
    "decimal64": (decimals, pa.decimal64(12, 2)),
    "decimal128": (decimals, pa.decimal128(20, 2)),
    "decimal256": (decimals, pa.decimal256(60, 2)),
    "dictionary of int64": (small, pa.int64(), dictionary),
    "bool8": (st.sampled_from([0, 1]), pa.int8(), extension(pa.bool8())),
    "null": (st.none(), pa.null()),
}
TEXTS: dict[str, Any] = {
    "string": (words, pa.string()),
    "large_string": (words, pa.large_string()),
    "string_view": (words, pa.string_view()),
    "binary": (words.map(str.encode), pa.binary()),
    "large_binary": (words.map(str.encode), pa.large_binary()),
    "binary_view": (words.map(str.encode), pa.binary_view()),
    "dictionary of string": (words, pa.string(), dictionary),
    "json": (st.sampled_from(['"red"', "1", "[2]"]), pa.string(), extension(pa.json_(pa.string()))),
}
pair = st.lists(st.none() | st.floats(-9, 9, width=16), min_size=2, max_size=2)
LISTS: dict[str, Any] = {
    "list of float": (pair, pa.list_(pa.float32())),
    "large_list of double": (pair, pa.large_list(pa.float64())),
    "list of float16": (pair, pa.list_(pa.float16())),
    "list_view of float": (pair, pa.list_view(pa.float32())),
    "fixed_size_list of float": (pair, pa.list_(pa.float32(), 2)),
    "ragged list": (st.lists(small, max_size=3), pa.list_(pa.int64())),
}
OTHERS: dict[str, Any] = {
    "date32": (day, pa.date32()),
    "timestamp": (moment, pa.timestamp("us")),
    "timestamp with a zone": (moment, pa.timestamp("ms", "Europe/Berlin")),
    "time64": (st.times(), pa.time64("us")),
    "duration": (st.timedeltas(datetime.timedelta(0), datetime.timedelta(9)), pa.duration("us")),
    "struct": (st.fixed_dictionaries({"a": small}), pa.struct([("a", pa.int64())])),
    "map": (st.lists(st.tuples(words, small), max_size=2), pa.map_(pa.string(), pa.int64())),
    "list of string": (st.lists(words, max_size=2), pa.list_(pa.string())),
    "list of list": (st.lists(st.lists(small, max_size=2), max_size=2), pa.list_(pa.list_(pa.int64()))),
    "list of struct": (st.lists(st.fixed_dictionaries({"a": small})), pa.list_(pa.struct([("a", pa.int64())]))),
}
EVERY = {**NUMBERS, **TEXTS, **LISTS, **OTHERS}


@st.composite
def columns(draw: st.DrawFn, kinds: dict[str, Any]) -> tuple[str, list[Any], pa.Array]:
    """The name of a type, values, and them in a column."""
    name = draw(st.sampled_from(sorted(kinds)))
    value, kind, *make = kinds[name]
    values = draw(st.lists(st.none() | value, max_size=8))
    return name, values, (make[0] if make else pa.array)(values, kind)


def write(file: Path, rows: int, /, **columns: Any) -> Path:
    """rows: of a row group."""
    pq.write_table(pa.table(columns), file, row_group_size=rows)
    return file


def labels(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]  # a class per row: each row is told from the others


@settings(max_examples=120, deadline=None)
@given(column=columns(NUMBERS | TEXTS | LISTS), group=st.integers(1, 9))
def test_parquet_columns_become_the_numbers_that_they_hold(folder: Path, column: Any, group: int) -> None:
    name, values, array = column
    file = write(folder / "t.parquet", group, label=labels(len(values)), x=array, one=[1.0] * len(values))
    try:
        found, problems = read("parquet", file)
    except DataError as error:
        nothing = not values or (name in LISTS and not any(values))
        unreadable = name == "fixed_size_list of float" and "t.parquet: 'x' cannot be read" in str(error)  # by Arrow
        if not unreadable and not (nothing and "t.parquet: " in str(error)):
            raise
        return
    expected = reference(name, values)
    bad = [i for i, row in enumerate(expected) if row is None]
    assert sorted(found) == sorted(f"c{i}" for i in range(len(values)) if i not in bad)
    assert [item for item, _ in problems] == [f"t.parquet: row {i + 1}" for i in bad]
    for i, row in enumerate(expected):
        if row is not None:
            np.testing.assert_array_equal(found[f"c{i}"], np.array([[*row, 1.0]], np.float32))


def reference(name: str, values: list[Any]) -> list[list[float] | None]:
    """The numbers of each row, by Python alone; None: a problem."""
    if name in LISTS:
        widths = [len(value) for value in values if value]
        width = max(widths, key=lambda w: (widths.count(w), -widths.index(w)))
        return [
            [np.nan] * width if v is None else [np.nan if x is None else x for x in v] if len(v) == width else None
            for v in values
        ]
    if name in TEXTS:
        texts = [(v.decode() if isinstance(v, bytes) else v).strip() if v is not None else "" for v in values]
        known = sorted({text for text in texts if text not in scanning.MISSING})
        numbers = [text for text in texts if text in ("1", "-2.5")]
        if len(numbers) <= scanning.MOSTLY * sum(text in known for text in texts) and known:
            return [[known.index(text) if text in known else np.nan] for text in texts]
        return [[float(text) if text in known else np.nan] for text in texts]
    numeric = [np.nan if value is None else float(value) for value in values]
    return [None if abs(value) > LARGEST else [value] for value in numeric]


@settings(max_examples=80, deadline=None)
@given(column=columns(EVERY), group=st.integers(1, 9), role=st.sampled_from(["label", "group", "text", "image", "x"]))
def test_parquet_columns_of_any_type_are_used_or_named(folder: Path, column: Any, group: int, role: str) -> None:
    """In any role: every row is an example or a problem, or the error names the file and the column."""
    name, values, array = column
    given = {"label": ["a"] * len(values), "text": ["t"] * len(values), role: array}
    file = write(folder / "r.parquet", group, **given)
    options = {"label": "label"} | ({role: role} if role in ("group", "text", "image") else {})
    try:
        found, problems = read("parquet", file, **options)
    except DataError as error:
        if "r.parquet: " not in str(error) or (f"'{role}'" not in str(error) and any(v is not None for v in values)):
            raise
    else:
        assert sum(map(len, found.values())) + len(problems) == len(values)
        assert role != "x" or name not in OTHERS


def test_files_of_one_table_agree_in_their_types(tmp_path: Path) -> None:
    """The numbers 1 of one file are no category "1" of another, and were missing values once."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.parquet", 9, label=["a", "b"], x=pa.nulls(2), y=[1, 2])
    write(tmp_path / "in" / "b.parquet", 9, label=["a", "b"], x=["red", "1"], y=[1.5, 2.5])
    found, problems = read("parquet", tmp_path / "in")
    np.testing.assert_array_equal(found["a"], np.float32([[np.nan, 1], [1, 1.5]]))
    assert not problems
    write(tmp_path / "in" / "c.parquet", 9, label=["a", "b"], x=[1, 2], y=[1, 2])
    with pytest.raises(DataError, match=r"c\.parquet: column 'x' is of type int64, and of type string in b\.parquet"):
        read("parquet", tmp_path / "in")


def test_struct_rows_that_are_null_and_pictures_in_views(tmp_path: Path) -> None:
    mask = pa.array([False, True, False])
    for kind in (pa.binary(), pa.binary_view(), pa.large_binary()):
        struct = pa.StructArray.from_arrays([pa.array([b"1", b"2", b"3"], kind)], ["bytes"], mask=mask)
        _, problems = read("parquet", write(tmp_path / "t.parquet", 9, label=["a"] * 3, x=struct), image="x")
        assert problems[0] == ("t.parquet: row 2", "has no picture")
        assert len(problems) == 3


def test_names_of_columns_with_dots(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", 9, label=["a"] * 2, **{"a.b": [1, 2], "a": [{"b": 3}] * 2, "é ": [5, 6]})
    assert read("parquet", file, leave_out=["a"])[0]["a"].tolist() == [[1, 5], [2, 6]]


def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.csv"
    file.write_text("label,x\na,1\nb,2\n")
    source = read_options("csv", {"directory": file}).open(seed=0)
    source.work_in(tmp_path / "own")
    assert list(source.class_groups()) == ["a", "b"]
    file.write_text("label,x\na,1\nnew,2\nb,3\n")
    with pytest.raises(DataError, match="was changed while it was read"):
        list(source.classes())
