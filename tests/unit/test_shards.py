"""The data set on disk: what is written is read back, all or nothing stands there, and all damage is found."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.shards import ClassExamples
from pipeline.types import SPLITS, Split


def raw_classes(counts: Sequence[int], shape: tuple[int, int, int], seed: int = 0) -> list[ClassExamples]:
    random = np.random.default_rng(seed)
    return [
        ClassExamples(
            f"grüppe{i % 2}/class{i:02d}", f"grüppe{i % 2}", random.integers(0, 256, (count, *shape), np.uint8)
        )
        for i, count in enumerate(counts)
    ]


def write(out: Path, classes: Iterable[ClassExamples], **options: Any) -> shards.Manifest:
    """`shards.write` with the parts dealt in turn, in one class split "random"."""
    options = {"source": {"name": "test"}, "preprocessing": {}, **options}
    if "splits" not in options:
        options["splits"] = {"random": {raw.name: SPLITS[i % 3] for i, raw in enumerate(classes)}}
    return shards.write(out, classes, **options)


def read_all(folder: Path) -> list[np.ndarray]:
    with shards.ShardReader(folder, shards.read_manifest(folder)) as reader:
        return list(reader)


CLASSES = raw_classes([5, 3, 7, 4], (4, 6, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of 72-byte images in row groups of two and shards of at most four images."""
    write(tmp_path / "data", CLASSES, row_group_bytes=150, shard_bytes=300)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for hypothesis: each example puts back what it damages."""
    out = tmp_path_factory.mktemp("shards") / "data"
    write(out, CLASSES, row_group_bytes=150, shard_bytes=300)
    return out


@contextmanager
def damaged(file: Path, offset: int, flip: int) -> Iterator[None]:
    content = file.read_bytes()
    broken = bytearray(content)
    broken[offset] ^= flip
    file.write_bytes(broken)
    try:
        yield
    finally:
        file.write_bytes(content)


# --- what is written is read back


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])))
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    image_bytes = int(np.prod(shape))
    group_bytes = data.draw(st.integers(1, 5 * image_bytes))
    shard_bytes = data.draw(st.integers(1, 20 * image_bytes))
    classes = raw_classes(counts, shape, seed=data.draw(st.integers(0, 99)))
    out = tmp_path_factory.mktemp("round") / "data"
    manifest = write(out, classes, row_group_bytes=group_bytes, shard_bytes=shard_bytes)

    assert shards.verify(out) == manifest == shards.read_manifest(out)
    assert manifest.shape == shape
    assert manifest.num_examples == sum(counts)
    for entry, raw, images in zip(manifest.classes, classes, read_all(out), strict=True):
        assert (entry.name, entry.group, entry.count) == (raw.name, raw.group, len(raw.examples))
        assert (images == raw.examples).all()
    with shards.ShardReader(out, manifest) as reader:
        c = data.draw(st.integers(0, len(counts) - 1))
        rows = data.draw(st.lists(st.integers(0, counts[c] - 1), max_size=8))  # any order, repetitions too
        assert (reader.read_class(c, rows) == classes[c].examples[rows]).all()

    for i, shard in enumerate(manifest.shards):  # a row group holds one class and is bounded; so is a shard
        with pq.ParquetFile(out / shard.file) as file:
            for g in range(file.num_row_groups):
                labels = set(file.read_row_group(g, columns=["class_id"]).column("class_id").to_pylist())
                assert len(labels) == 1
                group_rows = file.metadata.row_group(g).num_rows
                assert group_rows == 1 or group_rows * image_bytes <= group_bytes
                indexed = shards.RowGroup(shard=i, row_group=g, rows=group_rows)
                assert indexed in manifest.classes[labels.pop()].row_groups
            assert file.num_row_groups == 1 or file.metadata.num_rows * image_bytes <= shard_bytes
    shutil.rmtree(out)


def test_several_row_groups_and_shards_are_used(folder: Path) -> None:
    manifest = shards.read_manifest(folder)
    assert len(manifest.shards) > 2
    assert [len(entry.row_groups) for entry in manifest.classes] == [3, 2, 4, 2]
    assert len({group.shard for group in manifest.classes[2].row_groups}) > 1


def test_a_row_group_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    read_row_group = pq.ParquetFile.read_row_group

    def counting(file: pq.ParquetFile, number: int, **options: Any) -> Any:
        decoded.append(number)
        return read_row_group(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    with shards.ShardReader(folder, shards.read_manifest(folder)) as reader:
        for _ in range(3):
            assert (reader.read_class(2, [6, 0, 3]) == CLASSES[2].examples[[6, 0, 3]]).all()
    assert len(decoded) == 3  # three of its four row groups


def test_damage_after_a_row_group_was_read_is_met(folder: Path) -> None:
    """Rows are copied from where they lie only as long as nobody has written to the file."""
    manifest = shards.read_manifest(folder)
    with shards.ShardReader(folder, manifest) as reader:
        for _ in range(2):
            assert (reader.read_class(2) == CLASSES[2].examples).all()
        assert reader._in_place
        file = folder / manifest.shards[0].file
        whole = file.read_bytes()
        file.write_bytes(bytes(byte ^ 0xFF for byte in whole[: len(whole) // 2]) + whole[len(whole) // 2 :])
        with pytest.raises(DataError, match=f"{file.name}: row group .* cannot be read"):
            list(reader)


def test_pages_of_another_writer_are_decoded_every_time(folder: Path) -> None:
    """A row group in several pages does not lie in one piece, whatever its footer says."""
    manifest = shards.read_manifest(folder)
    for shard in manifest.shards:
        with pq.ParquetFile(folder / shard.file) as file:
            groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
        options = {"compression": "none", "use_dictionary": False, "max_rows_per_page": 1}
        with pq.ParquetWriter(folder / shard.file, groups[0].schema, **options) as writer:
            for group in groups:
                writer.write_table(group)
    with shards.ShardReader(folder, manifest) as reader:
        for _ in range(2):
            for class_id, raw in enumerate(CLASSES):
                rows = list(range(len(raw.examples)))
                assert (reader.read_class(class_id, rows) == raw.examples).all()
        assert 0 < len(reader._in_place) < sum(len(entry.row_groups) for entry in manifest.classes)  # those of one row


def test_any_parquet_reader_sees_the_same_pixels(folder: Path) -> None:
    pattern = str(folder / "shards" / "*.parquet")
    files = sorted((folder / "shards").glob("*.parquet"))
    tables = {
        "pandas": pd.concat([pd.read_parquet(file) for file in files]),
        "duckdb": duckdb.sql(f"select * from read_parquet('{pattern}') order by filename, file_row_number").df(),
        "polars": pl.read_parquet(files),
    }
    for reader, table in tables.items():
        images = np.stack([np.frombuffer(bytes(row), np.uint8).reshape(4, 6, 3) for row in table["image"]])
        assert (images == np.concatenate([raw.examples for raw in CLASSES])).all(), reader
        assert list(table["class_id"]) == [i for i, raw in enumerate(CLASSES) for _ in raw.examples], reader
        assert list(table["class_name"]) == [raw.name for raw in CLASSES for _ in raw.examples], reader
        assert list(table["group"]) == [raw.group for raw in CLASSES for _ in raw.examples], reader


# --- the digest


def test_digest_is_of_content_and_not_of_packing(tmp_path: Path) -> None:
    digests = {
        write(tmp_path / f"{i}", CLASSES, row_group_bytes=group, shard_bytes=shard, source={"run": i}).digest
        for i, (group, shard) in enumerate([(1, 1), (150, 300), (4 << 20, 64 << 20), (4 << 20, 64 << 20)])
    }
    assert len(digests) == 1


def test_digests_of_images_are_what_they_were_before_other_modalities(tmp_path: Path) -> None:
    """Computed by the version that knew images alone: data sets, checkpoints and models from then still fit."""
    manifest = write(tmp_path / "data", CLASSES)
    assert manifest.digest == "92763bd4b988a7cdfbbdcf03320304a6858b2a8d9f9a2b4a1d27ed9a1146f05f"
    content = json.loads((tmp_path / "data" / shards.MANIFEST).read_text())
    assert content["format_version"] == 1
    assert not {"columns", "layout"} & content.keys()
    assert content["classes"][0]["row_groups"] == [{"shard": 0, "row_group": 0, "rows": 5}]


def test_digest_changes_with_anything_a_model_can_learn_from(tmp_path: Path) -> None:
    first, *others = CLASSES
    pixel = first.examples.copy()
    pixel[2, 1, 3, 0] ^= 1
    parts = {raw.name: SPLITS[i % 3] for i, raw in enumerate(CLASSES)}
    moved = parts | {first.name: "meta_test"}
    variants: dict[str, tuple[list[ClassExamples], dict[str, Any]]] = {
        "as it is": (CLASSES, {}),
        "pixel": ([first._replace(examples=pixel), *others], {}),
        "order of images": ([first._replace(examples=first.examples[::-1]), *others], {}),
        "shape": ([raw._replace(examples=raw.examples.reshape(-1, 6, 4, 3)) for raw in CLASSES], {}),
        "fewer images": ([first._replace(examples=first.examples[1:]), *others], {}),
        "name": ([first._replace(name="another"), *others], {}),
        "group": ([first._replace(group="another"), *others], {}),
        "order of classes": ([*others, first], {"splits": {"random": parts}}),
        "split": (CLASSES, {"splits": {"random": moved}}),
        "name of the split": (CLASSES, {"splits": {"other": parts}}),
        "one more split": (CLASSES, {"splits": {"random": parts, "other": moved}}),
    }
    digests = {what: write(tmp_path / what, c, **options).digest for what, (c, options) in variants.items()}
    assert len(set(digests.values())) == len(variants), digests


# --- all or nothing


def failing_source() -> Iterator[ClassExamples]:
    yield CLASSES[0]
    raise RuntimeError("the source broke")


BAD_SOURCES: dict[str, Callable[[], Sequence[ClassExamples]]] = {
    "no classes": list,
    "two classes have this name": lambda: [CLASSES[0], CLASSES[0]],
    "the others of": lambda: [CLASSES[0], *raw_classes([1, 1], (4, 4, 3))[1:]],
    "expected uint8": lambda: [CLASSES[0], CLASSES[1]._replace(examples=CLASSES[1].examples.astype(np.float32))],
    "has no examples": lambda: [CLASSES[0]._replace(examples=CLASSES[0].examples[:0])],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("problem", BAD_SOURCES)
def test_bad_source_is_refused_and_leaves_nothing(problem: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "data"
    if overwrite:
        write(out, CLASSES)
    with pytest.raises(DataError, match=problem):
        write(out, BAD_SOURCES[problem](), overwrite=overwrite)
    assert list(tmp_path.iterdir()) == ([out] if overwrite else [])
    if overwrite:
        shards.verify(out)


def test_failing_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the source broke"):
        shards.write(
            tmp_path / "data",
            failing_source(),
            splits={"random": {CLASSES[0].name: "meta_train"}},
            source={},
            preprocessing={},
        )
    assert list(tmp_path.iterdir()) == []


def test_class_without_a_place_in_a_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{CLASSES[1].name}.*class split random"):
        write(tmp_path / "data", CLASSES, splits={"random": {CLASSES[0].name: "meta_train"}})
    assert list(tmp_path.iterdir()) == []


TWO_WRITERS = """
import os, sys, threading, time
import numpy as np
from pipeline.tasks import shards

