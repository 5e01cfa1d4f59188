"""`data adopt`: files of pandas, Polars, DuckDB and in Spark's layout are indexed where they lie, or refused."""

import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import data
from pipeline.config import validate
from pipeline.datasets.adopt import adopt, parse_shape
from pipeline.datasets.card import CARD, PICTURE, STATISTICS
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import shards
from pipeline.tasks.images import ImagesConfig
from pipeline.tasks.shards import adopting, bounds
from pipeline.tasks.shards.footer import row_groups
from pipeline.tasks.shards.writer import OWN_FILES

CLASSES = 21
ROWS = 12


def png(seed: int, size: tuple[int, int] = (10, 12)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


KINDS: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "text": (lambda i: f"satz {i} ü", {}),
    "vector": (lambda i: [i / 3, float("nan") if i % 5 == 0 else 1.0, -i], {}),
    "image": (lambda i: np.random.default_rng(i).integers(0, 256, 8 * 8 * 3, np.uint8).tobytes(), {"shape": (8, 8, 3)}),
    "encoded_image": (png, {"size": 16}),
}


def table(kind: str, *, shuffled: bool = False) -> pa.Table:
    make = KINDS[kind][0]
    order = [i * ROWS + j for i in range(CLASSES) for j in range(ROWS)]
    if shuffled:
        order = np.random.default_rng(0).permutation(order).tolist()
    return pa.table(
        {
            "label": [f"class{i // ROWS}" for i in order],
            "domain": [f"d{i // ROWS % 4}" for i in order],
            "example": [make(i) for i in order],
        }
    )


def write_pandas(rows: pa.Table, folder: Path) -> None:
    frame = rows.to_pandas()
    frame["label"] = frame["label"].astype("category")  # a dictionary, compressed with snappy
    frame.to_parquet(folder / "table.parquet", row_group_size=25)


def write_polars(rows: pa.Table, folder: Path) -> None:
    pl.from_arrow(rows).write_parquet(folder / "table.parquet", compression="zstd", row_group_size=31)


def write_duckdb(rows: pa.Table, folder: Path) -> None:
    connection = duckdb.connect()
    connection.register("rows", rows)
    connection.execute(f"copy rows to '{folder}/data.parquet' (format parquet, compression gzip, row_group_size 2048)")


