"""Preparation by tasks of a Ray cluster: the same bytes as here, and a node without the raw data is an error."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import data_prepare
from pipeline.datasets import on_ray, prepare, reading
from pipeline.datasets.image_folder import ImageFolder
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.errors import DataError, Unfinished
from pipeline.tasks import shards
from tests.made import Fatal


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(200):
        file = tmp_path / "raw" / f"class{i // 10:02d}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)).save(file)
    (tmp_path / "raw" / "class03" / "30.png").write_bytes(b"not a picture")
    return tmp_path / "raw"


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix in (".json", ".parquet")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_cluster_prepares_the_same(
    ray_cluster: None, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")  # `--address` sets it; taken back with the test
    for name, address in (("here", None), ("cluster", "auto")):
        options = {"out": str(tmp_path / name), "address": address, "workers": 1, "card": False, "json": True}
        data_prepare.prepare("images", {"directory": pictures}, **options)
        assert json.loads(capsys.readouterr().out)["problems"] == 1
    assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / "cluster")
    assert shards.verify(tmp_path / "cluster").num_examples == 199


def test_a_node_that_does_not_see_the_raw_data_is_told(
    ray_cluster: None, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine is said to see other files than the tasks do, which comes to the same."""
    source = ImageFolder(pictures, preprocessing=Preprocessing(kind="drawing", size=16))
    monkeypatch.setattr(on_ray, "mark_of", lambda chunk: reading.mark_of(chunk)[::-1])
    with pytest.raises(DataError, match=r"node .* finds other files of class class00 than this machine.*--address"):
        prepare.prepare(source, tmp_path / "out", record={}, reader=on_ray.read_chunks)
    assert not (tmp_path / "out").exists()


def test_a_task_that_dies(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "RETRIES", 0)
    with pytest.raises(Unfinished, match=r"the Ray cluster lost a task .* again to go on"):
        prepare.prepare(
            Fatal([2, 2], trace=str(os.getpid())), tmp_path / "out", record={}, reader=on_ray.read_chunks, workers=1
        )
