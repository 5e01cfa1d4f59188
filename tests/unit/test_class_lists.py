"""Class splits that the user gives: lists, shares, everything in meta_test."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.chosen import Chosen
from pipeline.datasets.class_lists import by_lists, read_class_lists
from pipeline.datasets.prepare import prepare
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Problem, RawClass, Source
from pipeline.datasets.splits import random_split
from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.types import Split

BIRDS = {"birds/owl": "birds", "birds/tit": "birds", "fish/cod": "fish", "fish/eel": "fish", "apes/orang": "apes"}


class Plain(Source):
    preprocessing = Preprocessing(kind="photo", size=8)

    def classes(self) -> Iterator[RawClass]:
        return (RawClass(name, group, [1, 2]) for name, group in BIRDS.items())

    def read(self, items: Any) -> tuple[np.ndarray, list[Problem]]:
        return np.full((len(items), 8, 8, 1), 7, np.uint8), []

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {"random": random_split(list(BIRDS), seed=seed)}


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "birds,train\nfish/cod,val\nfish/eel,test\napes,meta_test\n",
        "class,part\r\nbirds,train\r\n\r\nfish/cod , validation\r\nfish/eel,test\r\napes,test\r\n",
        "﻿class\tsplit\nbirds\tmeta_train\nfish/cod\tdev\nfish/eel\ttest\napes\ttest",
    ],
)
def test_a_file_of_classes_and_groups_with_their_parts(text: str, tmp_path: Path) -> None:
    lists = read_class_lists(written(tmp_path / "lists.csv", text))
    assert by_lists(BIRDS, lists, source="lists.csv") == {
        "birds/owl": "meta_train",
        "birds/tit": "meta_train",
        "fish/cod": "meta_val",
        "fish/eel": "meta_test",
        "apes/orang": "meta_test",
    }


def test_a_file_for_each_part(tmp_path: Path) -> None:
    written(tmp_path / "train.txt", "birds/owl\n\nbirds/tit\n")
    written(tmp_path / "val.csv", "filename,label\n1.jpg,fish\n2.jpg,fish\n")
    written(tmp_path / "test.txt", "apes\n")
    written(tmp_path / "notes.txt", "nothing to do with it")
    assert read_class_lists(tmp_path) == {
        "birds/owl": "meta_train",
        "birds/tit": "meta_train",
        "fish": "meta_val",
        "apes": "meta_test",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("birds,trian\n", r"lists\.csv, line 1: write a class and its part"),
        ("birds,train\nfish\n", "line 2: write a class and its part"),
        (",train\n", "line 1: write a class"),
        ("birds,train\nbirds,test\n", "line 2: birds is in meta_train already"),
        ("", "names no classes"),
        ("class,part\n", "names no classes"),
        ('"birds,train\n', "line 1: write"),
    ],
)
def test_lists_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_class_lists(written(tmp_path / "lists.csv", text))


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*'ab,\t\n\r" é\0', "train", "test", "part"]), max_size=30).map("".join))
def test_any_text_is_a_list_or_a_data_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        assert set(read_class_lists(file).values()) <= {"meta_train", "meta_val", "meta_test"}
    except DataError as error:
        assert str(error).startswith(str(file))  # noqa: PT017


def test_places_that_hold_no_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        read_class_lists(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no train\.txt"):
        read_class_lists(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_class_lists(tmp_path)
    with pytest.raises(DataError, match=r"lists: birds/own: not in the raw data \(did you mean birds/owl\?\)"):
        by_lists(BIRDS, {"birds/own": "meta_test"}, source="lists")


def test_names_are_found_in_another_unicode_form_if_one_alone_is_meant(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    both = "e\u0301\u0323", "e\u0323\u0301"  # the same letter, neither in a normal form
    for here, there in ((composed, decomposed), (decomposed, composed)):
        lists = read_class_lists(written(tmp_path / "lists.csv", f"{here},train\nb,test\n"))
        assert by_lists({there: "all", "b": "all"}, lists, source="") == {there: "meta_train", "b": "meta_test"}
        assert by_lists({"x": there, "b": "all"}, lists, source="") == {"x": "meta_train", "b": "meta_test"}
    exact = by_lists({composed: "all", decomposed: "all"}, {composed: "meta_val"}, source="")
    assert exact == {composed: "meta_val"}
    letter = unicodedata.normalize("NFC", both[0])
    with pytest.raises(DataError, match=r"lists: .* may be 'e\\u0301\\u0323' and 'e\\u0323\\u0301' of the raw data"):
        by_lists(dict.fromkeys(both, "all"), {letter: "meta_val"}, source="lists")
    with pytest.raises(DataError, match=r"lists: .* is in meta_val already"):
        by_lists({composed: "all"}, {composed: "meta_val", decomposed: "meta_test"}, source="lists")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_a_list_ends_where_a_file_has_its_lines_end(end: str, tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x85d", "e\x0cf", "g"]
    (tmp_path / "train.txt").write_bytes(end.join(names).encode())
    assert list(read_class_lists(tmp_path)) == names
    (tmp_path / "lists.csv").write_bytes(end.join(f"{name},test" for name in names).encode())
    assert list(read_class_lists(tmp_path / "lists.csv")) == names


def test_unlisted_classes_are_left_out_and_told_of(tmp_path: Path) -> None:
    lists = written(tmp_path / "lists.csv", "birds/owl,train\nbirds/tit,val\nfish,test\n")
    chosen = Chosen(Plain(), lists=lists)
    manifest, _ = prepare(chosen, tmp_path / "out", record={}, workers=1)
    shards.verify(tmp_path / "out", manifest)
    assert manifest.splits == ["random", "lists"]
    assert Counter(entry.splits["lists"] for entry in manifest.classes) == {
        "meta_train": 1,
        "meta_val": 1,
        "meta_test": 2,
    }
    assert "apes/orang" not in {entry.name for entry in manifest.classes}
    assert manifest.source["remarks"] == [f"1 class is not in {lists} and left out: apes/orang"]
    assert "problems" not in manifest.source
    strict, _ = prepare(chosen, tmp_path / "strict", record={}, workers=1, strict=True)
    assert strict.digest == manifest.digest


def test_shares_are_of_the_classes_that_the_lists_keep(tmp_path: Path) -> None:
    lists = written(tmp_path / "lists.csv", "birds,train\nfish/cod,val\n")
    for seed in range(5):
        splits = Chosen(Plain(), shares=(1, 1, 1), lists=lists, all_test=True).splits(seed=seed)
        assert Counter(splits["random"].values()) == {"meta_train": 1, "meta_val": 1, "meta_test": 1}
        assert splits["all_test"].keys() == splits["lists"].keys() == {"birds/owl", "birds/tit", "fish/cod"}
        assert "group" not in splits, "two groups are left"


def test_shares_and_all_test() -> None:
    splits = Chosen(Plain(), shares=(3, 1, 1), all_test=True).splits(seed=0)
    assert Counter(splits["random"].values()) == {"meta_train": 3, "meta_val": 1, "meta_test": 1}
    assert set(splits["all_test"].values()) == {"meta_test"}
    of_group = {BIRDS[name]: part for name, part in splits["group"].items()}
    assert set(of_group.values()) == {"meta_train", "meta_val", "meta_test"}
    assert all(of_group[BIRDS[name]] == part for name, part in splits["group"].items())
    assert Chosen(Plain()).splits(seed=3) == Plain().splits(seed=3)
