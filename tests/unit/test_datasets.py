"""Raw data -> a data set: splits, pictures of every kind, Omniglot, folders of pictures, the whole preparation."""

import io
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from jobs import data, data_prepare
from pipeline.datasets.image_folder import ImageFolder, class_folders
from pipeline.datasets.omniglot import BACKGROUND, EVALUATION, Omniglot
from pipeline.datasets.prepare import Progress, prepare
from pipeline.datasets.preprocessing import Preprocessing, open_picture
from pipeline.datasets.source import Source
from pipeline.datasets.splits import group_split, random_split, shuffled
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import shards

# --- splits

names = st.lists(st.text(max_size=5), min_size=1, max_size=60, unique=True)
seeds = st.integers(0, 1000)


def test_the_papers_counts() -> None:
    split = random_split([f"alphabet/{i}" for i in range(1623)], seed=0)
    assert Counter(split.values()) == {"meta_train": 1100, "meta_val": 100, "meta_test": 423}


@settings(max_examples=50, deadline=None)
@given(names=names, seed=seeds, new=st.text(min_size=6, max_size=8))
def test_adding_a_class_keeps_the_order_of_the_others(names: list[str], seed: int, new: str) -> None:
    """So each boundary between parts moves by at most one class."""
    assert [name for name in shuffled([*names, new], seed) if name != new] == shuffled(names, seed)
    assert shuffled(list(reversed(names)), seed) == shuffled(names, seed)
    before, after = random_split(names, seed=seed), random_split([*names, new], seed=seed)
    assert before.keys() == set(names)
    assert sum(before[name] != after[name] for name in names) <= 2


def test_seeds_give_different_splits() -> None:
    classes = [f"class{i}" for i in range(100)]
    tests = [{n for n, part in random_split(classes, seed=s).items() if part == "meta_test"} for s in range(5)]
    assert len(set(map(frozenset, tests))) == 5
    assert len(set.union(*tests)) > 60, "different seeds take much the same test classes"


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=3, max_size=12), seed=seeds)
def test_groups_stay_whole_and_each_part_gets_one(sizes: list[int], seed: int) -> None:
    groups = {f"g{g}/c{i}": f"g{g}" for g, size in enumerate(sizes) for i in range(size)}
    split = group_split(groups, seed=seed)
    assert split.keys() == groups.keys()
    part_of = {groups[name]: part for name, part in split.items()}
    assert all(split[name] == part_of[group] for name, group in groups.items())
    assert set(part_of.values()) == {"meta_train", "meta_val", "meta_test"}


def test_group_split_gives_about_the_shares() -> None:
    groups = {f"g{g}/c{i}": f"g{g}" for g in range(50) for i in range(20)}
    counts = Counter(group_split(groups, seed=3).values())
    assert counts == {"meta_train": 700, "meta_val": 100, "meta_test": 200}


# --- pictures

DRAWING = Preprocessing(kind="drawing", size=28)
PHOTO = Preprocessing(kind="photo", size=16, channels=3)


