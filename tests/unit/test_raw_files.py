"""Sources of pictures in official files, on files generated here: idx, pickles of arrays, lists, and damaged ones."""

import gzip
import pickle
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import cifar, mnist
from pipeline.datasets.array_pickles import in_file, read_pickle
from pipeline.datasets.source import RawClass, Source
from pipeline.datasets.sources import read_options
from pipeline.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def opened(name: str, folder: Path, **options: Any) -> Source:
    return read_options(name, {"directory": folder, **options}).open(seed=0)


def examples(source: Source, raw: RawClass) -> np.ndarray:
    images, problems = source.read(list(raw.items))
    assert problems == []
    assert isinstance(images, np.ndarray)
    return images


def by_name(source: Source) -> dict[str, RawClass]:
    return {raw.name: raw for raw in source.classes()}


# --- idx


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


def mnist_files(folder: Path, *, compressed: bool, train: int = 130, test: int = 20) -> dict[str, Any]:
    folder.mkdir(parents=True)
    made: dict[str, Any] = {}
    for part, count in (("train", train), ("t10k", test)):
        images = RANDOM.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        images[:, [0, -1]] = images[:, :, [0, -1]] = 0  # paper
        labels = (np.arange(count) % 10).astype(np.uint8)
        made[part] = images, labels
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(values)
            file = folder / f"{part}-{name}-ubyte{'.gz' if compressed else ''}"
            file.write_bytes(gzip.compress(content) if compressed else content)
    return made


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(name: str, compressed: bool, tmp_path: Path) -> None:
    made = mnist_files(tmp_path / "MNIST" / "raw", compressed=compressed)  # as torchvision lays them
    source = opened(name, tmp_path)
    classes = list(source.classes())
    assert len({raw.name for raw in classes}) == 10
    for number, raw in enumerate(classes):
        images = examples(source, raw)
        pixels = np.concatenate([images for images, labels in made.values()])
        labels = np.concatenate([labels for images, labels in made.values()])
        expected = pixels[labels == number][..., None]
        assert images.shape == (15, 28, 28, 1)
        if name == "fashion-mnist":
            assert (images == expected).all()
        else:  # contrast is stretched to 255
            assert (images.astype(int) >= expected).all()
            assert (images.max(axis=(1, 2, 3)) == 255).all()
            assert np.abs(images - expected.astype(int)).max() < 40
    splits = source.splits(seed=0)
    assert Counter(splits["random"].values()) == {"meta_train": 6, "meta_val": 2, "meta_test": 2}
    assert set(splits["all_test"].values()) == {"meta_test"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:-1], "holds less than"),
        (lambda content: content + b"x", "holds more than"),
        (lambda content: b"PK" + content[2:], "not an idx file"),
        (lambda content: content[:3] + b"\x02" + content[4:], "not an idx file"),
        (lambda content: content[:7], "not an idx file"),
        (lambda content: content[:4] + b"\x7f\xff\xff\xff" + content[8:], "more than are read"),
        (lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:], "more than are read"),
        (lambda content: b"", "not an idx file"),
    ],
)
def test_damaged_idx_files(damage: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    mnist_files(tmp_path / "raw", compressed=False)
    file = tmp_path / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte: .*{says}"):
        opened("mnist", tmp_path / "raw")


def test_idx_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    mnist_files(folder, compressed=False)
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match="20 images, but 19 labels"):
        opened("mnist", folder)
    labels.write_bytes(idx(np.full(20, 10, np.uint8)))
    with pytest.raises(DataError, match="t10k has the label 10, of 10 classes"):
        opened("mnist", folder)
    labels.unlink()
    with pytest.raises(DataError, match=r"holds no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        opened("mnist", folder)
    with pytest.raises(ConfigError, match="DIR is missing: give the folder of the official files"):
        read_options("mnist", {}).open(seed=0)


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    mnist_files(tmp_path / "a", compressed=True)
    bomb = idx(np.zeros((10, 28, 28), np.uint8)) + bytes(8 << 20)
    file = tmp_path / "a" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(bomb))
    with pytest.raises(DataError, match="holds more than the 7840 bytes"):
        opened("mnist", tmp_path / "a")
    file.write_bytes(gzip.compress(bomb)[:-9])
    mnist.read_idx.cache_clear()
    with pytest.raises(DataError, match="more than the 7840"):
        opened("mnist", tmp_path / "a")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), compressed=st.booleans())
