"""CLINC150 in its official format: made here, and the real one where it lies beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.clinc150 import Clinc150
from pipeline.datasets.prepare import prepare
from pipeline.errors import DataError
from pipeline.tasks import shards
from tests.conftest import REPOSITORY


def write(folder: Path, sentences: dict[str, Any], domains: dict[str, Any]) -> Path:
    (folder / "data_full.json").write_text(json.dumps(sentences))
    (folder / "domains.json").write_text(json.dumps(domains))
    return folder


def small(folder: Path) -> Path:
    domains = {f"domain{d}": [f"intent{d}{i}" for i in range(3)] for d in range(10)}
    intents = [intent for of_domain in domains.values() for intent in of_domain]
    parts = {"train": 4, "val": 1, "test": 2}
    sentences = {p: [[f"{p} {n} of {i}", i] for n in range(count) for i in intents] for p, count in parts.items()}
    return write(folder, {**sentences, "oos_train": [["out of scope", "oos"]]}, domains)


def test_intents_are_classes_of_their_domains_with_all_their_sentences(tmp_path: Path) -> None:
    manifest, _ = prepare(Clinc150(small(tmp_path)), tmp_path / "out", record={}, seed=5, workers=1)
    assert (manifest.modality, len(manifest.classes), manifest.num_examples) == ("text", 30, 210)
    with shards.ShardReader(tmp_path / "out", manifest) as reader:
        first = reader.read_class(0)
    assert manifest.classes[0].name == "domain0/intent00"
    assert first == [
        *(f"train {n} of intent00" for n in range(4)),
        "val 0 of intent00",
        *(f"test {n} of intent00" for n in range(2)),
    ]
    parts = {entry.group: entry.splits["domain"] for entry in manifest.classes}
    assert all(parts[entry.group] == entry.splits["domain"] for entry in manifest.classes)
    assert sorted(parts.values()) == ["meta_test"] * 3 + ["meta_train"] * 5 + ["meta_val"] * 2


def test_the_split_by_domain_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    source = Clinc150(small(tmp_path))
    one, other = source.splits(seed=0), source.splits(seed=1)
    assert one["domain"] == other["domain"]
    assert one["random"] != other["random"]


def test_sentences_that_are_none_are_problems(tmp_path: Path) -> None:
    found, problems = Clinc150(small(tmp_path)).read(["good", "", 7, "good"])
    assert found == ["good", "good"]
    assert [problem.item for problem in problems] == ["''", "7"]


@pytest.mark.parametrize(
    ("sentences", "domains", "words"),
    [
        ({"train": [["a", "x"]]}, {"d": ["y"]}, "intent 'x' of data_full.json is in no domain"),
        ({"train": [["a"]]}, {"d": ["x"]}, "no pair of a sentence and its intent"),
        ({"oos_train": []}, {"d": ["x"]}, "holds no sentences"),
        ({"train": "a"}, {"d": ["x"]}, "not as CLINC150 is published"),
        ([], {"d": ["x"]}, "not as CLINC150 is published"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, sentences: Any, domains: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Clinc150(write(tmp_path, sentences, domains))


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"domains\.json: no such file"):
        Clinc150(tmp_path)
    small(tmp_path)
    (tmp_path / "domains.json").write_bytes(b'{"a"\xff')
    with pytest.raises(DataError, match=r"domains\.json: cannot be read as JSON"):
        Clinc150(tmp_path)


@pytest.mark.data
def test_the_real_one(tmp_path: Path) -> None:
    folder = REPOSITORY.parent / "shared" / "data" / "clinc150"
    if not (folder / "data_full.json").is_file():
        pytest.skip(f"the real CLINC150 is not at {folder}")
    manifest, _ = prepare(Clinc150(folder), tmp_path / "out", record={}, workers=1)
    assert {entry.count for entry in manifest.classes} == {150}
    assert len(manifest.classes) == 150
    of_domain = {entry.group: entry.splits["domain"] for entry in manifest.classes}
    assert [d for d, part in of_domain.items() if part == "meta_test"] == ["auto_and_commute", "home", "work"]