def write_as_spark(rows: pa.Table, folder: Path) -> None:
    """Its file names, codec, nullable lists and `_SUCCESS`: Spark itself is not here."""
    for part in range(3):
        name = f"part-{part:05d}-7f2c9a3e-8b51-4c0d-9e44-1a2b3c4d5e6f-c000.snappy.parquet"
        some = rows.slice(part * len(rows) // 3, len(rows) // 3)
        pq.write_table(some, folder / name, compression="snappy", use_dictionary=True, version="1.0")
        (folder / f".{name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()


WRITERS = {"pandas": write_pandas, "polars": write_polars, "duckdb": write_duckdb, "spark": write_as_spark}


def expected(kind: str, rows: pa.Table, label: str) -> Any:
    examples = [
        e for e, name in zip(*(rows.column(c).to_pylist() for c in ("example", "label")), strict=True) if name == label
    ]
    if kind == "vector":
        return np.array(examples, np.float32)
    return np.stack([np.frombuffer(e, np.uint8).reshape(8, 8, 3) for e in examples]) if kind == "image" else examples


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f") if isinstance(one, np.ndarray) else one == other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", WRITERS)
def test_files_of_other_programs_are_read_where_they_lie(program: str, kind: str, tmp_path: Path) -> None:
    rows = table(kind, shuffled=program in ("pandas", "polars"))
    WRITERS[program](rows, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = adopt(tmp_path, example="example", group="domain", **KINDS[kind][1])
    assert shards.verify(tmp_path) == manifest == shards.read_manifest(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (manifest.modality, manifest.splits, len(manifest.classes)) == (kind, ["random", "group"], CLASSES)
    with shards.ShardReader(tmp_path, manifest) as reader:
        for class_id, entry in enumerate(manifest.classes):
            assert entry.name == f"{entry.group}/{entry.label}"
            whole = expected(kind, rows, entry.label or "")
            assert same(reader.read_class(class_id), whole)
            some = [7, 0, 7]
            chosen = whole[some] if isinstance(whole, np.ndarray) else [whole[row] for row in some]
            assert same(reader.read_class(class_id, some), chosen)


def test_digests_do_not_depend_on_the_program(tmp_path: Path) -> None:
    digests = set()
    for program, write in WRITERS.items():
        (tmp_path / program).mkdir()
        write(table("vector"), tmp_path / program)
        digests.add(adopt(tmp_path / program, example="example").digest)
    assert len(digests) == 1


def test_a_hubs_struct_of_bytes_and_path(tmp_path: Path) -> None:
    rows = [{"bytes": png(i), "path": f"{i}.png"} for i in range(12)]
    table = pa.table({"image": rows, "label": pa.array([i // 4 for i in range(12)], pa.int64())})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    manifest = adopt(tmp_path, kind="drawing", size=20)
    shards.verify(tmp_path)
    assert [entry.name for entry in manifest.classes] == ["0", "1", "2"]
    assert (manifest.modality, manifest.shape, manifest.layout.example) == ("encoded_image", (20, 20, 1), "image.bytes")
    with shards.ShardReader(tmp_path, manifest) as reader:
        assert reader.read_class(1, [2]) == [rows[6]["bytes"]]


def test_tensors_are_the_vectors_that_they_hold(tmp_path: Path) -> None:
    values = np.arange(48, dtype=np.float32).reshape(12, 4)
    labels = [f"c{i // 2}" for i in range(12)]
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    pq.write_table(pa.table({"label": labels, "values": tensors}), tmp_path / "x.parquet")
    manifest = adopt(tmp_path)
    assert (manifest.modality, manifest.shape) == ("vector", (4,))
    with shards.ShardReader(tmp_path, manifest) as reader:
        np.testing.assert_array_equal(reader.read_class(1), values[2:4])


def test_adopted_pixels_are_trained_on(tmp_path: Path) -> None:
    write_polars(table("image", shuffled=True), tmp_path)
    adopt(tmp_path, example="example", shape=(8, 8, 3))
    drawn = []
    for limit in (0, 2048):  # read from the files, and all in memory
        content = {"family": "images", "data": tmp_path, "split": "random", "n_way": 2, "n_query": 2}
        config = validate(ImagesConfig, {**content, "eval_n_query": 2, "memory_limit_mb": limit}, source="test")
        family = config.build(device=torch.device("cpu"), dtype=torch.float32)
        drawn.append(family.sample("meta_train", 0, torch.arange(3), seed=0))
    assert drawn[0].support_x.shape == (3, 2, 3, 8, 8)
    assert torch.equal(drawn[0].query_x, drawn[1].query_x)


def test_rows_that_are_no_examples(tmp_path: Path) -> None:
    labels = ["a", "a", None, "b", "b\n", "b", "c", "", "a"]
    vectors: list[Any] = [[1, 2], [1], [1, 2], None, [0, 0], [3, None], [float("inf"), 1], [1, 2], [5, 6]]
    pq.write_table(pa.table({"label": labels, "v": pa.array(vectors, pa.list_(pa.float64()))}), tmp_path / "x.parquet")
    manifest = adopt(tmp_path, min_examples=1)
    shards.verify(tmp_path)
    assert [(entry.name, entry.count) for entry in manifest.classes] == [("a", 2), ("b", 1)]
    assert manifest.source["problems"]["count"] == 6
    assert ["x.parquet: row 2", "holds no 2 finite numbers"] in manifest.source["problems"]["first"]
    assert ["x.parquet: row 3", "has no label"] in manifest.source["problems"]["first"]
    assert [column.missing for column in manifest.columns] == [False, True]
    with shards.ShardReader(tmp_path, manifest) as reader:
        assert same(reader.read_class(0), np.array([[1, 2], [5, 6]], np.float32))
    with pytest.raises(DataError, match=r"row 2: holds no 2 finite numbers; .*\(and 1 more\).*--strict"):
        adopt(tmp_path, strict=True, overwrite=True)
    assert adopt(tmp_path, min_examples=2, overwrite=True).source["left_out"]["first"][0]["class"] == "b"


def test_names_that_two_classes_have(tmp_path: Path) -> None:
    """In another Unicode form, in another group, or in another case, which alone is kept."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    members = [("a", composed), ("a", decomposed), ("a", "b/c"), ("a/b", "c"), ("a", "Dog"), ("a", "dog")]
    columns = {"clinic": [m[0] for m in members], "label": [m[1] for m in members], "text": list("uvwxyz")}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    manifest = adopt(tmp_path, group="clinic")
    shards.verify(tmp_path)
    assert [entry.name for entry in manifest.classes] == ["a/Dog", "a/b/c", f"a/{decomposed}", "a/dog"]
    with shards.ShardReader(tmp_path, manifest) as reader:
        assert [reader.read_class(i)[0] for i in range(4)] == ["y", "w", "v", "z"]
    found = dict(manifest.source["problems"]["first"])
    assert manifest.source["problems"]["count"] == len(found) == 3
    assert "clinic 'a/b' with label 'c' has the name that clinic 'a' with label 'b/c' has" in found["class 'a/b/c'"]
    assert "another Unicode form" in found[f"class 'a/{composed}'"]
    with pytest.raises(DataError, match="another Unicode form"):
        adopt(tmp_path, group="clinic", strict=True, overwrite=True)


def test_broken_pictures_and_blank_texts_are_left_out(tmp_path: Path) -> None:
    pictures = [png(0), b"no picture", b"", png(1)]
    pq.write_table(pa.table({"label": ["a"] * 4, "image": pictures}), tmp_path / "x.parquet")
    manifest = adopt(tmp_path)
    assert (manifest.classes[0].count, manifest.source["problems"]["count"]) == (2, 2)
    pq.write_table(pa.table({"label": ["a"] * 3, "text": ["x", " ", "y"]}), tmp_path / "x.parquet")
    assert adopt(tmp_path, overwrite=True).classes[0].count == 2


def test_row_groups_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 1 << 20)
    pq.write_table(
        pa.table({"label": ["a"] * 300, "text": ["x" * 5000] * 300}), tmp_path / "x.parquet", use_dictionary=False
    )
    with pytest.raises(DataError, match=r"x\.parquet: row group 0 is of 1 MiB.*sorted by label.*--rewrite OUT"):
        adopt(tmp_path)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_column_that_unfolds_is_refused(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary's one long value, a hundred thousand times: a megabyte, and a hundred gigabytes."""
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 8 << 20)
    indices = pa.array(np.zeros(100_000, np.int32))
    text = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"label": ["a"] * 100_000, "text": text}), tmp_path / "x.parquet", compression=codec)
    assert (tmp_path / "x.parquet").stat().st_size < 2 << 20
    with pytest.raises(DataError, match="holds more than 8 MiB"):
        adopt(tmp_path)


def test_classes_that_are_scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 4000)
    labels = [f"c{i % 50:02d}" for i in range(1000)]
    pq.write_table(pa.table({"label": labels, "text": ["x" * 20] * 1000}), tmp_path / "x.parquet", row_group_size=100)
    with pytest.raises(DataError, match=r"scattered: to read each class once, \d+ times the data.*--rewrite OUT"):
        adopt(tmp_path)
    pq.write_table(
        pa.table({"label": sorted(labels), "text": ["x" * 20] * 1000}), tmp_path / "x.parquet", row_group_size=100
    )
    assert len(adopt(tmp_path).classes) == 50


def test_what_is_asked_for_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Parquet file"):
        adopt(tmp_path)
    pq.write_table(pa.table({"label": ["a"], "x": [1], "y": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column 'intent'; there are: label, x, y"):
        adopt(tmp_path, label="intent")
    with pytest.raises(DataError, match="which column holds the examples"):
        adopt(tmp_path)
    with pytest.raises(ConfigError, match="column 'x' is of type int64, which holds no examples"):
        adopt(tmp_path, example="x")
    adopt(tmp_path, example="y")
    with pytest.raises(DataError, match="is a data set already"):
        adopt(tmp_path, example="y")
    (tmp_path / "label=a").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "label=a" / "x.parquet")
    with pytest.raises(DataError, match="names of folders are not read"):
        adopt(tmp_path, example="y", overwrite=True)
    (tmp_path / "label=a" / "x.parquet").rename(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        adopt(tmp_path, overwrite=True)


def test_a_file_that_changed_after_it_was_adopted(tmp_path: Path) -> None:
    rows = table("text")
    write_duckdb(rows, tmp_path)
    manifest = adopt(tmp_path, example="example")
    pq.write_table(rows.slice(5), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet has"):
        shards.verify(tmp_path)
    with shards.ShardReader(tmp_path, manifest) as reader, pytest.raises(DataError, match="does not hold the 12"):
        reader.read_class(0)


def test_the_same_by_a_manifest_of_ours(tmp_path: Path) -> None:
    """The digest of adopted vectors is that of the same rows in our own files."""
    write_pandas(table("vector"), tmp_path)
    adopted = adopt(tmp_path, example="example")
    with shards.ShardReader(tmp_path, adopted) as reader:
        own = [shards.ClassExamples(e.name, e.group, reader.read_class(i)) for i, e in enumerate(adopted.classes)]
    splits = {"random": {entry.name: entry.splits["random"] for entry in adopted.classes}}
    options: dict[str, Any] = {"splits": splits, "source": {}, "preprocessing": {}, "columns": adopted.columns}
    assert shards.write(tmp_path / "own", own, modality="vector", **options).digest == adopted.digest
    assert json.loads((tmp_path / shards.MANIFEST).read_text())["classes"][0]["count"] < adopting.MAX_RUNS


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    rows = table("vector", shuffled=True)
    write_polars(rows, tmp_path / "data")
    data.adopt(str(tmp_path / "data"), group="domain", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["classes"], told["examples"], told["shape"]) == (CLASSES, CLASSES * ROWS, [3])
    data.verify(str(tmp_path / "data"))
    assert "whole" in capsys.readouterr().out
    data.adopt(str(tmp_path / "data"), group="domain", rewrite=str(tmp_path / "own"))
    manifest = shards.verify(tmp_path / "own")
    assert manifest.layout is None
    whole = [(e.name, e.sha256) for e in shards.read_manifest(tmp_path / "data").classes]
    assert [(entry.name, entry.sha256) for entry in manifest.classes] == whole


@pytest.mark.parametrize("shape", ["28", "28,28", "a,b,c", "0,8,1", "-1,2,3"])
def test_shapes_that_are_none(shape: str) -> None:
    with pytest.raises(ConfigError, match="--shape"):
        parse_shape(shape)


@pytest.mark.parametrize("adopted", [True, False])
def test_overwrite_leaves_the_users_own_files_alone(adopted: bool, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_pandas(table("text"), own)
    (own / "notes.txt").write_text("years of work")
    adopt(own, example="example")
    if not adopted:  # an older manifest, or one of somebody else: then the files tell
        content = json.loads((own / shards.MANIFEST).read_text())
        (own / shards.MANIFEST).write_text(json.dumps({**content, "layout": None}))
    before = {path: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(DataError, match=r"own: .*(your own|raw data).*--overwrite leaves.*another --out"):
        data.adopt(str(own), example="example", rewrite=str(own), overwrite=True)
    with pytest.raises(DataError, match="your own" if adopted else r"notes\.txt, table\.parquet"):
        shards.check_free(own, overwrite=True)
    assert {path: path.read_bytes() for path in own.iterdir()} == before


def test_overwrite_spares_raw_data_and_files_among_shards(tmp_path: Path) -> None:
    write_pandas(table("text"), tmp_path)
    data.adopt(str(tmp_path), example="example", rewrite=str(tmp_path / "own"))
    assert {path.name for path in (tmp_path / "own").iterdir()} <= OWN_FILES
    assert {CARD, PICTURE, STATISTICS} < OWN_FILES
    shards.check_free(tmp_path / "own", overwrite=True, source=tmp_path / "raw")
    for source in (tmp_path, tmp_path / "own", tmp_path / "own" / "shards"):
        with pytest.raises(DataError, match=r"own: is the folder of the raw data"):
            shards.check_free(tmp_path / "own", overwrite=True, source=source)
    (tmp_path / "own" / "shards" / "mine.parquet").touch()
    with pytest.raises(DataError, match=r"shards/mine\.parquet"):
        shards.check_free(tmp_path / "own", overwrite=True)
    (tmp_path / "own" / shards.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="no manifest that can be read"):
        shards.check_free(tmp_path / "own", overwrite=True)


@pytest.mark.parametrize(
    ("labels", "kind", "reason"),
    [
        ([1.0, 2.0, float("nan"), 1.0], pa.float64(), "has no label"),
        ([1.0, 2.0, 1.5, 1.0], pa.float32(), "its label 1.5 is no text and no whole number"),
        ([1.0, 2.0, float("inf"), 1.0], pa.float16(), "its label inf is no text"),
        ([b"1", b"2", b"\xff", b"1"], pa.binary(), "its label b'\\xff' is no text"),
        ([b"1", b"2", b"\xff", b"1"], pa.string(), "its label b'\\xff' is no text"),
    ],
)
def test_one_label_that_is_none(labels: list[Any], kind: pa.DataType, reason: str, tmp_path: Path) -> None:
    given = pa.array(
        np.array(labels, np.float16) if kind == pa.float16() else labels, None if kind == pa.string() else kind
    )
    if kind == pa.string():
        given = pa.Array.from_buffers(pa.string(), 4, given.buffers())  # as a careless program writes it
    pq.write_table(pa.table({"label": given, "text": list("wxyz")}), tmp_path / "x.parquet")
    manifest = adopt(tmp_path)
    assert [(entry.name, entry.count) for entry in manifest.classes] == [("1", 2), ("2", 1)]
    assert manifest.source["problems"]["count"] == 1
    (told,) = manifest.source["problems"]["first"]
    assert told[0] == "x.parquet: row 3"
    assert told[1].startswith(reason)
    shards.verify(tmp_path)
    with shards.ShardReader(tmp_path, manifest) as reader:
        assert reader.read_class(0) == ["w", "z"]


def test_a_text_that_is_not_utf8_and_a_picture_cut_short(tmp_path: Path) -> None:
    texts = pa.array([b"x", b"\xff", b"y"])
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"label": ["a"] * 3, "text": texts}), tmp_path / "x.parquet")
    assert adopt(tmp_path).source["problems"]["first"] == [["x.parquet: row 2", "is not UTF-8"]]
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    whole = stream.getvalue()
    pictures = [whole, whole[: len(whole) // 2], whole]
    pq.write_table(pa.table({"label": ["a"] * 3, "image": pictures}), tmp_path / "x.parquet")
    manifest = adopt(tmp_path, overwrite=True)
    assert manifest.classes[0].count == 2
    ((row, why),) = manifest.source["problems"]["first"]
    assert row == "x.parquet: row 2"
    assert why.startswith("cannot be decoded (image file is truncated")


def test_grey_pixels_do_not_tell_their_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": ["a", "b"], "image": [bytes(64), bytes(64)]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"--shape 8,8,1: .*--kind drawing.*--kind photo"):
        adopt(tmp_path, shape=(8, 8, 1))
    assert adopt(tmp_path, shape=(8, 8, 1), kind="photo").preprocessing["kind"] == "photo"


def test_bad_rows_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    labels = ["a", *[None] * 200]
    pq.write_table(pa.table({"label": labels, "text": ["x"] * 201}), tmp_path / "x.parquet", row_group_size=30)
    problems = adopt(tmp_path).source["problems"]
    assert (problems["count"], len(problems["first"])) == (200, adopting.KEPT_PROBLEMS)
    with pytest.raises(DataError, match=r"\(and 195 more\)"):
        adopt(tmp_path, strict=True, overwrite=True)


def test_a_row_group_is_read_in_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 1 << 20)
    texts = [f"sentence {i} " + "word " * 15 for i in range(6000)]
    unread = ["x" * 90 + str(i) for i in range(6000)]
    pq.write_table(pa.table({"label": ["a"] * 6000, "text": texts, "more": unread}), tmp_path / "x.parquet")
    footers, file = row_groups(tmp_path / "x.parquet"), pq.ParquetFile(tmp_path / "x.parquet")
    batches = list(bounds.bounded_batches(file, footers, 0, ["label", "text"]))
    assert pa.Table.from_batches(batches).column("text").to_pylist() == texts
    assert len(batches) < 600, "about 3000, of two rows each, took seconds where row groups are large"


@pytest.mark.parametrize("group", [None, "group"])
def test_a_label_that_no_manifest_may_hold_is_counted(tmp_path: Path, group: str | None) -> None:
    """As in a table that is prepared: C1 controls too, and what stands between a group and a label here."""
    labels = ["a", "a\x85b", "a\0b", "None"]
    given = pa.table({"label": labels, "group": ["g"] * 4, "v": [[1.0, 2.0]] * 4})
    pq.write_table(given, tmp_path / "x.parquet")
    manifest = adopt(tmp_path, group=group, example="v")
    assert sorted(entry.label for entry in manifest.classes) == ["None", "a"]
    problems = manifest.source["problems"]
    assert problems["count"] == 2
    assert all("a name with control characters" in reason for _, reason in problems["first"])