def test_damage_to_an_idx_file_gives_an_array_or_a_data_error(
    data: st.DataObject, compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = idx(np.arange(60, dtype=np.uint8).reshape(5, 4, 3))
    content = bytearray(gzip.compress(whole) if compressed else whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / ("damaged.gz" if compressed else "damaged")
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    mnist.read_idx.cache_clear()
    try:
        assert mnist.read_idx(file, axes=3).ndim == 3
    except DataError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017


# --- pickles of arrays


def python_2(content: dict[str, Any]) -> bytes:
    """As Python 2 and its NumPy pickled it in protocol 2, as the official files are: texts and bytes are a str."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def value(of: Any) -> bytes:
        if isinstance(of, str):
            return text(of.encode())
        if isinstance(of, list):
            return b"](" + b"".join(number(item) if isinstance(item, int) else value(item) for item in of) + b"e"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + number(-1) + number(-1) + b"K\x00tb"
        shape = b"(" + b"".join(map(number, of.shape)) + b"t"
        begin = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        return begin + b"(K\x01" + shape + kind + b"\x89" + text(of.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(key.encode()) + value(each) for key, each in content.items()) + b"u."


ARRAYS = {
    "uint8": RANDOM.integers(0, 256, (7, 5, 3)).astype(np.uint8),
    "fortran": np.asfortranarray(RANDOM.integers(0, 256, (6, 4)).astype(np.uint8)),
    "big-endian": np.arange(5).astype(">i4"),
    "float64": RANDOM.normal(size=(3, 2)),
    "empty": np.zeros((0, 3), np.uint8),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back_from_any_protocol(kind: str, protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    array = ARRAYS[kind]
    content = {"data": array, b"labels": [1, np.int64(2)], "inner": {"rows": array}, "name": "é"}
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(file)
    np.testing.assert_array_equal(read["data"], array)
    np.testing.assert_array_equal(read["inner"]["rows"], array)
    assert read["data"].dtype == array.dtype
    assert read["labels"] == [1, 2]
    assert read["name"] == "é"
    if protocol > 2 and kind == "uint8":
        rows = in_file(file, read["data"])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows)).open(), array)


class Runs:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_something_is_refused_and_does_not_run(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    for bad in (Runs(), Touches(tmp_path / "ran"), np.array([Runs()], dtype=object), np.dtype("O"), eval, Path("x")):
        file.write_bytes(pickle.dumps({"data": bad}, protocol=protocol))
        with pytest.raises(DataError, match=r"a\.pkl: not read as a pickle of arrays"):
            read_pickle(file)
    assert not (tmp_path / "ran").exists()


WHOLE = pickle.dumps({"data": ARRAYS["uint8"], "labels": [1, 2, 3], "name": "x"}, protocol=4)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_to_a_pickle_gives_content_or_a_data_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.pkl"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(read_pickle(file), dict)
    except DataError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017


def test_arrays_that_are_not_plain_bytes_in_the_file_are_refused_with_a_way_out(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"data": ARRAYS["uint8"]}, protocol=2))  # as escaped text
    with pytest.raises(DataError, match="protocol=4"):
        in_file(file, read_pickle(file)["data"])


# --- CIFAR-100

SUPERCLASSES = [  # the 20 official ones, five classes each
    *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables"),
    *("household_electrical_devices", "household_furniture", "insects", "large_carnivores"),
    *("large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores"),
    *("medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees", "vehicles_1"),
    "vehicles_2",
]
FINE = [
    name
    for line in (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel",
        "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur",
        "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion",
        "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree",
        "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea",
        "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank",
        "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm",
    )
    for name in line.split()
]


def cifar_files(folder: Path) -> dict[str, np.ndarray]:
    """Three images of each class for training and one for test, in the official form. Returns each part's images."""
    folder.mkdir(parents=True)
    made = {}
    for part, per_class in (("train", 3), ("test", 1)):
        fine = RANDOM.permutation(np.repeat(np.arange(100), per_class))
        images = RANDOM.integers(0, 256, (len(fine), 3072)).astype(np.uint8)
        content = {
            "filenames": [f"{n}.png" for n in range(len(fine))],
            "batch_label": "of 1",
            "fine_labels": fine.tolist(),
            "coarse_labels": (fine % 20).tolist(),  # which is whose does not matter here
            "data": images,
        }
        (folder / part).write_bytes(python_2(content))
        made[part] = images[fine == 7]
    names = {"fine_label_names": FINE, "coarse_label_names": SUPERCLASSES}
    (folder / "meta").write_bytes(python_2(names))
    return made


def archived(folder: Path) -> Path:
    archive = folder.parent / cifar.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar.FOLDER)
    return archive


def test_the_published_lists_are_of_cifar_100() -> None:
    assert sorted(FINE) == FINE
    assert len(FINE) == 100
    chosen = [name for names in cifar.CIFAR_FS.values() for name in names]
    assert len(set(chosen)) == 36
    assert set(chosen) <= set(FINE)
    assert {name for names in cifar.FC100.values() for name in names} <= set(SUPERCLASSES)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cifar-fs", {"meta_train": 64, "meta_val": 16, "meta_test": 20}),
        ("fc100", {"meta_train": 60, "meta_val": 20, "meta_test": 20}),
    ],
)
def test_cifar_100_in_both_splits(name: str, counts: dict[str, int], tmp_path: Path) -> None:
    made = cifar_files(tmp_path / "x" / cifar.FOLDER)
    source = opened(name, tmp_path / "x")
    classes = by_name(source)
    assert list(classes) == FINE
    (split,) = source.splits(seed=0).values()
    assert Counter(split.values()) == counts
    images = examples(source, classes["beetle"])  # number 7
    expected = np.concatenate([made["train"], made["test"]]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert (images == expected).all()
    assert classes["beetle"].group == "insects"
    if name == "fc100":
        parts = {group: {split[raw.name] for raw in classes.values() if raw.group == group} for group in SUPERCLASSES}
        assert all(len(part) == 1 for part in parts.values())
        assert parts["people"] == {"meta_test"}
        assert parts["small_mammals"] == {"meta_val"}
    else:
        assert (split["beetle"], split["worm"], split["apple"]) == ("meta_val", "meta_test", "meta_train")


def test_the_archive_is_extracted_once(tmp_path: Path) -> None:
    cifar_files(tmp_path / "made" / cifar.FOLDER)
    archive = archived(tmp_path / "made" / cifar.FOLDER)
    raw = tmp_path / "raw"
    raw.mkdir()
    archive.rename(raw / cifar.ARCHIVE)
    assert len(by_name(opened("cifar-fs", raw))) == 100
    (raw / cifar.ARCHIVE).write_bytes(b"")
    assert len(by_name(opened("cifar-fs", raw))) == 100
    assert sorted(path.name for path in raw.iterdir()) == [cifar.FOLDER, cifar.ARCHIVE]


def test_archives_that_lead_elsewhere_or_are_damaged(tmp_path: Path) -> None:
    cifar_files(tmp_path / "made" / cifar.FOLDER)
    whole = archived(tmp_path / "made" / cifar.FOLDER).read_bytes()
    raw = tmp_path / "raw"
    raw.mkdir()
    file = raw / cifar.ARCHIVE
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz: cannot be extracted"):
            opened("cifar-fs", raw)
    with tarfile.open(file, "w:gz") as tar:
        for name in cifar.FILES:
            link = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(DataError, match="train is no plain file"):
        opened("cifar-fs", raw)
    assert [path.name for path in raw.iterdir()] == [cifar.ARCHIVE]
    with pytest.raises(DataError, match=r"holds neither cifar-100-python\.tar\.gz nor"):
        opened("fc100", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": np.zeros((4, 10), np.uint8)}, "no images of 32×32×3"),
        ({"data": "text"}, "no images of 32×32×3"),
        ({"fine_labels": [0]}, "but labels of"),
        ({"fine_labels": ["a"]}, "no numbers"),
        ({"fine_labels": [100] * 100}, "labels beyond the 100 classes"),
        ({"coarse_labels": [-1] * 100}, "labels beyond|has no images"),
    ],
)
def test_cifar_files_of_another_make(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = tmp_path / cifar.FOLDER
    cifar_files(folder)
    content = read_pickle(folder / "test")
    (folder / "test").write_bytes(pickle.dumps({**content, **change}, protocol=4))
    with pytest.raises(DataError, match=says):
        opened("fc100", folder)


# --- mini-ImageNet

PARTS = {"train": 4, "val": 2, "test": 3}  # classes


def listed_files(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    number = 0
    for part, classes in PARTS.items():
        rows = ["filename,label"]
        for c in range(classes):
            for i in range(3):
                number += 1
                name = f"n{part}{c:04d}{i:08d}.jpg"
                pixels = RANDOM.integers(0, 256, (40 + number, 60, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name)
                rows.append(f"{name},n{part}{c:04d}")
        (folder / f"{part}.csv").write_text("\n".join(rows) + "\n")


def test_ravi_and_larochelles_lists(tmp_path: Path) -> None:
    listed_files(tmp_path / "mini")
    (tmp_path / "mini" / "images" / "ntrain000000000001.jpg").unlink()
    source = opened("mini-imagenet", tmp_path / "mini", size=16)
    assert Counter(source.splits(seed=0)["ravi_larochelle"].values()) == {
        "meta_train": 4,
        "meta_val": 2,
        "meta_test": 3,
    }
    images, problems = source.read(list(by_name(source)["ntrain0000"].items))
    assert np.asarray(images).shape == (2, 16, 16, 3)
    assert [problem.reason for problem in problems] == ["no such picture."]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("../../secret.jpg,n1", "no name of a file in images/"),
        ("/etc/passwd,n1", "no name of a file in images/"),
        (",n1", "needs the columns filename and label"),
        ("a.jpg", "needs the columns filename and label"),
        ("a.jpg,ntest0000", "class ntest0000 is in another list as well"),
    ],
)
def test_lists_of_another_make(row: str, says: str, tmp_path: Path) -> None:
    listed_files(tmp_path / "mini")
    with (tmp_path / "mini" / "val.csv").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(DataError, match=says):
        opened("mini-imagenet", tmp_path / "mini")


def cache_files(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    made = {}
    for part, classes in PARTS.items():
        images = RANDOM.integers(0, 256, (classes * 5, 20, 20, 3)).astype(np.uint8)
        rows = RANDOM.permutation(len(images)).reshape(classes, 5)
        members = {f"n{part}{c:04d}": rows[c].tolist() for c in range(classes)}
        content = {"image_data": images, "class_dict": members}
        (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(content, protocol=3))
        made |= {name: images[sorted(rows)] for name, rows in members.items()}
    return made


def test_the_caches(tmp_path: Path) -> None:
    made = cache_files(tmp_path / "mini")
    source = opened("mini-imagenet", tmp_path / "mini", size=20)
    classes = by_name(source)
    assert classes.keys() == made.keys()
    for name, raw in classes.items():
        assert (examples(source, raw) == made[name]).all()
    assert Counter(source.splits(seed=0)["ravi_larochelle"].values()) == {
        "meta_train": 4,
        "meta_val": 2,
        "meta_test": 3,
    }
    assert pickle.loads(pickle.dumps(source)).splits(seed=0) == source.splits(seed=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"image_data": np.zeros((2, 4, 4), np.uint8), "class_dict": {"a": [0]}}, "holds no images"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": [0]}, "holds no class_dict"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [2]}}, "rows that are not there"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": ["x"]}}, "rows that are not there"),
        (
            {"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"ntrain0000": [0]}},
            "in another file as well",
        ),
        ([1], "holds list, where a dict"),
    ],
)
def test_caches_of_another_make(content: Any, says: str, tmp_path: Path) -> None:
    cache_files(tmp_path / "mini")
    (tmp_path / "mini" / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DataError, match=says):
        opened("mini-imagenet", tmp_path / "mini")
    with pytest.raises(DataError, match=r"holds neither train\.csv"):
        opened("mini-imagenet", tmp_path)


# --- noise


def test_fake_data_is_torchvisions_and_a_function_of_its_seed() -> None:
    from torchvision.datasets import FakeData

    options = read_options("fake", {"classes": 6, "per_class": 4, "size": 8})
    source, again, other = options.open(seed=0), options.open(seed=0), options.open(seed=1)
    classes = by_name(source)
    assert list(classes) == [f"fake{n}" for n in range(6)]
    data = FakeData(24, (3, 8, 8), 6)
    for number, raw in enumerate(classes.values()):
        expected = [np.asarray(picture) for picture, label in (data[i] for i in range(24)) if label == number]
        assert (examples(source, raw) == np.stack(expected)).all()
        assert (examples(again, raw) == np.stack(expected)).all()
    assert any(list(a.items) != list(b.items) for a, b in zip(source.classes(), other.classes(), strict=True))
