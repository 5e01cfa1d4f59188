"""Preparation by tasks of a Ray cluster: the same bytes as here, and a node without the raw data is an error."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import data_prepare
from pipeline.datasets import on_ray, prepare, reading
from pipeline.datasets.adopt import adopt
from pipeline.datasets.image_folder import ImageFolder
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.errors import DataError, Unfinished
from pipeline.tasks import shards
from tests.made import Fatal

REPOSITORY = Path(__file__).resolve().parents[2]


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


def test_what_a_ray_data_pipeline_writes_is_a_data_set(ray_cluster: None, tmp_path: Path) -> None:
    """Rows that a user's own pipeline makes on the cluster, adopted where it wrote them."""
    import ray.data

    def described(row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["id"])
        values = np.random.default_rng(number).normal(size=4).astype(np.float32)
        return {"species": f"kind{number % 6}", "values": values}

    ray.data.range(60, override_num_blocks=3).map(described).write_parquet(str(tmp_path / "written"))
    adopted = adopt(tmp_path / "written", label="species")
    assert adopted.modality == "vector"
    assert [entry.count for entry in adopted.classes] == [10] * 6
    shards.verify(tmp_path / "written")
    with shards.ShardReader(tmp_path / "written", adopted) as reader:
        rows = {entry.name: reader.read_class(i) for i, entry in enumerate(adopted.classes)}
    expected = [described({"id": number}) for number in range(60)]
    for name, found in rows.items():
        own = np.stack([row["values"] for row in expected if row["species"] == name])
        np.testing.assert_array_equal(found[found[:, 0].argsort()], own[own[:, 0].argsort()])


OWN_DISK = """
mount -t tmpfs tmpfs "$1" && cp "$2" "$1/t.parquet" && cd "$1" || exit 77
shift 2
"$@" --out out && cp -r out ../cluster
"""


def test_pictures_of_a_table_reach_nodes_that_see_no_file_of_this_process(ray_cluster: None, tmp_path: Path) -> None:
    """The command has a disk of its own: a mount that the cluster's processes do not see."""
    import ray

    def encoded(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), np.uint8)
        Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
        return stream.getvalue()

    files = [b"no picture" if i == 7 else encoded(i) for i in range(300)]
    labels = [None if i == 9 else f"class{i % 10}" for i in range(300)]
    pq.write_table(pa.table({"image": files, "label": labels}), tmp_path / "t.parquet")
    prepared = [sys.executable, "-m", "jobs.cli", "data", "prepare", "parquet", "t.parquet", "--image", "image"]
    prepared += ["--size", "16", "--no-card"]
    (tmp_path / "own").mkdir()
    alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", OWN_DISK, "sh", "own", "t.parquet"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    there = subprocess.run([*alone, *prepared, "--address", environment["RAY_ADDRESS"]], **how)
    if there.returncode == 77 or there.stderr.startswith("unshare:"):
        pytest.skip(f"no disk can be mounted here that others do not see: {there.stderr}")
    assert there.returncode == 0, there.stderr
    assert not any((tmp_path / "own").iterdir())
    here = subprocess.run([*prepared, "--out", "here"], **how)
    assert here.returncode == 0, here.stderr
    assert bytes_of(tmp_path / "cluster") == bytes_of(tmp_path / "here")
    assert shards.verify(tmp_path / "here").num_examples == 298
