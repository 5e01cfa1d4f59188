"""Data sets larger than memory: windows of classes, and the cache that holds them."""

import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import validate
from pipeline.errors import DataError
from pipeline.tasks import class_cache, shards, upcoming
from pipeline.tasks.class_cache import ClassCache
from pipeline.tasks.class_images import ClassImages
from pipeline.tasks.classes import ClassTasks
from pipeline.tasks.images import CachedImages, ImagesConfig, ImageTasks
from pipeline.tasks.shards import reader
from pipeline.tasks.tabular import TabularTasksConfig
from pipeline.tasks.text import TextTasksConfig
from pipeline.tasks.windows import WindowConfig, Windows
from pipeline.types import SPLITS, TaskBatch
from tests.servers.web import serving

WINDOW = {"classes": 4, "steps": 3, "eval_episodes": 2}


@pytest.fixture(scope="module")
def data(tiny_data_set: Callable[..., Path]) -> Path:
    """48 classes, 16 in each part, of 8 images of 144 bytes."""
    return tiny_data_set(classes=48)


def tasks(data: Path, *, memory_limit_mb: int = 0, **options: Any) -> ImageTasks:
    content = {"family": "images", "data": data, "split": "random", "n_way": 3, "k_shot": 2, "n_query": 2}
    content |= {"eval_n_query": 2, "memory_limit_mb": memory_limit_mb, **options}
    config = validate(ImagesConfig, content, source="test")
    return config.build(device=torch.device("cpu"), dtype=torch.float32)


def equal(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=25, deadline=None)
@given(every=st.integers(3, 40), size=st.integers(2, 12), number=st.integers(0, 10**6), seed=st.integers(0, 2**40))
def test_within_a_round_no_class_comes_twice(every: int, size: int, number: int, seed: int) -> None:
    size = min(size, every - 1)
    windows = Windows(WindowConfig(classes=size, steps=1), {"meta_train": every, "meta_val": every, "meta_test": 2})
    in_round = every // size
    first = number - number % in_round
    dealt = torch.cat([windows.classes(seed, "meta_train", first + i) for i in range(in_round)])
    assert len(dealt.unique()) == len(dealt) == in_round * size
    assert 0 <= int(dealt.min()) <= int(dealt.max()) < every
    again = Windows(windows.config, {"meta_train": every, "meta_val": every, "meta_test": 2})
    assert torch.equal(again.classes(seed, "meta_train", number), windows.classes(seed, "meta_train", number))
    several = torch.tensor([[number], [0], [number]])
    assert torch.equal(
        windows.candidates(seed, "meta_train", several)[[0, 2], 0],
        windows.classes(seed, "meta_train", number).expand(2, -1),
    )
    one = windows.candidates(seed, "meta_train", torch.full((100, 1), number), copies=4)
    assert one.shape == (100, 1, 4 * size)
    assert one.untyped_storage().nbytes() == 4 * size * 8
    assert torch.equal(one[99, 0, size : 2 * size], windows.classes(seed, "meta_train", number) + every)


