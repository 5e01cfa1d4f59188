"""Data sets on a web server, and of picture files: the same episodes as from a folder of pixels."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import attempts
from pipeline.config import validate
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import class_images, shards
from pipeline.tasks.decoded_cache import DecodedCache
from pipeline.tasks.images import ImagesConfig, ImageTasks
from pipeline.types import SPLITS, TaskBatch
from tests.servers.web import WebServer, serving

WINDOW = {"classes": 4, "steps": 2, "eval_episodes": 2}


def tasks(data: Path | str, *, memory_limit_mb: int = 0, **options: Any) -> ImageTasks:
    content = {"family": "images", "data": data, "split": "random", "n_way": 3, "k_shot": 2, "n_query": 2}
    content |= {"eval_n_query": 2, "memory_limit_mb": memory_limit_mb, **options}
    config = validate(ImagesConfig, content, source="test")
    return config.build(device=torch.device("cpu"), dtype=torch.float32)


def episodes(family: ImageTasks) -> list[TaskBatch]:
    slots = torch.arange(4)
    training = [family.sample("meta_train", step, slots, seed=0) for step in range(5)]
    return [*training, *(family.sample(split, 0, slots, seed=1) for split in SPLITS[1:])]


def equal(some: list[TaskBatch], others: list[TaskBatch]) -> bool:
    pairs = [pair for batches in zip(some, others, strict=True) for pair in zip(*batches, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


# web servers


@pytest.fixture(scope="module")
def data(tiny_data_set: Callable[..., Path]) -> Path:
    return tiny_data_set(classes=24)


@pytest.fixture
def server(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.001)
    with serving(data.parent) as server:
        yield server


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_same_episodes_from_a_web_server(data: Path, server: WebServer, window: dict[str, int] | None) -> None:
    """One of whose answers in four fails."""
    server.fail = lambda number, path: (503, None, None, None, "cut", None, None, None, "drop", None)[number % 10]
    family = tasks(f"{server.address}/tiny", window=window)
    assert family.prefetch
    assert equal(episodes(family), episodes(tasks(data, window=window)))
    shard = family.manifest.shards[0]
    read = [request for request in server.requests if shard.file in request]
    assert read
    assert all("bytes=" in request for request in read)
    assert equal(episodes(tasks(f"{server.address}/tiny", window=window, memory_limit_mb=9)), episodes(family))


def test_verifying_reads_all_or_asks_for_sizes(data: Path, server: WebServer) -> None:
    address = f"{server.address}/tiny"
    whole = shards.verify(address)
    assert whole.digest == shards.read_manifest(data).digest
    before = len(server.requests)
    content = {"family": "images", "data": address, "split": "random", "n_way": 3, "n_query": 2, "eval_n_query": 2}
    config = validate(ImagesConfig, {**content, "window": WINDOW, "memory_limit_mb": 0}, source="test")
    assert config.verify() == whole.digest
    assert server.requests[before:] == ["/tiny/dataset.json", *(f"/tiny/{s.file} bytes=0-0" for s in whole.shards)]
    server.fail = lambda number, path: 404 if path.endswith("00000.parquet") else None
    with pytest.raises(DataError, match=r"shards/00000\.parquet is missing"):
        config.verify()


def test_the_step_that_needs_the_data_tells_what_is_wrong(data: Path, server: WebServer) -> None:
    address = f"{server.address}/tiny"
    family = tasks(address, window=WINDOW)
    server.fail = lambda number, path: 500
    with pytest.raises(DataError, match=r"http://127.*/tiny/shards/00000\.parquet.*cannot be read.*status 500"):
        family.sample("meta_train", 0, torch.arange(2), seed=0)
    server.fail = lambda number, path: None
    family.sample("meta_train", 0, torch.arange(2), seed=0)
    for failure, words in ((403, "login is taken from"), (404, "holds no dataset.json")):
        server.fail = lambda number, path, failure=failure: failure
        with pytest.raises(DataError, match=words):
            tasks(address)


def test_the_command_line_reads_from_a_web_server(server: WebServer, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["data", "verify", f"{server.address}/tiny"])
    assert shown.exit_code == 0, shown.output
    refused = CliRunner().invoke(app, ["data", "prepare", "glyphs", "--out", f"{server.address}/other"])
    assert isinstance(refused.exception, ConfigError)
    assert "can only be read" in str(refused.exception)


# picture files

PREPROCESSING = Preprocessing(kind="photo", size=12, channels=3)


def picture(number: int, example: int, *, kind: str) -> bytes:
    random = np.random.default_rng((number, example))
    pixels = random.integers(0, 256, (20 + example, 17, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 classes of 6 pictures of several kinds and sizes."""
    kinds = ("JPEG", "PNG", "WEBP")
    names = [f"class{number:02d}" for number in range(24)]
    classes = (
        shards.ClassExamples(name, "g", [picture(i, e, kind=kinds[e % 3]) for e in range(6)])
        for i, name in enumerate(names)
    )
    out = tmp_path_factory.mktemp("encoded") / "set"
    parts = {name: SPLITS[i % 3] for i, name in enumerate(names)}
    about = {"source": {"name": "test"}, "preprocessing": PREPROCESSING.model_dump(mode="json")}
    shards.write(out, classes, splits={"random": parts}, modality="encoded_image", shape=(12, 12, 3), **about)
    return out


@pytest.fixture(scope="module")
def prepared(encoded: Path) -> Path:
    """The same pictures as pixels."""
    manifest = shards.read_manifest(encoded)
    with shards.ShardReader(encoded, manifest) as reader:
        classes = [
            shards.ClassExamples(
                entry.name,
                entry.group,
                np.stack([PREPROCESSING(Image.open(io.BytesIO(file))) for file in reader.read_class(number)]),
            )
            for number, entry in enumerate(manifest.classes)
        ]
    parts = {"random": {entry.name: entry.splits["random"] for entry in manifest.classes}}
    out = encoded.parent / "pixels"
    shards.write(out, classes, splits=parts, source={"name": "test"}, preprocessing=manifest.preprocessing)
    return out


