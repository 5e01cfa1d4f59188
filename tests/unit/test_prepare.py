"""Preparation: the same bytes with any number of processes and after any interruption; bad items are counted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets import prepare as preparing
from pipeline.datasets.prepare import Progress, prepare
from pipeline.datasets.source import RawClass
from pipeline.errors import DataError, Unfinished
from pipeline.tasks import shards
from pipeline.tasks.shards import spool
from tests.made import Fatal, Made

REPOSITORY = Path(__file__).resolve().parents[2]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row groups, shards and segments for a few rows."""
    writer = partial(shards.ShardWriter, row_group_bytes=40, shard_bytes=150)
    monkeypatch.setattr(shards, "ShardWriter", writer)
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 600)
    monkeypatch.setattr(preparing, "CHUNK_ITEMS", 5)


class Stop(BaseException):
    pass


@pytest.mark.usefixtures("small_shards")
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_an_interrupted_preparation_goes_on_and_gives_the_same(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("interrupted")
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda s: max(s) > 20))
    modality = data.draw(st.sampled_from(["image", "vector", "text", "encoded_image"]))
    options: dict[str, Any] = {"record": {"name": "made"}, "min_examples": data.draw(st.integers(1, 9)), "workers": 1}
    bad = data.draw(st.sampled_from([0, 2, 7]))
    prepare(Made(sizes, modality=modality, bad=bad), root / "whole", **options)
    source = Made(sizes, modality=modality, bad=bad, trace=str(root / "trace"))
    for _ in range(3):
        left = data.draw(st.integers(1, 30))

        def stop(_: Progress) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Stop

        try:
            prepare(source, root / "data", progress=stop, **options)
        except Stop:
            assert not (root / "data").exists()
        else:
            break
    else:
        prepare(source, root / "data", **options)
    assert bytes_of(root / "data") == bytes_of(root / "whole")
    shards.verify(root / "data")
    assert not list(root.glob(".*"))
    read = (root / "trace").read_text().splitlines()
    assert len(read) == len(set(read)) == sum(sizes), "an item was read twice, or not at all"


PROGRAM = """
import time
from tests.made import Made
from pipeline.datasets.prepare import prepare

def wait(done):
    if done.examples >= 300:
        print("here", flush=True)
        time.sleep(100)

if __name__ == "__main__":
    prepare(Made([60] * 12), {out!r}, record={{}}, workers=2, progress=wait)
"""


def test_a_killed_preparation_goes_on(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(out=str(tmp_path / "data")))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"here"
        process.kill()
    assert not (tmp_path / "data").exists()
    trace = tmp_path / "trace"
    prepare(Made([60] * 12, trace=str(trace)), tmp_path / "data", record={}, workers=1)
    assert len(trace.read_text().splitlines()) == 7 * 60, "what had been read was read again"
    prepare(Made([60] * 12), tmp_path / "whole", record={}, workers=1)
    assert bytes_of(tmp_path / "data") == bytes_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "program.py", "trace", "whole"]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["changed", "journal", "segment", "shard", "shorter"])
def test_what_was_left_is_used_only_if_it_fits(damage: str, tmp_path: Path) -> None:
    def stop(done: Progress) -> None:
        if done.examples > 60:
            raise Stop

    class Other(Made):
        def classes(self) -> Iterator[RawClass]:
            yield from (raw._replace(group="other") if damage == "changed" else raw for raw in super().classes())

    Other.__name__ = "Made"
    with pytest.raises(Stop):
        prepare(Made([30] * 5), tmp_path / "data", record={}, workers=1, progress=stop)
    (left,) = tmp_path.glob(".data.partial-*")
    if damage == "journal":
        lines = (left / spool.JOURNAL).read_text().splitlines()
        (left / spool.JOURNAL).write_text("\n".join([*lines[:3], lines[3][:20]]))
    if damage in ("segment", "shard"):
        file = sorted((left / ("spool" if damage == "segment" else "shards")).iterdir())[0]
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 255
        file.write_bytes(content)
    sizes = [30] * (1 if damage == "shorter" else 5)
    prepare(Other(sizes), tmp_path / "data", record={}, workers=1)
    prepare(Other(sizes), tmp_path / "whole", record={}, workers=1)
    assert bytes_of(tmp_path / "data") == bytes_of(tmp_path / "whole")


def test_other_options_do_not_go_on(tmp_path: Path) -> None:
    def stop(_: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        prepare(Made([3, 4]), tmp_path / "data", record={"size": 1}, progress=stop)
    assert list(tmp_path.glob(".data.partial-*"))
    manifest, _ = prepare(Made([3, 4]), tmp_path / "data", record={"size": 2})
    assert manifest.source["size"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_two_of_the_same_at_once(tmp_path: Path) -> None:
    def again(_: Progress) -> None:
        with pytest.raises(DataError, match="another process is preparing the same data set"):
            prepare(Made([3]), tmp_path / "data", record={})

    prepare(Made([3]), tmp_path / "data", record={}, progress=again)
    shards.verify(tmp_path / "data")


def test_problems_are_counted_recorded_and_refused(tmp_path: Path) -> None:
    source = Made([10, 2, 0, 9], bad=3)
    manifest, _ = prepare(source, tmp_path / "data", record={}, min_examples=2)
    shards.verify(tmp_path / "data")
    assert [(entry.name, entry.count) for entry in manifest.classes] == [("class00", 6), ("class01", 2), ("class03", 6)]
    assert manifest.source["problems"]["count"] == 4 + 0 + 3
    assert manifest.source["problems"]["first"][0] == ["item (0, 0)", "is bad"]
    assert manifest.source["left_out"] == {
        "count": 1,
        "first": [{"class": "class02", "examples": 0, "problems": 0}],
    }
    with pytest.raises(DataError, match=r"item \(0, 0\): is bad; .*class class02: only 0 examples \(and 2 more\)"):
        prepare(source, tmp_path / "strict", record={}, min_examples=2, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.usefixtures("small_shards")
def test_a_process_that_is_killed_is_told_and_processes_change_nothing(tmp_path: Path) -> None:
    sizes = [20, 12, 0, 33, 7, 20]
    with pytest.raises(Unfinished, match=r"was killed.*again to go on, with fewer --workers"):
        prepare(Fatal(sizes, trace=str(os.getpid())), tmp_path / "data", record={}, workers=2)
    assert list(tmp_path.glob(".data.partial-*"))
    prepare(Fatal(sizes, trace=str(os.getpid())), tmp_path / "data", record={}, workers=1)  # reads here
    prepare(Made(sizes), tmp_path / "one", record={}, workers=1)
    prepare(Made(sizes), tmp_path / "two", record={}, workers=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "data")


MEMORY = """
import resource
import sys
from pathlib import Path

import numpy as np

from pipeline.datasets.prepare import prepare
from tests.made import Made


class Large(Made):
    modality = "vector"

    def made(self, items):
        return np.ones((len(items), 16_384), np.float32)  # 64 kB each, so chunks of 4 MB


def peak(examples):
    out = Path(sys.argv[1]) / str(examples)
    manifest, _ = prepare(Large([examples], modality="vector"), out, record={}, workers=1)
    assert manifest.num_examples == examples
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

small = peak(256)
print(small, peak(3072))
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A class of 16 MB, then one of 192 MB in the same process."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    small, large = map(int, ran.stdout.split())  # MB
    assert large - small < 48