def drawn(width: int = 105, height: int = 105, *, ink: int = 0, paper: int = 255) -> Image.Image:
    """An L in the upper left part: no symmetry, so a turned or mirrored picture is another."""
    picture = Image.new("L", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    pen.line([(width * 0.2, height * 0.1), (width * 0.2, height * 0.6)], fill=ink, width=max(1, width // 20))
    pen.line([(width * 0.2, height * 0.6), (width * 0.5, height * 0.6)], fill=ink, width=max(1, width // 20))
    return picture


def reopened(picture: Image.Image, format: str = "PNG", **options: Any) -> Image.Image:
    """Through a file's bytes and `open_picture`."""
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    stream.seek(0)
    return open_picture(stream)  # type: ignore[arg-type]


def differs(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_ink_is_high_and_paper_zero() -> None:
    array = DRAWING(drawn())
    assert array.shape == (28, 28, 1)
    assert array.dtype == np.uint8
    assert array.max() == 255
    assert (array[[0, -1]] == 0).all()
    assert 0.02 < (array > 127).mean() < 0.2
    rows, columns = np.nonzero(array[..., 0] > 127)
    assert (rows.mean(), columns.mean()) < (14, 14), "upside down or mirrored"


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (60, 200), (120, 250)])
def test_polarity_does_not_matter(ink: int, paper: int) -> None:
    dark_on_light, light_on_dark = drawn(ink=ink, paper=paper), drawn(ink=255 - ink, paper=255 - paper)
    array = DRAWING(dark_on_light)
    assert (array == DRAWING(light_on_dark)).all()
    assert (array > 200)[DRAWING(drawn()) == 255].all(), "ink is not high"
    assert array.max() == 255, "contrast is not stretched"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_modes_give_the_same_drawing(mode: str) -> None:
    picture = drawn().convert(mode)
    if mode == "CMYK":
        assert differs(DRAWING(reopened(picture, "TIFF")), DRAWING(drawn())) < 2
    else:
        assert (DRAWING(reopened(picture)) == DRAWING(drawn())).all()


def test_sixteen_bit_grey() -> None:
    """Scanners and microscopes write it."""
    deep = Image.fromarray(np.asarray(drawn(ink=20, paper=230)).astype(np.uint16) * 257)
    assert (DRAWING(reopened(deep)) == DRAWING(drawn(ink=20, paper=230))).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P with a transparent colour"])
def test_transparent_paper_is_paper(kind: str) -> None:
    alpha = Image.fromarray(255 - np.asarray(drawn()))
    if kind.startswith("P"):
        picture = drawn().convert("P")
        transparent = reopened(picture, transparency=picture.getpixel((0, 0)))
    else:
        black = Image.new("RGB" if kind == "RGBA" else "L", alpha.size, 0)
        black.putalpha(alpha)
        transparent = reopened(black)
        assert transparent.mode == kind
    assert (DRAWING(transparent) == DRAWING(drawn())).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_file_formats(format: str) -> None:
    assert differs(DRAWING(reopened(drawn(), format)), DRAWING(drawn())) < (2 if format in ("JPEG", "WEBP") else 0.01)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 7), (28, 28), (29, 31), (1, 200), (300, 40), (1600, 1200)])
@pytest.mark.parametrize("preprocessing", [DRAWING, PHOTO], ids=["drawing", "photo"])
def test_any_size_and_shape(preprocessing: Preprocessing, width: int, height: int) -> None:
    size = preprocessing.size
    array = preprocessing(drawn(width, height).convert("RGB"))
    assert array.shape == (size, size, preprocessing.channels)
    assert array.dtype == np.uint8


def test_small_and_big_copies_are_much_alike() -> None:
    expected = DRAWING(drawn(112, 112))
    for side in (56, 224, 448):
        resized = drawn(112, 112).resize((side, side), Image.Resampling.NEAREST)
        assert differs(DRAWING(resized), expected) < 5


def test_whole_canvas_of_a_wide_drawing_is_kept_and_centred() -> None:
    wide = Image.new("L", (200, 100), 255)
    ImageDraw.Draw(wide).rectangle([0, 20, 199, 79], fill=0)
    ImageDraw.Draw(wide).rectangle([4, 0, 195, 99], outline=255)  # the border stays paper
    ink = DRAWING(wide)[..., 0] > 127
    rows, columns = np.nonzero(ink)
    assert (rows.min(), rows.max()) == (10, 17)
    assert (columns.min(), columns.max()) == (0, 27)


def test_area_average_and_central_square_of_a_photo() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    expected = pixels[:, 16:80].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(PHOTO(Image.fromarray(pixels)) - expected).max() <= 1
    grey = Preprocessing(kind="photo", size=16)(Image.fromarray(pixels))
    assert grey.shape == (16, 16, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    """Phones store the sensor's picture and write beside it how it was held."""
    upright = drawn(120, 80)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turn).convert("RGB")
    array = DRAWING(reopened(stored, format, exif=exif))
    assert differs(array, DRAWING(upright)) < 3
    assert differs(DRAWING(stored), DRAWING(upright)) > 10


def test_drawings_have_one_channel_or_are_refused() -> None:
    """The manifest's preprocessing and the images' shape must agree."""
    try:
        preprocessing = Preprocessing(kind="drawing", size=28, channels=3)
    except ValueError:
        return
    assert preprocessing(drawn()).shape == (28, 28, 3)


def test_a_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.png: no such picture"):
        open_picture(tmp_path / "nothing.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png: cannot be decoded"):
        open_picture(tmp_path / "folder.png")


@pytest.mark.parametrize("content", [b"", b"these are words, not a picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_picture_under_a_pictures_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_bytes(content)
    with pytest.raises(DataError, match=r"words\.png: (not a picture|cannot be decoded)"):
        open_picture(tmp_path / "words.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_picture(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{format.lower()}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"{path.name}: "):
        open_picture(path)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (8001, 8000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge\.png: 8001×8000 pixels are more than the 64 million"):
        open_picture(tmp_path / "huge.png")


ENCODED: dict[str, bytes] = {}
for _format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
    _stream = io.BytesIO()
    drawn(30, 20).save(_stream, _format)
    ENCODED[_format] = _stream.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd metadata
@pytest.mark.parametrize("format", ENCODED)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_picture_or_a_data_error(
    format: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(ENCODED[format])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert DRAWING(open_picture(path)).shape == (28, 28, 1)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017


# --- Omniglot


def omniglot_tree(root: Path, *, background: int = 7, evaluation: int = 2, drawers: int = 3) -> Path:
    """The official layout with alphabets of two characters each: 105×105, 1 bit, ink black."""
    number = 0
    for part, alphabets in ((BACKGROUND, background), (EVALUATION, evaluation)):
        for a in range(alphabets):
            for c in (1, 2):
                number += 1
                folder = root / part / f"{part[7:11].title()}_{a}" / f"character{c:02d}"
                folder.mkdir(parents=True)
                for drawer in range(1, drawers + 1):
                    random = np.random.default_rng([number, drawer])
                    picture = Image.new("1", (105, 105), 1)
                    points = [tuple(p) for p in random.integers(10, 95, (4, 2)).tolist()]
                    ImageDraw.Draw(picture).line(points, fill=0, width=3)
                    picture.save(folder / f"{number:04d}_{drawer:02d}.png")
    return root


def zipped(tree: Path, out: Path) -> Path:
    """The archives as downloaded: one per part, with entries for folders too, in no special order."""
    out.mkdir()
    for part in (BACKGROUND, EVALUATION):
        with zipfile.ZipFile(out / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((tree / part).rglob("*"), reverse=True):
                archive.write(path, path.relative_to(tree))
    return out


def everything(source: Source) -> list[np.ndarray]:
    """The examples of each class. Raises DataError: something could not be read."""
    examples = []
    for raw in source.classes():
        read, problems = source.read(list(raw.items))
        for problem in problems:
            raise DataError(f"{problem.item}: {problem.reason}")
        examples.append(read)
    return examples


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return omniglot_tree(tmp_path_factory.mktemp("omniglot") / "extracted")


@pytest.fixture(scope="module")
def archives(tree: Path) -> Path:
    return zipped(tree, tree.parent / "archives")


def test_archives_and_folders_give_the_same_data_set(tree: Path, archives: Path, tmp_path: Path) -> None:
    from_folder, _ = prepare(Omniglot(tree), tmp_path / "a", record={"name": "omniglot"})
    from_archive, found = prepare(Omniglot(archives), tmp_path / "b", record={"name": "omniglot"})
    again, _ = prepare(Omniglot(archives), tmp_path / "b", record={"name": "omniglot"}, overwrite=True)
    other_seed, _ = prepare(Omniglot(archives), tmp_path / "c", record={"name": "omniglot"}, seed=1)
    assert from_folder.digest == from_archive.digest == again.digest != other_seed.digest
    assert (tmp_path / "a" / shards.MANIFEST).read_text() == (tmp_path / "b" / shards.MANIFEST).read_text()
    manifest = shards.verify(tmp_path / "b")
    assert manifest.shape == (28, 28, 1)
    assert [entry.count for entry in manifest.classes] == [3] * 18
    assert {entry.group for entry in manifest.classes} == {entry.name.split("/")[0] for entry in manifest.classes}
    assert Preprocessing.model_validate(manifest.preprocessing) == DRAWING
    assert manifest.source["split_seed"] == 0
    assert set(manifest.source["near_duplicates"]) == set(found) == {"alphabet", "random"}
    first = manifest.classes[0]
    drawings = sorted((tree / BACKGROUND / first.name).iterdir())
    with shards.ShardReader(tmp_path / "b", manifest) as reader:
        assert (reader.read_class(0) == np.stack([DRAWING(open_picture(path)) for path in drawings])).all()


def test_omniglots_own_split_keeps_alphabets_whole(archives: Path) -> None:
    splits = Omniglot(archives).splits(seed=0)
    by_part: dict[str, set[str]] = {}
    for name, part in splits["alphabet"].items():
        by_part.setdefault(part, set()).add(name.split("/")[0])
    assert {part: len(alphabets) for part, alphabets in by_part.items()} == {
        "meta_train": 2,
        "meta_val": 5,
        "meta_test": 2,
    }
    assert all(alphabet.startswith("Eval") for alphabet in by_part["meta_test"])
    assert len(set.union(*by_part.values())) == 9
    assert splits["random"].keys() == splits["alphabet"].keys()


def test_a_look_alike_in_another_part_is_reported(tree: Path, tmp_path: Path) -> None:
    """The evaluation set's first character is copied over a background character that is trained on."""
    planted = shutil.copytree(tree, tmp_path / "planted")
    splits = Omniglot(planted).splits(seed=0)["alphabet"]
    trained = next(name for name, part in splits.items() if part == "meta_train")
    target = planted / BACKGROUND / trained
    shutil.rmtree(target)
    shutil.copytree(planted / EVALUATION / "Eval_0" / "character01", target)
    manifest, found = prepare(Omniglot(planted), tmp_path / "out", record={})
    pairs = [{pair.class_a, pair.class_b} for pair in found["alphabet"]]
    assert {trained, "Eval_0/character01"} in pairs
    recorded = manifest.source["near_duplicates"]["alphabet"]
    assert recorded["pairs"] == len(pairs)
    assert any({trained, "Eval_0/character01"} <= set(map(str, pair)) for pair in recorded["closest"])


@pytest.mark.parametrize("part", [BACKGROUND, EVALUATION])
def test_missing_archive(part: str, archives: Path, tmp_path: Path) -> None:
    source = shutil.copytree(archives, tmp_path / "source")
    (source / f"{part}.zip").unlink()
    with pytest.raises(DataError, match=rf"holds neither {part}\.zip nor a folder {part}"):
        Omniglot(source)
    with pytest.raises(DataError, match="nowhere: holds neither"):
        Omniglot(tmp_path / "nowhere")


def test_archives_that_are_none(archives: Path, tmp_path: Path) -> None:
    source = shutil.copytree(archives, tmp_path / "source")
    file = source / f"{EVALUATION}.zip"
    whole = file.read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"{EVALUATION}\.zip: not a readable zip archive"):
            Omniglot(source)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(DataError, match=rf"{EVALUATION}\.zip: holds no drawings"):
        Omniglot(source)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_inside_an_archive_names_it(data: st.DataObject, archives: Path) -> None:
    """One bit of one compressed drawing is flipped: it is refused, unless the bit was padding."""
    whole = everything(Omniglot(archives))
    file = archives / f"{BACKGROUND}.zip"
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        member = data.draw(st.sampled_from([info for info in archive.infolist() if not info.is_dir()]))
    start = member.header_offset + 30 + len(member.filename.encode())
    broken = bytearray(content)
    broken[start + data.draw(st.integers(0, member.compress_size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(broken)
    try:
        images = everything(Omniglot(archives))
        assert all((a == b).all() for a, b in zip(images, whole, strict=True))
    except DataError as error:
        assert f"{file}: {member.filename} cannot be read" in str(error)  # noqa: PT017
    finally:
        file.write_bytes(content)


@pytest.mark.data
def test_real_omniglot(omniglot_zips: Path, tmp_path: Path) -> None:
    manifest, _ = prepare(Omniglot(omniglot_zips), tmp_path / "omniglot", record={"name": "omniglot"})
    shards.verify(tmp_path / "omniglot")
    assert len(manifest.classes) == 964 + 659
    assert {entry.count for entry in manifest.classes} == {20}
    assert len({entry.group for entry in manifest.classes}) == 50
    parts = {name: Counter(entry.splits[name] for entry in manifest.classes) for name in ("random", "alphabet")}
    assert parts["random"] == {"meta_train": 1100, "meta_val": 100, "meta_test": 423}
    assert parts["alphabet"]["meta_test"] == 659
    validation = {entry.group for entry in manifest.classes if entry.splits["alphabet"] == "meta_val"}
    assert len(validation) == 5
    with shards.ShardReader(tmp_path / "omniglot", manifest) as reader:
        images = np.concatenate(list(reader))
    assert (images.max(axis=(1, 2, 3)) == 255).all()
    assert 0.03 < (images > 127).mean() < 0.12, "ink is a small share of a drawing"


# --- folders of pictures


def picture_folders(root: Path, names: list[str], count: int = 3) -> Path:
    for i, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True)
        for j in range(count):
            drawn(40 + 3 * i, 40 + 5 * j).save(folder / f"{j}.{['png', 'jpg', 'JPEG'][j % 3]}")
        (folder / "notes.txt").write_text("not a picture")
        (folder / ".hidden.png").write_text("not one either")
    return root


def test_one_level_of_folders(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(10)]
    source = ImageFolder(picture_folders(tmp_path / "mine", names), preprocessing=DRAWING)
    manifest, _ = prepare(source, tmp_path / "out", record={"name": "images"})
    assert [(c.name, c.group, c.count) for c in manifest.classes] == [(name, "all", 3) for name in names]
    assert manifest.splits == ["random"]
    assert Counter(c.splits["random"] for c in manifest.classes) == {"meta_train": 7, "meta_val": 1, "meta_test": 2}
    shards.verify(tmp_path / "out")


def test_two_levels_of_folders(tmp_path: Path) -> None:
    names = [f"script{g}/letter{i}" for g in range(5) for i in range(3)]
    source = ImageFolder(picture_folders(tmp_path / "mine", names), preprocessing=PHOTO)
    manifest, _ = prepare(source, tmp_path / "out", record={"name": "images"})
    assert [(c.name, c.group) for c in manifest.classes] == [(name, name.split("/")[0]) for name in names]
    assert manifest.shape == (16, 16, 3)
    assert set(manifest.splits) == {"random", "group"}
    parts: dict[str, set[str]] = {}
    for entry in manifest.classes:
        parts.setdefault(entry.group, set()).add(entry.splits["group"])
    assert all(len(part) == 1 for part in parts.values())
    assert {part for (part,) in parts.values()} == {"meta_train", "meta_val", "meta_test"}


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        ImageFolder(tmp_path / "nowhere", preprocessing=DRAWING)
    drawn().save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="no folder in it holds pictures"):
        ImageFolder(tmp_path, preprocessing=DRAWING)


def test_a_broken_picture_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = picture_folders(tmp_path / "mine", [f"class{i}" for i in range(4)])
    (folder / "class2" / "1.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"class2/1\.jpg: not a picture.*--strict"):
        prepare(ImageFolder(folder, preprocessing=DRAWING), tmp_path / "out", record={}, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


# --- preparation


def test_an_occupied_place_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    class Untouched:
        preprocessing = DRAWING

        def classes(self) -> Any:
            raise AssertionError("read before the place was checked")

        splits = classes

    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="already exists"):
        prepare(Untouched(), tmp_path / "out", record={})  # type: ignore[arg-type]


def test_progress_is_told_of_every_class(tmp_path: Path) -> None:
    source = ImageFolder(picture_folders(tmp_path / "mine", ["b", "a"]), preprocessing=DRAWING)
    seen: list[Progress] = []
    prepare(source, tmp_path / "out", record={"options": [1]}, progress=seen.append)
    assert seen == [Progress("a", 1, 3, 0), Progress("b", 2, 6, 0)]
    assert shards.read_manifest(tmp_path / "out").source["options"] == [1]


def test_grey_paper_and_white_ink_on_nothing_are_paper_and_ink() -> None:
    preprocess = Preprocessing(kind="drawing", size=28)
    ink = np.zeros((56, 56), dtype=np.uint8)
    ink[20:36, 10:46] = 255
    expected = preprocess(Image.fromarray(ink))
    on_grey = np.where(ink > 0, 40, 200).astype(np.uint8)
    np.testing.assert_array_equal(preprocess(Image.fromarray(on_grey)), expected)
    white = Image.fromarray(np.dstack([np.full_like(ink, 255)] * 3 + [ink]))
    np.testing.assert_array_equal(preprocess(white), expected)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        shards.write(tmp_path / "file" / "out", [], splits={}, source={}, preprocessing={})


@pytest.mark.parametrize("name", ["b", "group/b"])
@pytest.mark.parametrize("file", ["photo.heic", ".hidden.png", None])
def test_a_class_folder_without_pictures_is_named(name: str, file: str | None, tmp_path: Path) -> None:
    picture_folders(tmp_path, ["a", "group/a"])
    (tmp_path / ".hidden").mkdir()
    assert list(class_folders(tmp_path)) == ["a", "group/a"]
    (tmp_path / name).mkdir()
    if file is not None:
        (tmp_path / name / file).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: class {name} holds no picture \(\.png"):
        class_folders(tmp_path)


# --- the command


@pytest.mark.parametrize(
    ("name", "given", "options", "differing"),
    [
        ("glyphs", {}, {}, "name images and not glyphs"),
        ("images", {"size": 32}, {}, "size 28 and not 32"),
        ("images", {"size": 32}, {"seed": 1}, "size 28 and not 32, seed 0 and not 1"),
        ("images", {"kind": "photo"}, {}, "kind drawing and not photo"),
    ],
)
def test_only_the_same_data_set_is_reused(
    name: str,
    given: dict[str, Any],
    options: dict[str, Any],
    differing: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    pictures = picture_folders(tmp_path / "mine", ["a", "b", "c"])
    data_prepare.prepare("images", {"directory": pictures}, out=out)
    data_prepare.prepare("images", {}, out=out, reuse=True)
    assert "already there, verified" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=rf"out: was prepared with .*{differing}\. Use --overwrite, or another --out"):
        data_prepare.prepare(name, given, out=out, reuse=True, **options)
    (tmp_path / "out" / "shards" / "00000.parquet").unlink()
    with pytest.raises(DataError, match="is missing"):
        data_prepare.prepare("images", {}, out=out, reuse=True)


def test_names_that_look_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`[/b]` alone would be an error of rich; `[red]x` would lose its brackets."""
    names = ["[/b]", "[red]x", "[bold]y", *(f"[/i]{i}" for i in range(27))]  # the first is a class in a group
    out = tmp_path / "[red]out" / "[/b]"
    source = picture_folders(tmp_path / "mine", names, count=5)
    data_prepare.prepare("images", {"directory": source}, out=str(out), workers=1)
    data.verify(out)
    data.show(out, n_way=2, episodes=1, out=(picture := tmp_path / "[/i].png"))
    printed = "".join(capsys.readouterr().out.split())  # lines are broken at the console's width
    assert printed.count(f"{out}:") == 3
    assert f"episodes:{picture}" in printed
    assert picture.is_file()