@pytest.mark.parametrize("options", [{}, {"window": WINDOW}, {"memory_limit_mb": 9}], ids=str)
def test_picture_files_give_the_episodes_of_their_pixels(
    encoded: Path, prepared: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = episodes(tasks(prepared, **options))
    first = tasks(encoded, **options, decoded_cache=str(tmp_path / "kept"))
    assert equal(episodes(first), expected)
    kept = sorted((tmp_path / "kept").glob("*.decoded"))
    assert kept

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded again")

    complete = tasks(encoded, memory_limit_mb=9, decoded_cache=str(tmp_path / "kept"))  # of all classes
    assert len(list((tmp_path / "kept").glob("*.decoded"))) == 24
    monkeypatch.setattr(class_images, "decode_picture", none)
    assert equal(episodes(tasks(encoded, **options, decoded_cache=str(tmp_path / "kept"))), expected)
    assert torch.equal(complete.examples("meta_val", [2], 6), tasks(prepared).examples("meta_val", [2], 6))
    with pytest.raises(AssertionError, match="decoded again"):
        episodes(tasks(encoded, **options, decoded_cache_mb=0))


def test_a_picture_that_is_none_stops_the_step_that_needs_it(tmp_path: Path) -> None:
    names = [f"class{number}" for number in range(9)]
    files = {name: [picture(i, e, kind="PNG") for e in range(6)] for i, name in enumerate(names)}
    files["class3"][4] = b"\x89PNG\r\n\x1a\n and no more"
    parts = {name: SPLITS[i // 3] for i, name in enumerate(names)}
    classes = [shards.ClassExamples(name, "g", files[name]) for name in names]
    about = {"source": {"name": "test"}, "preprocessing": PREPROCESSING.model_dump(mode="json")}
    shards.write(
        tmp_path / "set", classes, splits={"random": parts}, modality="encoded_image", shape=(12, 12, 3), **about
    )
    family = tasks(tmp_path / "set", decoded_cache=str(tmp_path / "kept"))
    family.sample("meta_train", 0, torch.arange(2), seed=0)
    with pytest.raises(DataError, match=r"class class3 in shards/00000\.parquet, example 4"):
        family.sample("meta_val", 0, torch.arange(2), seed=0)


def test_picture_files_need_their_preprocessing(tmp_path: Path) -> None:
    names = [f"class{number}" for number in range(9)]
    parts = {name: SPLITS[i // 3] for i, name in enumerate(names)}
    for about, words in (({}, "kind"), ({"kind": "photo", "size": 16, "channels": 3}, "makes images of")):
        classes = [shards.ClassExamples(name, "g", [picture(0, 0, kind="PNG")] * 6) for name in names]
        out = tmp_path / words.replace(" ", "-")
        options = {"source": {"name": "test"}, "preprocessing": about, "shape": (12, 12, 3)}
        shards.write(out, classes, splits={"random": parts}, modality="encoded_image", **options)
        with pytest.raises(DataError, match=words):
            tasks(out)


def test_decoded_classes_are_kept_on_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decoded_cache: should be a folder on each machine's own disk"):
        tasks(tmp_path, decoded_cache="s3://bucket/decoded")


# decoded classes on disk


def pixels(number: int) -> np.ndarray:
    return np.full((5, 4, 4, 1), number, dtype=np.uint8)


def test_the_disk_holds_no_more_than_it_may(tmp_path: Path) -> None:
    cache = DecodedCache(tmp_path, limit=3 * (80 + 32))
    for number in range(3):
        cache.put(f"{number}", pixels(number))
        os.utime(tmp_path / f"{number}.decoded", (number, number))
    assert cache.get("0", (5, 4, 4, 1)) is not None  # used: no longer the oldest
    cache.put("3", pixels(3))
    assert sorted(file.name for file in tmp_path.glob("*.decoded")) == ["0.decoded", "2.decoded", "3.decoded"]
    assert (cache.get("3", (5, 4, 4, 1)) == 3).all()
    cache.put("4", np.zeros((500, 1, 1, 1), dtype=np.uint8))  # more than all of it
    assert not (tmp_path / "4.decoded").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "longer"])
def test_a_damaged_file_is_none(tmp_path: Path, damage: str) -> None:
    cache = DecodedCache(tmp_path, limit=10**6)
    cache.put("0", pixels(7))
    file = tmp_path / "0.decoded"
    content = file.read_bytes()
    changed = content[:50] + bytes([content[50] ^ 1]) + content[51:]
    file.write_bytes({"cut": content[:-1], "changed": changed, "empty": b"", "longer": content + b"x"}[damage])
    assert cache.get("0", (5, 4, 4, 1)) is None
    assert not file.exists()
    cache.put("0", pixels(8))
    assert (cache.get("0", (5, 4, 4, 1)) == 8).all()


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    cache = DecodedCache(tmp_path, limit=10**6)
    old, young = tmp_path / "a.partial", tmp_path / "b.partial"
    for file in (old, young):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    cache.put("0", pixels(0))
    assert (old.exists(), young.exists()) == (False, True)


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = DecodedCache(tmp_path / "file" / "folder", limit=10**6)
    for _ in range(2):
        cache.put("0", pixels(0))
        assert cache.get("0", (5, 4, 4, 1)) is None
    assert [record.message.endswith("they are decoded again.") for record in caplog.records] == [True]
