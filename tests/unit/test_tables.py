"""CSV and Parquet tables as sources: every row lands in its class, and what cannot is counted."""

from __future__ import annotations

import csv
import errno
import io
import os
import pickle
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import prepare as preparing
from pipeline.datasets import room, tables
from pipeline.datasets.chosen import Chosen
from pipeline.datasets.prepare import prepare
from pipeline.datasets.sources import read_options
from pipeline.datasets.tables.source import Table
from pipeline.errors import ConfigError, DataError, Unfinished
from pipeline.tasks import shards
from pipeline.tasks.shards import spool
from tests.disks import enlarge, largest_file, small_disk


def prepared(name: str, place: Path, out: Path, *, workers: int = 1, strict: bool = False, **options: Any) -> Any:
    """The manifest, and the examples of each class."""
    chosen = read_options(name, {"directory": place, **options})
    source = chosen.open(seed=0)
    manifest, _ = prepare(source, out, record=chosen.record(), workers=workers, strict=strict)
    with shards.ShardReader(out, manifest) as reader:
        examples = [reader.read_class(i) for i in range(len(manifest.classes))]
    return manifest, dict(zip([entry.name for entry in manifest.classes], examples, strict=True))


def write_csv(file: Path, rows: list[list[Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return file


def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data, found.target


def test_scikit_learns_digits_by_way_of_csv(tmp_path: Path) -> None:
    """All of them, class by class in the order of the file."""
    pixels, labels = digits()
    names = [*(f"pixel{i}" for i in range(64)), "digit"]
    rows = np.column_stack([pixels.astype(int), labels])
    file = write_csv(tmp_path / "digits.csv", [names, *rows.tolist()])
    manifest, examples = prepared("csv", file, tmp_path / "out", label="digit")
    assert [column.name for column in manifest.columns] == names[:-1]
    assert not any(column.missing for column in manifest.columns)
    assert sorted(examples) == [str(d) for d in range(10)]
    for digit in range(10):
        np.testing.assert_array_equal(examples[str(digit)], pixels[labels == digit].astype(np.float32))
    assert manifest.source["label"] == "digit"


@pytest.mark.parametrize("batch", [3, 1000])
def test_parquet_is_as_csv_and_batches_do_not_matter(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = (part[:60] for part in digits())
    names = [f"pixel{i}" for i in range(64)]
    table = pa.table({name: column for name, column in zip(names, pixels.T, strict=True)} | {"label": labels})
    (tmp_path / "in").mkdir()
    pq.write_table(table[:25], tmp_path / "in" / "a.parquet")
    pq.write_table(table[25:], tmp_path / "in" / "b.parquet")
    file = write_csv(tmp_path / "all.csv", [[*names, "label"], *np.column_stack([pixels, labels]).tolist()])
    monkeypatch.setattr(tables.batches, "BATCH_ROWS", batch)
    of_parquet, examples = prepared("parquet", tmp_path / "in", tmp_path / "parquet")
    of_csv, others = prepared("csv", file, tmp_path / "csv")
    assert {k: v.tolist() for k, v in examples.items()} == {k.removesuffix(".0"): v.tolist() for k, v in others.items()}
    assert [c.sha256 for c in of_parquet.classes] == [c.sha256 for c in of_csv.classes]


def test_kinds_of_columns_are_found_or_given(tmp_path: Path) -> None:
    rows = [
        ["label", "size", "colour", "zip", "mostly"],
        ["a", "1.5", "red", "10115", "1"],
        ["b", "", "blue", "20095", "2"],
        ["a", " 2e3 ", "?", "10115", "3"],
        ["b", "-.5", "red", "", "4"],
    ]
    file = write_csv(tmp_path / "t.csv", rows)
    manifest, examples = prepared("csv", file, tmp_path / "out", categorical=["zip"], leave_out=["mostly"])
    size, colour, code = manifest.columns
    assert (size.kind, size.missing) == ("numeric", True)
    assert (colour.kind, colour.categories) == ("categorical", ["blue", "red"])
    assert (code.kind, code.categories) == ("categorical", ["10115", "20095"])
    nan = np.nan
    np.testing.assert_array_equal(examples["a"], np.float32([[1.5, 1, 0], [2000, nan, 0]]))
    np.testing.assert_array_equal(examples["b"], np.float32([[nan, 0, 1], [-0.5, 1, nan]]))


def test_bad_rows_are_counted_named_and_left_out(tmp_path: Path) -> None:
    good = [["a", "1"], ["b", "2"], ["a", "3"]] * 10
    file = tmp_path / "t.csv"
    write_csv(file, [["label", "x"], *good, ["", "4"], [" ", "5"], ["a", "1e99"], ["b", "large"], ["a" * 300, "6"]])
    with file.open("ab") as stream:
        stream.write(b"a,7,too,many\r\nb\xff,8\r\nb,9\r\n")
    manifest, examples = prepared("csv", file, tmp_path / "out")
    assert {name: len(found) for name, found in examples.items()} == {"a": 20, "b": 11}
    assert examples["b"][-1] == 9
    problems = manifest.source["problems"]
    assert problems["count"] == 7
    reasons = {item: reason for item, reason in problems["first"]}
    assert reasons["t.csv: row 32"] == reasons["t.csv: row 33"] == "has no label"
    assert reasons["t.csv: row 34"] == reasons["t.csv: row 35"] == "column 'x' holds no finite number"
    assert reasons["t.csv: row 36"] == "its label is a name of 300 characters; 200 are the most"
    assert reasons["t.csv: row 37"] == "has 4 cells and not 2"
    assert reasons["t.csv: row 38"] == "its label is not UTF-8"
    with pytest.raises(DataError, match="row 32"):
        prepared("csv", file, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_texts_in_groups_are_read_by_other_processes_as_well(tmp_path: Path) -> None:
    """A label in two groups is two classes; a text may hold what a cell may."""
    rows = [[f'say "{i}", please\nnow', f"intent{i % 3}", f"domain{i % 4}"] for i in range(480)]
    file = write_csv(tmp_path / "t.csv", [["sentence", "label", "domain"], *rows, ["", "intent0", "domain0"]])
    given = {"text": "sentence", "group": "domain"}
    manifest, examples = prepared("csv", file, tmp_path / "out", **given)
    assert manifest.modality == "text"
    assert len(examples) == 12
    assert set(manifest.splits) == {"random", "group"}
    assert examples["domain1/intent2"] == [row[0] for row in rows if row[1:] == ["intent2", "domain1"]]
    assert manifest.source["problems"]["first"] == [["t.csv: row 482", "has no text"]]
    again, _ = prepared("csv", file, tmp_path / "again", workers=2, **given)
    assert again.digest == manifest.digest


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (value, 0, 255 - value)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("struct", [False, True])
def test_pictures_as_hubs_store_them(tmp_path: Path, struct: bool) -> None:
    files = [picture(10 * i) for i in range(12)] + [b"no picture", None]
    labels = [i % 2 for i in range(14)]
    column = [None if f is None else {"bytes": f, "path": "a.png"} for f in files] if struct else files
    pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / "t.parquet")
    manifest, examples = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out", image="image", size=8)
    assert manifest.shape == (8, 8, 3)
    assert [len(found) for found in examples.values()] == [6, 6]
    assert examples["1"][2].reshape(-1, 3)[0].tolist() == [50, 0, 205]
    assert manifest.source["problems"]["count"] == 2
    broken = "not a picture that can be read (PNG and JPEG are). Remove or convert it."
    assert sorted(manifest.source["problems"]["first"]) == [
        ["t.parquet: row 13", broken],
        ["t.parquet: row 14", "has no picture"],
    ]


class Sent:
    """A value as another machine gets it."""

    def __init__(self, value: Any) -> None:
        self._value = pickle.dumps(value)

    def __call__(self) -> Any:
        return pickle.loads(self._value)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_broken_picture_is_told_by_its_file_and_row(tmp_path: Path, elsewhere: bool) -> None:
    """Classes are mixed, and files; also in a process that does not see where the rows lie."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        files = [picture(i) for i in range(6)]
        if name == "b":
            files[4:] = [files[4][:50], b"no picture"]
        pq.write_table(pa.table({"image": files, "label": list("bababa")}), tmp_path / "in" / f"{name}.parquet")
    source = read_options("parquet", {"directory": tmp_path / "in", "image": "image", "size": 8}).open(seed=0)
    source.work_in(tmp_path / "own")
    problems = []
    for raw in source.classes():
        items = list(raw.items)
        if elsewhere:
            items = list(source.elsewhere(items, Sent))
        problems += pickle.loads(pickle.dumps(source)).read(items)[1]
    assert [item for item, _ in problems] == ["b.parquet: row 6", "b.parquet: row 5"]
    assert all("row" not in reason and "picture 1" not in reason for _, reason in problems)


def test_lists_of_numbers_are_columns(tmp_path: Path) -> None:
    vectors = [[1.0, 2.0], [3.0, 4.0], [5.0], [6.0, float("inf")], None, [7.0, 8.0]]
    table = pa.table({"v": pa.array(vectors, pa.list_(pa.float32())), "x": range(6), "label": list("ababab")})
    pq.write_table(table, tmp_path / "t.parquet")
    manifest, examples = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")
    assert [column.name for column in manifest.columns] == ["v[0]", "v[1]", "x"]
    assert [column.missing for column in manifest.columns] == [True, True, False]
    np.testing.assert_array_equal(examples["a"], np.float32([[1, 2, 0], [np.nan, np.nan, 4]]))
    np.testing.assert_array_equal(examples["b"], np.float32([[3, 4, 1], [7, 8, 5]]))
    assert manifest.source["problems"]["count"] == 2


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(CELL, st.sampled_from(["a", "b", "", "nan"]), CELL), max_size=12))
def test_no_row_is_lost_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    """Every row is an example or a problem."""
    folder = tmp_path_factory.mktemp("table")
    rows += [("1", "a", "x"), ("2", "b", "y")]
    file = write_csv(folder / "t.csv", [["number", "label", "word"], *map(list, rows)])
    manifest, examples = prepared("csv", file, folder / "out", numeric=["number"], categorical=["word"])
    problems = manifest.source.get("problems", {"count": 0})["count"]
    assert sum(len(found) for found in examples.values()) + problems == len(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "lable"}, "--label lable: there is no such column; there are: label, x, name"),
        ({"text": "label"}, "--text label: this column is --label already"),
        ({"text": "name", "image": "x"}, "an example is one of them"),
        ({"label": "x"}, "30 different values in 30 rows. That is no label"),
        ({"leave_out": ["x", "name"]}, "no column beside the label is left"),
        ({"delimiter": "ab"}, "should be one character"),
        ({"delimiter": ";"}, "--label label: there is no such column"),
        ({}, "column 'name': more than 20 different texts.*--leave-out name"),
    ],
)
def test_tables_that_are_misread_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables.scanning, "MAX_CATEGORIES", 20)
    rows = [["ab"[i % 2], i, f"name{i}"] for i in range(30)]
    file = write_csv(tmp_path / "t.csv", [["label", "x", "name"], *rows])
    with pytest.raises((ConfigError, DataError), match=words):
        prepared("csv", file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("label,x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    for name, file, words in (
        ("csv", "empty.csv", "not a table that can be read"),
        ("csv", "header.csv", "no row has a label"),
        ("parquet", "bad.parquet", "not a Parquet file"),
        ("csv", "none.csv", "no such file or folder"),
        ("parquet", "", "not a Parquet file"),
    ):
        with pytest.raises(DataError, match=words):
            prepared(name, tmp_path / file, tmp_path / "out")


def test_a_copy_for_another_process_is_small_and_the_sorted_rows_go_with_the_preparation(tmp_path: Path) -> None:
    rows = [["ab"[i % 2], i] for i in range(2000)]
    file = write_csv(tmp_path / "t.csv", [["label", "x"], *rows])
    source = read_options("csv", {"directory": file}).open(seed=0)
    source.work_in(tmp_path / "own")
    first, _ = source.classes()
    items = list(first.items)
    copy = pickle.dumps(source)
    assert len(copy) < 1000
    np.testing.assert_array_equal(pickle.loads(copy).read(items)[0], source.read(items)[0])
    seen: list[Path] = []
    given = {"record": {}, "workers": 1, "progress": lambda _: seen.extend(tmp_path.glob(".out.partial-*/source/*"))}
    prepare(source, tmp_path / "out", **given)
    assert {file.name for file in seen} == {"rows.f32", "whole.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own", "t.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [shards.MANIFEST, "shards"]


def test_rows_of_a_table_that_was_edited_are_not_mixed_with_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes and counts stay, so items print the same; the numbers are others."""
    monkeypatch.setattr(preparing, "CHUNK_ITEMS", 1)
    file = tmp_path / "t.csv"

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    for number in (1, 2):
        write_csv(file, [["label", "x"], *([name, number] for name in "abcdef" for _ in range(3))])
        os.utime(file, ns=(number, number))
        chosen = read_options("csv", {"directory": file})
        if number == 1:
            with pytest.raises(KeyboardInterrupt):
                prepare(chosen.open(seed=0), tmp_path / "out", record=chosen.record(), workers=1, progress=stop)
            assert list(tmp_path.glob(".out.partial-*"))
    _, examples = prepared("csv", file, tmp_path / "out")
    assert {float(x) for found in examples.values() for x in found.ravel()} == {2}
    assert not list(tmp_path.glob(".out.partial-*"))


def test_a_header_that_is_no_utf8_says_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("label,größe\na,1\nb,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.csv: its first row is not UTF-8\. Convert"):
        prepared("csv", tmp_path / "t.csv", tmp_path / "out")


def test_class_splits_that_were_asked_for_do_not_sort_the_table_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_csv(tmp_path / "t.csv", [["label", "x"], *([name, 1] for name in "abcdef" for _ in range(3))])
    sorted_by = tables.sorting.SortedRows
    made: list[Any] = []
    monkeypatch.setattr(tables.sorting, "SortedRows", lambda *a, **k: made.append(1) or sorted_by(*a, **k))
    chosen = read_options("csv", {"directory": file})
    source = Chosen(chosen.open(seed=0), all_test=True)
    manifest, _ = prepare(source, tmp_path / "out", record=chosen.record(), workers=1)
    assert "all_test" in manifest.splits
    assert len(made) == 1


@pytest.mark.parametrize("value", ["a", [1.0], {"x": 1}])
def test_lists_of_no_numbers_are_no_feature(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.table({"v": [[value]] * 4, "label": list("abab")}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'v': of type list.*no feature.*--leave-out v"):
        prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")


@pytest.mark.parametrize("first", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_first_list_of_another_length_is_a_problem_of_its_row(tmp_path: Path, first: list[float]) -> None:
    table = pa.table({"v": [first, *([1.0, 2.0] for _ in range(5))], "label": list("ababab")})
    pq.write_table(table, tmp_path / "t.parquet")
    manifest, examples = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")
    assert {name: found.shape for name, found in examples.items()} == {"a": (2, 2), "b": (3, 2)}
    assert manifest.source["problems"]["first"] == [["t.parquet: row 1", "column 'v' holds no 2 finite numbers"]]
    assert not any(column.missing for column in manifest.columns)


def test_lists_that_are_all_empty_are_no_feature(tmp_path: Path) -> None:
    table = pa.table({"v": pa.array([[], None], pa.list_(pa.float32())), "x": [1, 2], "label": ["a", "a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'v': its lists are all empty.*--leave-out v"):
        prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")


def test_what_stands_for_no_value_elsewhere_may_be_a_class(tmp_path: Path) -> None:
    """And names that no manifest may hold are counted, whichever control character is in them."""
    names = ["None", "NA", "null", "?"]
    rows = [[name, i] for name in [*names, "", " ", "a\x85b", "a\x7fb"] for i in range(2)]
    manifest, examples = prepared("csv", write_csv(tmp_path / "t.csv", [["label", "x"], *rows]), tmp_path / "out")
    assert sorted(examples) == sorted(names)
    found = [reason for _, reason in manifest.source["problems"]["first"]]
    assert found[:4] == ["has no label"] * 4
    assert len(found) == 8
    assert all("control characters" in reason for reason in found[4:])


def test_a_label_that_is_nan_is_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1.0, float("nan"), 1.0], "x": [1, 2, 3]}), tmp_path / "t.parquet")
    manifest, examples = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")
    assert list(examples) == ["1"]
    assert manifest.source["problems"]["first"] == [["t.parquet: row 2", "has no label"]]


def test_rows_of_no_class_are_told_also_where_lists_leave_the_first_class_out(tmp_path: Path) -> None:
    rows = [["label", "x"], *[[name, 1] for name in "abcd"], ["", 2]]
    file = write_csv(tmp_path / "t.csv", rows)
    lists = tmp_path / "lists.csv"
    lists.write_text("b,train\nc,val\nd,test\n")
    options = read_options("csv", {"directory": file})
    manifest, _ = prepare(Chosen(options.open(seed=0), lists=lists), tmp_path / "out", record=options.record())
    assert [entry.name for entry in manifest.classes] == ["b", "c", "d"]
    assert ["t.csv: row 6", "has no label"] in manifest.source["problems"]["first"]
    assert manifest.source["problems"]["count"] == 1
    assert manifest.source["remarks"] == [f"1 class is not in {lists} and left out: a"]


CAFES = [unicodedata.normalize(form, "café") for form in ("NFD", "NFC")]


def test_labels_in_another_form_are_left_out_and_those_that_look_alike_told_of(tmp_path: Path) -> None:
    rows = [[name, i] for name in [*CAFES, "Dog", "dog"] for i in range(10)]
    file = write_csv(tmp_path / "t.csv", [["label", "x"], *rows])
    manifest, examples = prepared("csv", file, tmp_path / "out")
    assert list(examples) == ["Dog", CAFES[0], "dog"]
    assert all(found.ravel().tolist() == list(range(10)) for found in examples.values())
    found = dict(manifest.source["problems"]["first"])
    assert manifest.source["problems"]["count"] == len(found) == 2
    assert "another Unicode form" in found[f"class {CAFES[1]!r}"]
    assert "by case or form alone; both are kept" in found["class 'dog'"]
    with pytest.raises(DataError, match="another Unicode form"):
        prepared("csv", file, tmp_path / "strict", strict=True)


def test_two_pairs_of_group_and_label_with_one_name_are_told_with_their_columns(tmp_path: Path) -> None:
    members = [("a", "b/c"), ("a/b", "c"), ("a", "d"), ("x" * 150, "y" * 150)]
    file = write_csv(tmp_path / "t.csv", [["clinic", "label", "x"], *([*each, i] for each in members for i in (1, 2))])
    manifest, examples = prepared("csv", file, tmp_path / "out", group="clinic")
    assert {name: len(found) for name, found in examples.items()} == {
        "a/b/c": 2,
        "a/d": 2,
        f"{members[-1][0]}/{members[-1][1]}": 2,
    }
    assert manifest.classes[0].group == "a"
    ((item, reason),) = manifest.source["problems"]["first"]
    assert item == "class 'a/b/c'"
    assert reason.startswith("clinic 'a/b' with label 'c' has the name that clinic 'a' with label 'b/c' has; rename")
    with pytest.raises(DataError, match="clinic 'a/b' with label 'c'"):
        prepared("csv", file, tmp_path / "strict", group="clinic", strict=True)


@pytest.mark.parametrize("named", [False, True])
def test_an_index_of_pandas_is_no_feature_unless_asked_for(tmp_path: Path, named: bool) -> None:
    frame = pa.table({"label": list("aabb"), "x": [5, 8, 7, 6]}).to_pandas().sort_values("x")
    frame.index.name = "patient" if named else None
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv")
    manifest, _ = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out")
    name = "patient" if named else "__index_level_0__"
    assert [column.name for column in manifest.columns] == ["x"]
    (remark,) = manifest.source["remarks"]
    assert remark.startswith(f"column {name!r} is left out, as an index")
    assert manifest.source.get("problems") is None
    for asked in ({"features": ["x", name]}, {"numeric": [name]}):
        manifest, _ = prepared("parquet", tmp_path / "t.parquet", tmp_path / next(iter(asked)), **asked)
        assert sorted(column.name for column in manifest.columns) == sorted(["x", name])
        assert "remarks" not in manifest.source
    if not named:
        manifest, _ = prepared("csv", tmp_path / "t.csv", tmp_path / "csv")
        assert [column.name for column in manifest.columns] == ["x"]
        frame.reset_index(names="Unnamed: 0").to_csv(tmp_path / "t.csv", index=False)
        assert [c.name for c in prepared("csv", tmp_path / "t.csv", tmp_path / "read")[0].columns] == ["x"]


def test_a_range_that_pandas_does_not_write_and_notes_of_others_leave_nothing_out(tmp_path: Path) -> None:
    for number, note in enumerate([None, b"no json", b"[]", b'{"index_columns": [{"kind": "range"}]}']):
        rows = pa.table({"label": list("ab"), "x": [1, 2]})
        rows = rows.replace_schema_metadata(None if note is None else {b"pandas": note})
        pq.write_table(rows, tmp_path / "t.parquet")
        manifest, _ = prepared("parquet", tmp_path / "t.parquet", tmp_path / str(number))
        assert [column.name for column in manifest.columns] == ["x"]
        assert "remarks" not in manifest.source


def test_decimal_commas_are_numbers_if_asked_for_and_never_categories(tmp_path: Path) -> None:
    written = ["1,5", "-2", "", "+3,25", ",5", "4,", "1,5e3", " 7,0 "]
    file = tmp_path / "t.csv"
    file.write_text("label;länge\n" + "".join(f"{'ab'[i % 2]};{x}\n" for i, x in enumerate(written)), encoding="utf-8")
    manifest, examples = prepared("csv", file, tmp_path / "out", delimiter=";", decimal=",")
    assert manifest.columns[0].kind == "numeric"
    assert manifest.source["decimal"] == ","
    np.testing.assert_array_equal(examples["a"].ravel(), np.float32([1.5, np.nan, 0.5, 1500]))
    np.testing.assert_array_equal(examples["b"].ravel(), np.float32([-2, 3.25, 4, 7]))
    for asked in ({}, {"numeric": ["länge"]}):
        with pytest.raises(DataError, match=r"t\.csv: column 'länge': 6 of its values.*commas.*--decimal ','.*--categ"):
            prepared("csv", file, tmp_path / "no", delimiter=";", **asked)
    manifest, _ = prepared("csv", file, tmp_path / "codes", delimiter=";", categorical=["länge"])
    assert len(manifest.columns[0].categories) == 7
    with pytest.raises(ConfigError, match=r"there are: label;länge\. If a semicolon .* say --delimiter ';'"):
        prepared("csv", file, tmp_path / "no")
    rows = [["label", "x"], *[["ab"[i % 2], f"{i}.5"] for i in range(9)]]
    with pytest.raises(DataError, match=r"decimal points\. Read them with --decimal '\.'"):
        prepared("csv", write_csv(file, rows), tmp_path / "no", decimal=",")


def test_commas_that_may_part_thousands_are_not_taken_for_decimal_ones(tmp_path: Path) -> None:
    rows = [["label", "x"], *[["ab"[i % 2], x] for i, x in enumerate(["12,345", "1,234", "999", "-7,000", "88,123"])]]
    with pytest.raises(
        DataError, match=r"column 'x': 4 of its values .* may part thousands\. If so, write them without"
    ):
        prepared("csv", write_csv(tmp_path / "t.csv", rows), tmp_path / "no")
    rows = [["label", "x"], *[["ab"[i % 2], f"1,{200 + i},567"] for i in range(9)]]
    with pytest.raises(DataError, match=r"9 of its values .* may part thousands"):
        prepared("csv", write_csv(tmp_path / "t.csv", rows), tmp_path / "no")
    rows = [["label", "x"], *[["ab"[i % 2], f"0,{125 + i}"] for i in range(9)]]
    with pytest.raises(DataError, match="9 of its values are numbers with decimal commas"):
        prepared("csv", write_csv(tmp_path / "t.csv", rows), tmp_path / "no")


def test_two_columns_of_vectors_have_two_names(tmp_path: Path) -> None:
    table = pa.table({"label": list("abab"), "v": [[1.0, 2.0]] * 4, "v[0]": [3.0] * 4})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"two columns of vectors would be named 'v\[0\]'\. Leave one out"):
        prepared("parquet", tmp_path / "t.parquet", tmp_path / "no")


def test_a_folder_that_is_named_like_a_file_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "p" / "out.parquet").mkdir(parents=True)
    pq.write_table(pa.table({"label": list("ab"), "x": [1, 2]}), tmp_path / "p" / "out.parquet" / "part-0.parquet")
    manifest, _ = prepared("parquet", tmp_path / "p", tmp_path / "out")
    assert manifest.num_examples == 2


def test_files_lie_in_folders_below_if_none_lies_in_the_one_given(tmp_path: Path) -> None:
    """As a hub lays them; a file that lies there already is not joined by others."""
    for number, part in enumerate(("train", "test", ".cache")):
        (tmp_path / "hub" / "data" / part).mkdir(parents=True)
        rows = pa.table({"label": ["a", "b", None], "x": [number, number, 9]})
        pq.write_table(rows, tmp_path / "hub" / "data" / part / "0.parquet")
    manifest, examples = prepared("parquet", tmp_path / "hub", tmp_path / "out")
    assert examples["a"].ravel().tolist() == [1, 0]
    assert [item for item, _ in manifest.source["problems"]["first"]] == [
        "data/test/0.parquet: row 3",
        "data/train/0.parquet: row 3",
    ]
    pq.write_table(pa.table({"label": ["a"], "x": [7]}), tmp_path / "hub" / "top.parquet")
    assert prepared("parquet", tmp_path / "hub", tmp_path / "top")[1]["a"].ravel().tolist() == [7]
    with pytest.raises(DataError, match=r"hub: holds no file named \*\.csv.*nor do the folders in it"):
        prepared("csv", tmp_path / "hub", tmp_path / "none")


def test_whole_numbers_that_float32_rounds_are_told_of(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([2**63 + i for i in range(4)], pa.uint64()),
        "text": [str(2**24 + i) for i in range(4)],  # every other one is held
        "even": [2**24 + 2 * i for i in range(4)],
        "code": [2**25 + i for i in range(4)],
        "measured": [1e15 + i for i in range(4)],
        "written": ["6.02214076e23", "1e20", "3e9", "2.5"],
        "small": [0, -5, 2**24, 3],
    }
    pq.write_table(pa.table({"label": list("abab"), **columns}), tmp_path / "t.parquet")
    manifest, _ = prepared("parquet", tmp_path / "t.parquet", tmp_path / "out", categorical=["code"])
    first, second = manifest.source["remarks"]
    assert first.startswith("column 'id': 4 whole numbers above 16,777,216 are rounded")
    assert second.startswith("column 'text': 2 whole numbers")
    assert "--leave-out text" in second
    many = pa.table({"label": list("ab"), **{f"x{i}": [2**30 + 1, 2**30] for i in range(9)}})
    pq.write_table(many, tmp_path / "many.parquet")
    remarks = prepared("parquet", tmp_path / "many.parquet", tmp_path / "many")[0].source["remarks"]
    assert len(remarks) == 6
    assert remarks[-1].startswith("4 other columns")


def test_items_of_pictures_are_bounded_by_what_they_decode_to(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture(1)] * 10, "label": ["a"] * 10}), tmp_path / "t.parquet")
    source = read_options("parquet", {"directory": tmp_path / "t.parquet", "image": "image", "size": 100}).open(seed=0)
    source.work_in(tmp_path / "own")
    (only,) = source.classes()
    items = list(only.items)
    assert [item.stop - item.start for item in items] == [2] * 5
    assert sum(len(source.read([item])[0]) for item in items) == 10


