"""Data sets of vectors, texts and encoded images: what is written is read back and verified, as for images."""

import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.source import Column
from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.shards import ClassExamples, bounds, reader
from pipeline.tasks.shards.examples import ExamplesDigest
from pipeline.types import SPLITS

SHAPES: dict[str, tuple[int, ...] | None] = {"vector": None, "text": None, "encoded_image": (16, 16, 3)}
vectors = st.lists(st.lists(st.floats(width=32, allow_infinity=False), min_size=3, max_size=3), min_size=1, max_size=9)
EXAMPLES: dict[str, Any] = {
    "vector": vectors.map(lambda rows: np.array(rows, np.float32)),
    "text": st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=9),
    "encoded_image": st.lists(st.binary(max_size=40), min_size=1, max_size=9),
}


def write(out: Path, modality: str, classes: list[Any], **options: Any) -> shards.Manifest:
    named = [ClassExamples(f"class{i}", "all", examples) for i, examples in enumerate(classes)]
    parts = {raw.name: SPLITS[i % 3] for i, raw in enumerate(named)}
    described = {"splits": {"random": parts}, "source": {}, "preprocessing": {}, "shape": SHAPES[modality]}
    return shards.write(out, named, modality=modality, **described, **options)  # type: ignore[arg-type]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype == np.float32)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("modality", EXAMPLES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_round_trip(modality: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    classes = data.draw(st.lists(EXAMPLES[modality], min_size=1, max_size=4))
    out = tmp_path_factory.mktemp("round") / "data"
    sizes = {"row_group_bytes": data.draw(st.integers(1, 80)), "shard_bytes": data.draw(st.integers(1, 300))}
    manifest = write(out, modality, classes, **sizes)
    assert shards.verify(out) == manifest == shards.read_manifest(out)
    assert write(out.parent / "again", modality, classes).digest == manifest.digest  # whatever the packing
    with shards.ShardReader(out, manifest) as opened:
        for _ in range(2):  # decoded, then kept or in place
            for class_id, examples in enumerate(classes):
                assert same(opened.read_class(class_id), examples)
                rows = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=5))
                chosen = examples[rows] if modality == "vector" else [examples[row] for row in rows]
                assert same(opened.read_class(class_id, rows), chosen)
    shutil.rmtree(out.parent)


ROWS: dict[str, list[Any]] = {
    "vector": [np.array([[1, np.nan, 0.1], [2, 5, -0.0]], np.float32), np.array([[4, 3, 2]], np.float32)],
    "text": [["wie geht's?", "", "日本語 \N{WHITE SMILING FACE}"], ["c"]],
    "encoded_image": [[b"\x89PNG...", b"\xff\xd8"], [b"RIFF"]],
}


@pytest.fixture(params=ROWS)
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, shards.Manifest, list[Any]]:
    out = tmp_path / "data"
    return out, write(out, request.param, ROWS[request.param]), ROWS[request.param]


def test_any_parquet_reader_sees_the_same(prepared: tuple[Path, shards.Manifest, list[Any]]) -> None:
    out, manifest, classes = prepared
    files = [out / shard.file for shard in manifest.shards]
    column = {"vector": "features", "text": "text", "encoded_image": "image"}[manifest.modality]
    pattern = str(out / "shards" / "*.parquet")
    tables = {
        "pandas": list(pd.concat([pd.read_parquet(file) for file in files])[column]),
        "duckdb": [row[0] for row in duckdb.sql(f"select {column} from read_parquet('{pattern}')").fetchall()],
        "polars": pl.read_parquet(files)[column].to_list(),
    }
    flat = [example for examples in classes for example in examples]
    for name, rows in tables.items():
        if manifest.modality == "vector":
            assert same(np.array([list(row) for row in rows], np.float32), np.stack(flat)), name
        else:
            assert [bytes(row) if isinstance(row, bytearray) else row for row in rows] == flat, name


def test_digests_tell_how_examples_are_cut(tmp_path: Path) -> None:
    texts = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""]]
    digests = set()
    for examples in texts:
        digest = ExamplesDigest()
        digest.update(examples)
        digests.add(digest.hexdigest())
    assert len(digests) == len(texts)


def test_every_missing_number_is_one(tmp_path: Path) -> None:
    """Programs write different bits for it; the digest does not tell them apart."""
    bits = np.array([[0x7FC00000], [0xFFC00001]], np.uint32)
    one, other = (row.view(np.float32)[None] for row in bits)
    assert write(tmp_path / "a", "vector", [one]).digest == write(tmp_path / "b", "vector", [other]).digest


def test_columns_are_described_and_part_of_the_digest(tmp_path: Path) -> None:
    rows = [np.array([[1, 0], [2, 1]], np.float32)]
    columns = [Column(name="age"), Column(name="colour", kind="categorical", categories=["red", "grün"])]
    manifest = write(tmp_path / "data", "vector", rows, columns=columns)
    assert shards.verify(tmp_path / "data").columns == columns
    assert [column.name for column in write(tmp_path / "plain", "vector", rows).columns] == ["0", "1"]
    other = [columns[0], columns[1].model_copy(update={"categories": ["red", "blue"]})]
    assert write(tmp_path / "other", "vector", rows, columns=other).digest != manifest.digest
    with pytest.raises(ValueError, match="3 columns are described, of 2"):
        write(tmp_path / "more", "vector", rows, columns=[*columns, Column(name="x")])
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("modality", "examples", "message"),
    [
        ("vector", np.zeros((2, 3)), r"expected float32 vectors \[count, D\], got float64 \[2, 3\]"),
        ("vector", np.array([[1, np.inf]], np.float32), "infinite values"),
        ("text", ["a", b"b"], "expected a list of str"),
        ("text", ["\ud800"], "not Unicode"),
        ("encoded_image", ["a"], "expected a list of bytes"),
        ("encoded_image", [bytes(33 << 20)], "an example of 34603008 bytes"),
    ],
)
def test_what_is_no_example_is_refused(modality: str, examples: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "data", modality, [examples])
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_page_is_found_without_verify(prepared: tuple[Path, shards.Manifest, list[Any]]) -> None:
    out, manifest, classes = prepared
    file = out / manifest.shards[0].file
    example = classes[1][0]
    content = example.tobytes() if isinstance(example, np.ndarray) else example
    wanted = content.encode() if isinstance(content, str) else content
    whole = file.read_bytes()
    broken = bytearray(whole)
    with pq.ParquetFile(file) as opened:
        start = opened.metadata.row_group(1).column(3).data_page_offset
    broken[whole.index(wanted, start)] ^= 1
    file.write_bytes(broken)
    with (
        shards.ShardReader(out, manifest) as opened,
        pytest.raises(DataError, match="row group 1 cannot be read"),
    ):
        opened.read_class(1)


def test_a_row_group_that_is_too_large_is_refused(
    prepared: tuple[Path, shards.Manifest, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest, _ = prepared
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 11)
    with shards.ShardReader(out, manifest) as opened, pytest.raises(DataError, match="too many to be read at once"):
        opened.read_class(0)


def test_decoded_row_groups_are_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = [["x" * 100] * 10 for _ in range(6)]
    manifest = write(tmp_path / "data", "text", classes)
    monkeypatch.setattr(reader, "CACHE_BYTES", 2500)
    with shards.ShardReader(tmp_path / "data", manifest) as opened:
        assert [opened.read_class(i) for i in range(6)] == classes
        assert list(opened._decoded) == [(0, 4), (0, 5)]
        opened.read_class(4)
        opened.read_class(0)
        assert list(opened._decoded) == [(0, 4), (0, 0)]