def test_all_classes_come_and_orders_differ() -> None:
    windows = Windows(WindowConfig(classes=5, steps=1), {"meta_train": 12, "meta_val": 12, "meta_test": 12})
    dealt = [windows.classes(0, "meta_train", number) for number in range(400)]
    counts = torch.cat(dealt).bincount(minlength=12)
    assert int(counts.sum()) == 2000
    assert 130 < int(counts.min()) <= int(counts.max()) < 200  # 2000 / 12 = 167 each
    assert len({tuple(window.tolist()) for window in dealt}) > 390
    others = [windows.classes(1, "meta_train", 0), windows.classes(0, "meta_val", 0)]
    assert not any(torch.equal(dealt[0], other) for other in others)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotations": "new_classes"},
        {"difficulty": {"strength": 1.0}},
        {"variable": {"least_n_way": 2, "most_shots": 4}},
    ],
)
def test_a_step_holds_classes_of_its_window_alone(data: Path, options: dict[str, Any]) -> None:
    family = tasks(data, window=WINDOW, **options)
    assert family._windows is not None
    number = family.train_classes
    weights = torch.rand(number, dtype=torch.float64) + 0.1 if "difficulty" in options else None
    for step in (0, 2, 3, 17, 18):
        window = set(family._windows.classes(5, "meta_train", step // 3).tolist())
        batch = family.sample("meta_train", step, torch.arange(30), seed=5, weights=weights)
        assert batch.classes is not None
        assert {c % 16 for c in batch.classes.flatten().tolist()} == window
        assert all(len(set(row)) == len(row) for row in batch.classes.tolist())
        if options.get("rotations"):
            assert {c // 16 for c in batch.classes.flatten().tolist()} == {0, 1, 2, 3}


def test_hard_classes_of_a_window_come_more_often(data: Path) -> None:
    family = tasks(data, window=WINDOW)
    assert family._windows is not None
    window = family._windows.classes(0, "meta_train", 0)
    weights = torch.full((16,), 0.01, dtype=torch.float64)
    weights[window[0]] = 1
    batch = family.sample("meta_train", 0, torch.arange(50), seed=0, weights=weights)
    assert batch.classes is not None
    assert int((batch.classes == window[0]).sum()) > 45


def test_validation_draws_from_a_window_for_some_slots(data: Path) -> None:
    family = tasks(data, window=WINDOW)
    slots = torch.arange(60)
    batch = family.sample("meta_val", 0, slots, seed=0)
    assert batch.classes is not None
    for slot in range(0, 60, 2):
        assert len(batch.classes[slot : slot + 2].unique()) <= 4
    assert len(batch.classes.unique()) == 16  # over all slots every class of the part
    assert equal(family.sample("meta_val", 0, slots[1::2], seed=0), batch.tasks(slots[1::2]))


def test_the_same_episodes_from_memory_from_shards_and_from_the_cache(data: Path) -> None:
    """In whatever order they are asked for, by one worker or two, from the start or later."""
    whole = tasks(data, window=WINDOW, memory_limit_mb=100)
    cached = tasks(data, window=WINDOW)
    assert (whole.prefetch, cached.prefetch) == (False, True)
    assert isinstance(cached._images, CachedImages)
    slots = torch.arange(8)
    for step in range(14):
        expected = whole.sample("meta_train", step, slots, seed=1)
        assert equal(cached.sample("meta_train", step, slots, seed=1), expected)
    late = tasks(data, window=WINDOW)
    for rank in range(2):
        share = late.sample("meta_train", 13, slots[rank::2], seed=1)
        assert equal(share, expected.tasks(slots[rank::2]))
    for split in ("meta_val", "meta_test"):
        assert equal(cached.sample(split, 0, slots, seed=1), whole.sample(split, 0, slots, seed=1))
    assert torch.equal(cached.examples("meta_val", [3, 1], 5), whole.examples("meta_val", [3, 1], 5))


# rows of tables, and texts

OTHERS: dict[str, Any] = {"text": TextTasksConfig, "tabular": TabularTasksConfig}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": {"classes": 4, "steps": 2, "eval_episodes": 2}},
    {"window": {"classes": 3, "steps": 1, "eval_episodes": 2}, "variable": {"least_n_way": 2, "most_shots": 3}},
]


def others(family: str, data: Path | str, *, memory_limit_mb: int = 0, **options: Any) -> ClassTasks:
    content = {"family": family, "data": data, "split": "random", "n_way": 3, "k_shot": 2, "n_query": 2}
    content |= {"eval_n_query": 2, "memory_limit_mb": memory_limit_mb, **options}
    built = validate(OTHERS[family], content, source="test").build(device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(built, ClassTasks)
    return built


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", OTHERS)
def test_rows_and_texts_give_the_same_episodes_from_memory_files_and_a_web_server(
    family: str, options: dict[str, Any], tiny_sets: dict[str, Path]
) -> None:
    data = tiny_sets[family]
    whole = others(family, data, memory_limit_mb=100, **options)
    with serving(data.parent) as server:
        large = [others(family, place, **options) for place in (data, f"{server.address}/{data.name}")]
        assert [each.prefetch for each in (whole, *large)] == [False, True, True]
        slots = torch.arange(8)
        windowed = "window" in options
        assert (large[0]._cache is not None, large[1]._cache is not None) == (windowed, True)
        met = []
        for step in range(6):
            expected = whole.sample("meta_train", step, slots, seed=1)
            assert expected.classes is not None
            met.append(set(expected.classes.flatten().tolist()))
            assert all(equal(each.sample("meta_train", step, slots, seed=1), expected) for each in large)
        assert all(len(classes) == options["window"]["classes"] if windowed else 5 for classes in met)
        assert len(set.union(*met)) == 6 if windowed else 5
        for split in SPLITS[1:]:
            for some in whole.alike(split, slots):
                expected = whole.sample(split, 0, some, seed=1)
                assert all(equal(each.sample(split, 0, some, seed=1), expected) for each in large)
        share = others(family, data, **options).sample("meta_train", 5, slots[1::2], seed=1)  # another worker's, later
        assert equal(share, whole.sample("meta_train", 5, slots[1::2], seed=1))


def held(family: ClassTasks) -> int:
    """Bytes of the arrays that are there."""
    assert family._cache is not None
    futures = list(family._cache.cache._held.values())
    return sum(future.result().nbytes for future in futures if future.done())


def test_no_more_rows_are_held_than_the_cache_may(tmp_path: Path) -> None:
    """Of 60 classes of 96 KB five in a megabyte and no more, of which four are two windows."""
    random = np.random.default_rng(0)
    names = [f"class{number:02d}" for number in range(60)]
    rows = (shards.ClassExamples(name, "all", random.normal(size=(1500, 16)).astype(np.float32)) for name in names)
    parts = {"random": {name: SPLITS[0 if i < 54 else 1 + i % 2] for i, name in enumerate(names)}}
    shards.write(tmp_path / "set", rows, modality="vector", splits=parts, source={}, preprocessing={})
    how: dict[str, Any] = {"window": {"classes": 5, "steps": 2, "eval_episodes": 1}, "cache_mb": 1}
    family, whole = (others("tabular", tmp_path / "set", **how, memory_limit_mb=mb) for mb in (0, 100))
    assert family._cache is not None
    cache = family._cache.cache
    most = 0
    for step in range(25):
        batch = family.sample("meta_train", step, torch.arange(3), seed=0)
        assert cache.nbytes <= cache.capacity == 1 << 20
        most = max(most, held(family))
        assert most <= cache.capacity
        assert equal(batch, whole.sample("meta_train", step, torch.arange(3), seed=0))
    until(lambda: readers() == 0)
    assert held(family) == cache.nbytes  # nothing is left out of the account
    assert most > 5 * 96_000
    assert cache.counts.read > 30


def test_texts_are_held_as_their_numbers(tiny_sets: dict[str, Path]) -> None:
    """Which take as much as the manifest tells before they are read, whatever the texts' lengths."""
    family = others("text", tiny_sets["text"], window={"classes": 3, "steps": 1}, tokens={"max_tokens": 4096})
    family.sample("meta_train", 0, torch.arange(2), seed=0)
    until(lambda: readers() == 0)
    assert family._cache is not None
    assert held(family) == family._cache.cache.nbytes > 0
    assert held(family) % (8 * 4096 * 4) == 0
    with pytest.raises(DataError, match=r"two windows of task.window.classes=5 classes take up to 12 MB"):
        others("text", tiny_sets["text"], window={"classes": 5, "steps": 1}, tokens={"max_tokens": 65536}, cache_mb=5)


@pytest.mark.parametrize("family", OTHERS)
def test_a_damaged_class_of_rows_stops_the_step_that_needs_it(
    family: str, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_sets[family], tmp_path / "set")
    tasks_of = others(family, tmp_path / "set", window={"classes": 3, "steps": 1})
    for shard in tasks_of.manifest.shards:
        file = tmp_path / "set" / shard.file
        content = bytearray(file.read_bytes())
        content[100 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - 100)
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"shards/00000\.parquet"):
        tasks_of.sample("meta_train", 0, torch.arange(2), seed=0)


def test_a_set_that_is_held_in_memory_is_checked_whole(tiny_data_set: Callable[..., Path], tmp_path: Path) -> None:
    """Also with windows: nobody looks at its classes again when they are read."""
    folder = tmp_path / "set"
    shutil.copytree(tiny_data_set(classes=48), folder)
    content = {"family": "images", "data": folder, "split": "random", "n_way": 3, "n_query": 2}
    content |= {"eval_n_query": 2, "window": WINDOW}
    config = validate(ImagesConfig, content, source="test")
    config.verify()
    file = next((folder / "shards").iterdir())
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    with pytest.raises(DataError, match=r"00000\.parquet"):
        config.verify()
    config.model_copy(update={"memory_limit_mb": 0}).verify()


def test_results_tell_of_windows(data: Path) -> None:
    assert tasks(data, window=WINDOW).description["window"] == WINDOW
    assert "window" not in tasks(data, window={"classes": 16, "steps": 1}).description


def test_a_window_of_all_classes_changes_nothing(data: Path) -> None:
    plain, windowed = tasks(data), tasks(data, window={"classes": 16, "steps": 1})
    for step in (0, 1, 7):
        batch = windowed.sample("meta_train", step, torch.arange(5), seed=0)
        assert equal(batch, plain.sample("meta_train", step, torch.arange(5), seed=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": {"classes": 2, "steps": 3}}, r"window.classes=2 is too few for 3-way episodes"),
        ({"window": {"classes": 16, "steps": 3}, "cache_mb": 1, "scale": 1000}, r"take up to 2 MB.*task.cache_mb=1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    data: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = options.pop("scale", None)
    if scale:  # as if the images were larger
        monkeypatch.setattr(shards.Manifest, "image_bytes", property(lambda self: 16 * scale))
    with pytest.raises(DataError, match=words):
        tasks(data, **options)


def test_a_damaged_class_stops_the_step_that_needs_it(tiny_data_set: Callable[..., Path]) -> None:
    """And no step before it. Repaired, the same family goes on."""
    data = tiny_data_set(classes=48)
    family = tasks(data, window={"classes": 3, "steps": 2})
    whole = tasks(data, window={"classes": 3, "steps": 2}, memory_limit_mb=100)
    slots = torch.arange(4)
    reference = whole.sample("meta_train", 2, slots, seed=0)
    assert family._windows is not None
    entry = family.entries("meta_train")[int(family._windows.classes(0, "meta_train", 1)[0])]
    file = data / family.manifest.shards[entry.row_groups[0].shard].file
    sound = file.read_bytes()
    pixels = shards.ShardReader(data, family.manifest).read_class(family.manifest.classes.index(entry))
    place = sound.index(pixels.tobytes()) + 50
    put(file, place, bytes([sound[place] ^ 1]))
    for step in (0, 1):
        family.sample("meta_train", step, slots, seed=0)
    with pytest.raises(DataError, match=file.name):
        family.sample("meta_train", 2, slots, seed=0)
    put(file, place, sound[place : place + 1])
    assert equal(family.sample("meta_train", 2, slots, seed=0), reference)


def test_a_reader_that_keeps_nothing_keeps_few_footers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_FOOTERS", 1)
    manifest = shards.read_manifest(data)
    several = shards.write(
        data.parent / "several",
        [
            shards.ClassExamples(entry.name, entry.group, shards.ShardReader(data, manifest).read_class(number))
            for number, entry in enumerate(manifest.classes[:6])
        ],
        splits={"random": {entry.name: entry.splits["random"] for entry in manifest.classes[:6]}},
        source={},
        preprocessing={},
        shard_bytes=2000,
    )
    assert len(several.shards) > 2
    with shards.ShardReader(data.parent / "several", several, keep=False) as once:
        for number in (0, 5, 0, 3, 5):
            parts = np.concatenate(list(once.parts(number)))
            assert (parts == shards.ShardReader(data, manifest).read_class(number)).all()
            assert len(once._footers) == len(once._chunks) == 1
        assert not once._files


# the cache


def numbered(number: int) -> np.ndarray:
    return np.full(10, number, dtype=np.uint8)


def test_the_cache_holds_no_more_than_its_capacity() -> None:
    read: list[int] = []

    def load(number: int) -> np.ndarray:
        read.append(number)
        return numbered(number)

    cache = ClassCache(load, lambda _: 10, capacity=30)
    for number in (1, 2, 3, 1, 4, 1, 2):
        assert (cache.get(number) == number).all()
        assert cache.nbytes <= 30
    assert read == [1, 2, 3, 4, 2]  # 2 was the one unused for longest when 4 came
    assert (cache.counts.hits, cache.counts.misses) == (2, 5)


def test_what_is_expected_is_read_ahead_in_order_and_stays() -> None:
    read: list[int] = []

    def load(number: int) -> np.ndarray:
        read.append(number)
        return numbered(number)

    cache = ClassCache(load, lambda _: 10, capacity=30, readers=1)
    cache.expect([7, 5, 6])
    until(lambda: len(read) == 3)
    assert read == [7, 5, 6]
    for number in range(20, 24):  # there is no room for them
        assert (cache.get(number) == number).all()
    assert cache.nbytes == 30
    assert [int(cache.get(number)[0]) for number in (5, 6, 7)] == [5, 6, 7]
    assert read == [7, 5, 6, 20, 21, 22, 23]
    assert cache.counts.hits == 3
    cache.expect([6, 8])
    until(lambda: 8 in read)
    assert (cache.get(8) == 8).all()
    assert cache.nbytes == 30


def test_what_failed_ahead_is_tried_again_when_it_is_needed() -> None:
    broken, tries = {1, 2}, []

    def load(number: int) -> np.ndarray:
        tries.append(number)
        if number in broken:
            raise DataError(f"shard {number}")
        return numbered(number)

    cache = ClassCache(load, lambda _: 10, capacity=100, readers=1)
    cache.expect([1, 2, 3])
    until(lambda: len(tries) == 3)
    assert (cache.get(3) == 3).all()
    with pytest.raises(DataError, match="shard 1"):
        cache.get(1)
    broken.clear()
    assert (cache.get(1) == 1).all()
    assert (cache.get(2) == 2).all()
    until(lambda: cache.nbytes == 30)


def test_many_threads_read_each_class_once() -> None:
    read: list[int] = []

    def load(number: int) -> np.ndarray:
        time.sleep(0.002)
        read.append(number)
        return numbered(number)

    cache = ClassCache(load, lambda _: 10, capacity=1000)
    cache.expect(range(20))
    wrong: list[int] = []

    def ask() -> None:
        wrong.extend(number for number in range(20) if not (cache.get(number) == number).all())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(read) == list(range(20))


def test_reading_ahead_ends_with_the_cache() -> None:
    def load(number: int) -> np.ndarray:
        time.sleep(0.01)
        return numbered(number)

    cache = ClassCache(load, lambda _: 10, capacity=10**6)
    cache.expect(range(10_000))
    assert readers() > 0
    cache.close()
    until(lambda: readers() == 0)


def test_reading_ahead_ends_with_the_family(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ClassImages.read
    monkeypatch.setattr(ClassImages, "read", lambda self, number: (time.sleep(0.05), read(self, number))[1])
    family = tasks(data, window={"classes": 8, "steps": 1})
    family.sample("meta_train", 0, torch.arange(1), seed=0)
    assert readers() > 0
    queue = family._images.cache._queue  # type: ignore[attr-defined]
    del family
    gc.collect()  # it is in a cycle
    assert not queue
    until(lambda: readers() == 0)


def test_a_program_ends_while_it_reads_ahead() -> None:
    program = """
import runpy, sys, time
import numpy as np
ClassCache = runpy.run_path(sys.argv[1])["ClassCache"]  # without its package, which imports torch

def load(number):
    time.sleep(0.05)
    return np.zeros(1, np.uint8)

cache = ClassCache(load, lambda _: 1, capacity=10**6)
cache.expect(range(10_000))
print(cache.get(3))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, class_cache.__file__], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[0]\n", "")


def put(file: Path, place: int, content: bytes) -> None:
    """Into a file that stays as long as it is: it is mapped."""
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(content)


def readers() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@settings(max_examples=15, deadline=None)
@given(
    slots=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    step=st.integers(0, 200),
    length=st.integers(1, 7),
    size=st.integers(3, 15),
    varies=st.booleans(),
)
def test_what_is_read_ahead_is_what_is_drawn(
    many: Path, slots: list[int], step: int, length: int, size: int, varies: bool
) -> None:
    """In the order of its first use, to the end of the next window; each of its classes no longer than it is used."""
    how: dict[str, Any] = {"variable": {"least_n_way": 3, "most_shots": 2}} if varies else {}
    family = others("tabular", many, window={"classes": size, "steps": length}, n_way=3, memory_limit_mb=9, **how)
    assert family._upcoming is not None
    drawn: dict[int, None] = {}
    for each in range(step, (step // length + 2) * length):
        batch = family.sample("meta_train", each, torch.tensor(slots), seed=7)
        assert batch.classes is not None
        drawn |= dict.fromkeys(batch.classes.flatten().tolist())
    expected = dict.fromkeys(family._upcoming.near(step, torch.tensor(slots), seed=7))
    assert expected.keys() == drawn.keys()
    if step % length == 0:
        assert list(expected) == list(drawn)
    assert len(expected) <= 2 * size


def test_of_a_long_window_and_of_weighted_draws_all_is_read(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = {"classes": 12, "steps": 50}
    family = others("tabular", many, window=window, memory_limit_mb=9)
    weighted = others("tabular", many, window=window, difficulty={"strength": 1.0})
    assert family._windows is not None
    assert family._upcoming is not None
    both = [set(family._windows.classes(0, "meta_train", number).tolist()) for number in range(2)]
    slots = torch.arange(1)
    for known in (True, False):
        assert set(family._upcoming.near(0, slots, seed=0, known=known)) == set.union(*both)
    monkeypatch.setattr(upcoming, "EPISODES_KNOWN", 1)
    several = torch.arange(2)
    first = family._drawn_classes(0, torch.tensor([[0]]), several).flatten().tolist()
    near = family._upcoming.near(49, several, seed=0)
    assert near[: len(set(first))] == list(dict.fromkeys(first))
    assert set(near) == set.union(*both)
    weighted.sample("meta_train", 0, slots, seed=0)
    until(lambda: readers() == 0)
    assert weighted._cache is not None
    members = weighted._members["meta_train"].tolist()
    assert weighted._cache.cache._held.keys() >= {members[each] for each in set.union(*both)}


def test_what_is_spare_gives_way_to_what_is_needed() -> None:
    cache = ClassCache(numbered, lambda _: 10, capacity=50, readers=1)
    cache.expect([1, 2], [2, 3, 4, 5, 6, 7])
    until(lambda: readers() == 0)
    assert set(cache._held) == {1, 2, 3, 4, 5}
    assert (cache.get(9) == 9).all()
    assert set(cache._held) == {1, 2, 3, 4, 9}
    cache.need([8, 9])
    assert [int(cache.get(number)[0]) for number in (8, 9)] == [8, 9]
    until(lambda: readers() == 0)
    assert set(cache._held) == {1, 2, 3, 8, 9}  # without those that come last
    cache.expect([2, 3, 4], [5])
    until(lambda: readers() == 0)
    assert set(cache._held) == {2, 3, 4, 8, 9}  # 5 has to wait until something else is needed than 8 and 9
    cache.need([2])
    cache.expect([2, 3, 4], [5])
    until(lambda: readers() == 0)
    assert set(cache._held) >= {2, 3, 4, 5}
    assert cache.nbytes == 50


class Paced:
    """A slow file system: the threads that read ahead read so many classes as they are granted, and no more."""

    def __init__(self, family: ClassTasks, *, capacity: int) -> None:
        assert family._cache is not None
        self.family, self.cache = family, family._cache.cache
        self.cache.capacity = capacity * self.cache._nbytes(0)
        self._load, self.cache._load = self.cache._load, self.load
        self._turn = threading.Condition()
        self._waiting: set[int] = set()
        self._granted = 0

    def load(self, number: int) -> np.ndarray:
        if threading.current_thread().name == "read-ahead":
            with self._turn:
                self._waiting.add(number)  # a class is read by one thread
                self._turn.wait_for(lambda: self._granted > 0 and self._first() == number)
                self._waiting.remove(number)
                self._granted -= 1
                self._turn.notify_all()
        return self._load(number)

    def _first(self) -> int:
        """Which of those that wait was begun first."""
        with self.cache._lock:
            return next(number for number in self.cache._held if number in self._waiting)

    def grant(self, classes: int) -> None:
        """Returns when they are read, or nothing more is wanted. What is not read then is time that is lost."""
        until(lambda: self.cache._reading == len(self._waiting))
        with self._turn:
            self._granted = classes
            self._turn.notify_all()
        until(lambda: self.cache._reading == len(self._waiting) and not (self._granted and self._waiting))
        with self._turn:
            self._granted = 0

    def not_ready(self, step: int) -> int:
        """Draws a step: how many of its classes had to be waited for."""
        counts = self.cache.counts
        before = counts.late + counts.misses
        with ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(self.family.sample, "meta_train", step, torch.arange(2), seed=3)
            until(lambda: drawn.done() or counts.late + counts.misses > before)
            while not drawn.done():
                self.grant(1)
            drawn.result()
        return counts.late + counts.misses - before

    def end(self) -> None:
        self.cache.close()
        with self._turn:
            self._granted = 1000
            self._turn.notify_all()


@pytest.mark.parametrize(
    ("pace", "capacity"),
    [((2, 2, 3, 3), 20), ((0, 0, 0, 10), 30), ((0, 10, 0, 0), 30), ((0,) * 7 + (20,), 40)],
    ids=str,
)
def test_a_reader_within_the_windows_budget_makes_no_step_wait(
    pace: tuple[int, ...], capacity: int, many: Path
) -> None:
    """Windows of 10 classes for 4 steps. The reader reads 10 in 4 steps, evenly, or none for a while and then many."""
    family = others("tabular", many, window={"classes": 10, "steps": 4}, n_way=3)
    reader = Paced(family, capacity=capacity)
    try:
        reader.not_ready(0)
        reader.grant(capacity)  # warmed up
        late = {}
        for step in range(1, 60):
            late[step] = reader.not_ready(step)
            reader.grant(pace[step % len(pace)])
            assert reader.cache.nbytes <= reader.cache.capacity
        assert sum(late.values()) == 0, {step: count for step, count in late.items() if count}
    finally:
        reader.end()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 classes of 8 rows, 64 of them of meta-training."""
    random = np.random.default_rng(0)
    names = [f"class{number:02d}" for number in range(70)]
    rows = (shards.ClassExamples(name, "all", random.normal(size=(8, 2)).astype(np.float32)) for name in names)
    parts = {"random": {name: SPLITS[0 if i < 64 else 1 + i % 2] for i, name in enumerate(names)}}
    out = tmp_path_factory.mktemp("many") / "set"
    shards.write(out, rows, modality="vector", splits=parts, source={}, preprocessing={})
    return out