def test_parquet_batches_are_short_where_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.batches, "BATCH_BYTES", 40_000)
    file = tmp_path / "t.parquet"
    schema = pa.schema({"image": pa.binary(), "other": pa.binary(), "label": pa.string()})
    sizes = [1, 1, 10_000]
    with pq.ParquetWriter(file, schema, use_dictionary=False, compression="none") as writer:
        for size in sizes:
            content = [os.urandom(size) for _ in range(8)]
            writer.write_table(pa.table([content, [bytes(50_000)] * 8, ["a"] * 8], schema=schema))
    found = list(tables.batches.ParquetFiles(file).batches(["image", "label"]))
    assert max(len(batch.numbers) for batch in found[-3:]) == 3
    assert sum(len(batch.numbers) for batch in found[:-3]) == 16
    assert np.concatenate([batch.numbers for batch in found]).tolist() == list(range(1, 25))


# --- disks that are full


def wide_table(file: Path, rows: int = 1000) -> Path:
    values = np.random.default_rng(0).normal(size=(40, rows)).astype(np.float32)
    columns = {f"x{i}": column for i, column in enumerate(values)}
    pq.write_table(pa.table({"label": [f"c{i % 10}" for i in range(rows)], **columns}), file)
    return file


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_room_for_the_sorted_rows_is_taken_before_they_are_written(tmp_path: Path) -> None:
    file = wide_table(tmp_path / "t.parquet")
    with (
        largest_file(100_000),
        pytest.raises(Unfinished, match=r"no room for the table's rows.*160\.0 kB are needed.*Make room on that disk"),
    ):
        prepared("parquet", file, tmp_path / "out")
    (left,) = tmp_path.glob(".out.partial-*")
    assert not (left / "source").exists(), "what is of no use kept its room"
    prepared("parquet", file, tmp_path / "out")
    prepared("parquet", file, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_file_system_without_reservations_is_asked_how_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("wb") as file:
        room.reserve(file.fileno(), 1000)
        with pytest.raises(OSError, match="No space left"):
            room.reserve(file.fileno(), 1 << 60)
    table = wide_table(tmp_path / "t.parquet")
    with largest_file(100_000), pytest.raises(Unfinished, match="no room for the table's rows"):
        prepared("parquet", table, tmp_path / "out")


@pytest.mark.parametrize("kilobytes", [100, 220, 320])
def test_a_full_disk_stops_the_preparation_and_room_lets_it_go_on(
    tmp_path: Path, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the sorted rows, and at the data set beside them, which does not have them sorted again."""
    monkeypatch.setattr(preparing, "CHUNK_ITEMS", 1)
    monkeypatch.setattr(shards, "ShardWriter", partial(shards.ShardWriter, row_group_bytes=8000, shard_bytes=30_000))
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 20_000)
    file = wide_table(tmp_path / "t.parquet")
    with small_disk(tmp_path / "small", kilobytes=kilobytes) as disk:
        with pytest.raises(Unfinished, match=r"small/\.out\.partial.*no room for.*No space left.*are needed.* free"):
            prepared("parquet", file, disk / "out")
        enlarge(disk, kilobytes=4000)
        sorted_again: list[Any] = []
        monkeypatch.setattr(Table, "_sort", lambda *given, _sort=Table._sort: sorted_again.append(1) or _sort(*given))
        prepared("parquet", file, disk / "out")
        assert bool(sorted_again) == (kilobytes == 100)
        prepared("parquet", file, tmp_path / "whole")
        assert bytes_of(disk / "out") == bytes_of(tmp_path / "whole")
        assert [path.name for path in disk.iterdir()] == ["out"]