def write(out, moment):
    def stop(now):
        if now == moment:
            os.write(1, b"here ")
            time.sleep(600)

    splits = {"random": {f"class{i}": "meta_train" for i in range(3)}}
    with shards.staged(out, overwrite=True) as place:
        writer = shards.ShardWriter(place.folder, splits=splits, row_group_bytes=5000, shard_bytes=10000)
        for i in range(3):
            writer.begin(f"class{i}", "all")
            writer.add(np.full((4, 50, 50, 1), i, np.uint8))
            writer.end()
        stop("between classes")
        writer.close()
        stop("before the manifest")

threading.Thread(target=write, args=(sys.argv[1], "between classes")).start()
threading.Thread(target=write, args=(sys.argv[2], "before the manifest")).start()
"""


def test_a_killed_writer_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    fresh, replaced = tmp_path / "fresh", tmp_path / "replaced"
    old = write(replaced, CLASSES)
    command = [sys.executable, "-c", TWO_WRITERS, str(fresh), str(replaced)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        reached = process.stdout.read(10)  # ends early where the process does
        process.kill()
    assert reached == b"here here "
    assert shards.verify(replaced) == old
    with pytest.raises(DataError, match="no such data set"):
        shards.read_manifest(fresh)
    for out in (fresh, replaced):  # what the killed one left is in nobody's way, and goes
        new = write(out, CLASSES[:2], overwrite=out == replaced)
        assert shards.verify(out) == new
    assert sorted(tmp_path.iterdir()) == [fresh, replaced]


@pytest.mark.parametrize("name", ["data", "da[t]*"])
def test_a_writer_at_work_is_not_swept_away(name: str, tmp_path: Path) -> None:
    """Another one starts and ends at the same place meanwhile; the later to end stays."""
    out, neighbour = tmp_path / name, tmp_path / f".{name}2.partial-of-another"
    neighbour.mkdir()
    (tmp_path / f".{name}.partial-killed" / "shards").mkdir(parents=True)

    def interrupted() -> Iterator[ClassExamples]:
        yield CLASSES[0]
        write(out, CLASSES[1:], overwrite=True)
        yield CLASSES[1]

    parts: dict[str, Split] = {raw.name: "meta_train" for raw in CLASSES[:2]}
    manifest = write(out, interrupted(), splits={"random": parts}, overwrite=True)
    assert shards.verify(out) == manifest
    assert len(manifest.classes) == 2
    assert sorted(tmp_path.iterdir()) == sorted([neighbour, out])


def test_overwrite_replaces_only_a_data_set(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data: already exists.*--reuse, replace it with --overwrite"):
        write(folder, CLASSES)
    new = write(folder, CLASSES[:2], overwrite=True)
    assert shards.verify(folder) == new
    assert len(new.classes) == 2
    assert list(tmp_path.iterdir()) == [folder], "the old one, or a partial one, is still there"
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis: exists and is not a data set"):
        write(precious, CLASSES, overwrite=True)
    assert (precious / "chapter1.txt").read_text() == "years of work"


# --- damage


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_verify_finds_a_flipped_bit_anywhere(data: st.DataObject, shared_folder: Path) -> None:
    files = sorted((shared_folder / "shards").iterdir())
    file = data.draw(st.sampled_from(files))
    with damaged(file, data.draw(st.integers(0, file.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7))):
        with pytest.raises(DataError, match=rf"{file.name} is damaged") as caught:
            shards.verify(shared_folder)
        assert not any(other.name in str(caught.value) for other in files if other != file)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_reading_rows_finds_a_damaged_page_without_verify(data: st.DataObject, shared_folder: Path) -> None:
    """Every page carries a checksum. The image of one example is found in the file by its pixels."""
    c = data.draw(st.integers(0, len(CLASSES) - 1))
    row = data.draw(st.integers(0, len(CLASSES[c].examples) - 1))
    pixels = CLASSES[c].examples[row].tobytes()
    (file,) = [f for f in (shared_folder / "shards").iterdir() if pixels in f.read_bytes()]
    offset = file.read_bytes().index(pixels) + data.draw(st.integers(0, len(pixels) - 1))
    manifest = shards.read_manifest(shared_folder)
    with (
        damaged(file, offset, 1 << data.draw(st.integers(0, 7))),
        shards.ShardReader(shared_folder, manifest) as reader,
        pytest.raises(DataError, match=rf"{file.name}: row group \d+ cannot be read"),
    ):
        reader.read_class(c, [row])


def test_verify_names_every_damaged_shard(folder: Path) -> None:
    first, second, third, *_ = sorted((folder / "shards").iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    third.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        shards.verify(folder)
    message = str(caught.value)
    assert f"{first.name} has {first.stat().st_size} bytes instead of {first.stat().st_size + 1}" in message
    assert f"{second.name} is missing" in message
    assert f"{third.name} has 0 bytes" in message


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "no Parquet"])
def test_reading_names_an_unreadable_shard(kind: str, folder: Path) -> None:
    manifest = shards.read_manifest(folder)
    file = folder / manifest.shards[0].file
    content = file.read_bytes()
    file.unlink()
    if kind != "missing":
        file.write_bytes({"truncated": content[:-20], "empty": b"", "no Parquet": b"x" * len(content)}[kind])
    with shards.ShardReader(folder, manifest) as reader, pytest.raises(DataError, match=file.name):
        reader.read_class(0)


Edit = Callable[[dict[str, Any]], object]

# No edit brings the digest in step. It finds those that it covers; the schema or the shards find the others.
EDITS: dict[str, Edit] = {
    "class renamed": lambda m: m["classes"][1].update(name="impostor"),
    "class regrouped": lambda m: m["classes"][1].update(group="impostor"),
    "class moved to another part": lambda m: m["classes"][1]["splits"].update(random="meta_train"),
    "split renamed": lambda m: m["classes"][0].update(splits={"other": "meta_train"}),
    "count raised": lambda m: m["classes"][1].update(count=4),
    "sha256 of a class changed": lambda m: m["classes"][1].update(sha256="0" * 64),
    "class removed": lambda m: m["classes"].pop(),
    "classes swapped": lambda m: m["classes"].reverse(),
    "shape transposed": lambda m: m.update(shape=[6, 4, 3]),
    "digest changed": lambda m: m.update(digest="0" * 64),
    "row groups swapped": lambda m: m["classes"][0]["row_groups"].reverse(),
    "row group of another class": lambda m: m["classes"][0]["row_groups"][0].update(m["classes"][2]["row_groups"][0]),
    "row group out of range": lambda m: m["classes"][0]["row_groups"][0].update(row_group=99),
    "row group of a negative number": lambda m: m["classes"][0]["row_groups"][0].update(row_group=-1),
    "row group of a shard out of range": lambda m: m["classes"][0]["row_groups"][0].update(shard=99),
    "row group with other rows": lambda m: m["classes"][0]["row_groups"][0].update(rows=1),
    "row group left out": lambda m: m["classes"][0]["row_groups"].pop(),
    "row group twice": lambda m: m["classes"][0]["row_groups"].append(m["classes"][0]["row_groups"][0]),
    "no row groups": lambda m: m["classes"][0].update(row_groups=[]),
    "no classes": lambda m: m.update(classes=[]),
    "no shards": lambda m: m.update(shards=[]),
    "shard path above the folder": lambda m: m["shards"][0].update(file="../x.parquet"),
    "shard path that climbs": lambda m: m["shards"][0].update(file="shards/../../x.parquet"),
    "absolute shard path": lambda m: m["shards"][0].update(file="/etc/passwd"),
    "empty shard path": lambda m: m["shards"][0].update(file=""),
    "shard sha256 changed": lambda m: m["shards"][0].update(sha256="0" * 64),
    "shard size changed": lambda m: m["shards"][0].update(bytes=1),
    "shards swapped": lambda m: m["shards"].reverse(),
    "later format": lambda m: m.update(format_version=99),
    "no format": lambda m: m.pop("format_version"),
    "unknown key": lambda m: m.update(colour="red"),
    "missing key": lambda m: m.pop("shape"),
    "wrong type": lambda m: m.update(classes="none"),
    "unknown part": lambda m: m["classes"][0]["splits"].update(random="train"),
}


def edit_manifest(folder: Path, edit: Edit) -> None:
    path = folder / shards.MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("what", EDITS)
def test_verify_finds_an_edited_manifest(what: str, folder: Path) -> None:
    edit_manifest(folder, EDITS[what])
    with pytest.raises(DataError, match=r"dataset\.json|\d{5}\.parquet"):
        shards.verify(folder)


@pytest.mark.parametrize(
    "what",
    [
        "row group of another class",
        "row group out of range",
        "row group of a shard out of range",
        "row group left out",
        "no row groups",
    ],
)
def test_a_wrong_index_is_found_when_rows_are_read(what: str, folder: Path) -> None:
    """Without verify, as a training worker reads: a message, never an IndexError or somebody else's rows."""
    edit_manifest(folder, EDITS[what])

    def read() -> None:
        with shards.ShardReader(folder, shards.read_manifest(folder)) as reader:
            reader.read_class(0, [0, 4])

    with pytest.raises(DataError, match=r"dataset\.json|\d{5}\.parquet"):
        read()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"not JSON", b"[]", b"null", b"3", b"\xff\xfe\x00", b'{"format_version": 99}', b"{}"]
)
def test_a_manifest_that_is_none(content: bytes, folder: Path) -> None:
    (folder / shards.MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        shards.read_manifest(folder)


def test_no_data_set_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such data set.*metapipe data prepare"):
        shards.read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        shards.read_manifest(tmp_path)


def test_shard_of_another_data_set_is_found_even_with_its_own_digest(folder: Path, tmp_path: Path) -> None:
    """A shard put in whole, sha256 and size in the manifest brought in step: the classes' pixels still disagree."""
    other = tmp_path / "other"
    write(other, raw_classes([5, 3, 7, 4], (4, 6, 3), seed=1), row_group_bytes=150, shard_bytes=300)
    stranger = next((other / "shards").iterdir())
    shutil.copy(stranger, folder / "shards" / stranger.name)
    entry = {
        "bytes": stranger.stat().st_size,
        "sha256": hashlib.sha256(stranger.read_bytes()).hexdigest(),
    }
    index = int(stranger.stem)
    edit_manifest(folder, lambda m: m["shards"][index].update(entry))
    with pytest.raises(DataError, match="disagrees with its shards"):
        shards.verify(folder)


def test_threads_may_share_a_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefetch thread and validation do. pyarrow's own files are not thread-safe: one thread at a time is in them.

    Threads that meet there crash only now and then, so each stays a while and says whether it met another.
    """
    inside = threading.Semaphore(1)
    met = []

    def alone(method: Callable[..., Any]) -> Callable[..., Any]:
        def stay(*arguments: Any, **options: Any) -> Any:
            free = inside.acquire(blocking=False)
            met.append(not free)
            time.sleep(0.001)
            try:
                return method(*arguments, **options)
            finally:
                if free:
                    inside.release()

        return stay

    monkeypatch.setattr(shards.ShardReader, "_view", lambda *_: None)  # as in an object store
    monkeypatch.setattr(shards.ShardReader, "_keep", lambda *_: None)  # so that every read decodes
    monkeypatch.setattr(pq, "ParquetFile", alone(pq.ParquetFile))
    monkeypatch.setattr(pq.core.ParquetFile, "read_row_group", alone(pq.core.ParquetFile.read_row_group))
    wanted = list(range(len(CLASSES))) * 10
    with shards.ShardReader(folder, shards.read_manifest(folder)) as reader, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(reader.read_class, wanted))
    assert all((images == CLASSES[c].examples).all() for c, images in zip(wanted, read, strict=True))
    assert len(met) > len(wanted)
    assert not any(met)


@pytest.mark.parametrize(
    "change",
    [
        {"splits": ["other"]},
        {"splits": ["random", "other"]},
        {"splits": ["random", "random"]},
        {"preprocessing": {"kind": "photo", "size": 12}},
    ],
)
def test_edited_splits_and_preprocessing_are_noticed(tiny_data: Path, tmp_path: Path, change: dict) -> None:
    folder = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    content = json.loads((folder / shards.MANIFEST).read_text())
    (folder / shards.MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=r"dataset\.json"):
        shards.read_manifest(folder)
