"""Folders of pictures as people have them: broken, empty, oddly named, in circles. Nothing crashes; all is counted."""

import io
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipeline.datasets.image_folder import ImageFolder, class_folders, encoded_picture
from pipeline.datasets.labels import check_names
from pipeline.datasets.prepare import Progress, prepare
from pipeline.datasets.preprocessing import Preprocessing, _ink_high, open_picture
from pipeline.datasets.source import Original
from pipeline.errors import DataError
from pipeline.tasks import shards

DRAWING = Preprocessing(kind="drawing", size=16)
PHOTO = Preprocessing(kind="photo", size=16, channels=3)


def picture(seed: int, width: int = 20, height: int = 24, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folders(root: Path, *names: str, count: int = 3) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(10 * number + i).save(root / name / f"{i}.png")
    return root


def prepared(source: Path, out: Path, **options: Any) -> shards.Manifest:
    encoded = options.pop("encoded", False)
    folder = ImageFolder(source, preprocessing=PHOTO, encoded=encoded)
    manifest, _ = prepare(folder, out, record={"name": "images"}, workers=1, **options)
    return shards.verify(out, manifest)


def reasons(manifest: shards.Manifest) -> dict[str, str]:
    return {Path(item).name: reason for item, reason in manifest.source["problems"]["first"]}


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has width × height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Two whole classes, and everything else that can be wrong."""
    root = folders(tmp_path / "mine", "a", "b")
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "words.jpg").write_text("these are words")
    picture(5).save(stream := io.BytesIO(), "JPEG")
    (root / "a" / "cut.jpg").write_bytes(stream.getvalue()[:300])
    (root / "a" / "bomb.png").write_bytes(bomb(50_000, 50_000))
    picture(6, 1, 1).save(root / "a" / "pixel.png")
    (root / "a" / "phone.heic").write_bytes(b"ftypheic")
    (root / "a" / "notes.txt").write_text("no picture, and none by its name")
    (root / "a" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(root / "b" / "pipe.png")
    (root / "nothing").mkdir()
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "a\nb").mkdir()
    return root


def test_everything_bad_is_counted_and_left_out(bad: Path, tmp_path: Path) -> None:
    manifest = prepared(bad, tmp_path / "out")
    assert [(entry.name, entry.count) for entry in manifest.classes] == [("a", 3), ("b", 3)]
    found = reasons(manifest)
    for name, says in {
        "empty.png": "empty file",
        "words.jpg": "not a picture",
        "cut.jpg": "decoded",
        "bomb.png": "million that are read",
        "pixel.png": "single pixel",
        "phone.heic": "convert it",
        "nowhere.png": "cannot be read",
        "pipe.png": "not a file",
        "nothing": "holds no picture",
        "loop": "back to a folder around it",
        "self": "leads nowhere",
    }.items():
        assert says in found[name], name
    assert any("control characters" in reason for reason in found.values())
    assert "notes.txt" not in found
    assert manifest.source["problems"]["count"] == len(found) == 12
    assert [each["class"] for each in manifest.source["left_out"]["first"]] == ["nothing"]


def test_pictures_beside_class_folders_and_under_other_names_are_told_of(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", *(f"g{i}/k{j}" for i in range(4) for j in range(2)))
    whole = prepared(root, tmp_path / "whole")
    for name in ("g1/cover.jpg", "g2/one.png", "g2/two.png", "top.png", "g3/k0/a.jfif", "g3/k0/photo", "g3/k1/b.jpg_"):
        picture(5).save(root / name, "PNG" if name.endswith(".png") else "JPEG")
    (root / "g3" / "k0" / "notes").write_text("no picture")
    (root / "g3" / "k0" / ".hidden").write_bytes((root / "top.png").read_bytes())
    manifest = prepared(root, tmp_path / "out")
    assert manifest.digest == whole.digest
    assert len({entry.group for entry in manifest.classes}) == 4
    found = reasons(manifest)
    assert found["g1"].startswith("cover.jpg is beside folders of classes and in none of them")
    assert found["g2"].startswith("2 pictures (one.png, …) are beside folders of classes")
    assert found["mine"].startswith("top.png is beside")
    for name in ("a.jfif", "photo", "b.jpg_"):
        assert "a picture by its content" in found[name]
    assert manifest.source["problems"]["count"] == len(found) == 6
    with pytest.raises(DataError, match=r"cover\.jpg is beside folders of classes"):
        prepared(root, tmp_path / "strict", strict=True)


def test_a_picture_in_every_group_leaves_the_groups(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", *(f"g{i}/k{j}" for i in range(3) for j in range(2)))
    whole = prepared(root, tmp_path / "whole")
    for i in range(3):
        picture(i).save(root / f"g{i}" / "cover.png")
    manifest = prepared(root, tmp_path / "out")
    assert manifest.digest == whole.digest
    assert set(reasons(manifest)) == {"g0", "g1", "g2"}


def test_a_class_with_a_few_pictures_put_aside_stays_a_class(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b")
    before = prepared(root, tmp_path / "before")
    (root / "a" / "rejected").mkdir()
    picture(9).save(root / "a" / "rejected" / "blurred.png")
    manifest = prepared(root, tmp_path / "out")
    assert manifest.digest == before.digest
    assert reasons(manifest) == {"rejected": "a folder below a class is not read"}
    for number in range(50):  # more than it has itself: the other folders tell that it is a class
        picture(number).save(root / "a" / "rejected" / f"{number}.png")
    assert prepared(root, tmp_path / "again").digest == before.digest
    assert list(class_folders(root)) == ["a", "b"]


def test_raw_pictures_on_the_card_are_those_that_are_not_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b")
    picture(6, 1, 1).save(root / "a" / "pixel.png")
    (root / "a" / "bomb.png").write_bytes(bomb(10_000, 7000))
    (root / "a" / "long.png").write_bytes(bomb(20_000, 2))
    Image.new("F", (30, 30)).save(root / "b" / "deep.tiff")
    manifest = prepared(root, tmp_path / "out")
    assert manifest.source["problems"]["count"] == 4
    originals = ImageFolder(root, preprocessing=PHOTO).originals()
    assert originals == {Original(20, 24, "RGB", "PNG"): 6}


def test_strict_refuses_and_writes_nothing(bad: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"loop: a link that leads nowhere.*and \d+ more.*--strict"):
        prepared(bad, tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    clean = folders(tmp_path / "clean", "a", "b")
    assert "problems" not in prepared(clean, tmp_path / "out", strict=True).source


def test_an_interrupted_preparation_counts_the_same(bad: Path, tmp_path: Path) -> None:
    def stop(done: Progress) -> None:
        if done.name == "b":
            raise KeyboardInterrupt

    folders(bad, *(f"more{i:02d}" for i in range(30)))  # more than one chunk
    whole = prepared(bad, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepared(bad, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    again = prepared(bad, tmp_path / "out")
    assert again.source == whole.source
    assert again.digest == whole.digest
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "whole", "out"}


def test_too_few_examples(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b", "c")
    (root / "b" / "0.png").unlink()
    (root / "b" / "1.png").write_bytes(b"")
    manifest = prepared(root, tmp_path / "out", min_examples=2)
    assert [entry.name for entry in manifest.classes] == ["a", "c"]
    assert manifest.source["left_out"]["first"] == [{"class": "b", "examples": 1, "problems": 1}]


def test_a_folder_of_nothing_but_bad_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no folder in it holds pictures"):
        prepared(tmp_path / "mine", tmp_path / "out")
    (tmp_path / "mine" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.png|no class"):
        prepared(tmp_path / "mine", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_support_folders_are_held_to_the_letter(bad: Path) -> None:
    """A class that is left out silently would give answers without it."""
    with pytest.raises(DataError, match="nothing: class nothing holds no picture"):
        class_folders(bad)
    shutil.rmtree(bad / "nothing")
    with pytest.raises(DataError, match="loop: a link"):
        class_folders(bad)


def test_support_folders_that_differ_by_case_are_two_classes(tmp_path: Path) -> None:
    assert list(class_folders(folders(tmp_path, "A", "a"))) == ["A", "a"]


def test_mixed_modes_sizes_and_formats_become_one_shape(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for kind in ("a", "b"):
        (root / kind).mkdir(parents=True)
    for number, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F", "CMYK")):
        deep = (
            Image.fromarray(np.full((9, 7), 30_000, np.uint16))
            if mode == "I;16"
            else picture(number, 30 + number, 20, "RGB")
        )
        made = deep if mode == "I;16" else deep.convert("L").convert(mode) if mode in ("F",) else deep.convert(mode)
        made.save(root / ("a" if number % 2 else "b") / f"{number}.{'tiff' if mode in ('F', 'CMYK') else 'png'}")
    picture(50).save(root / "a" / "x.webp")
    picture(51).save(root / "b" / "x.gif")
    picture(52).save(root / "b" / "x.JPEG")
    manifest = prepared(root, tmp_path / "out")
    assert manifest.num_examples == 11
    assert reasons(manifest)["7.tiff"].startswith("grey of 32 bits")
    assert "Convert it to 8 or 16 bit" in reasons(manifest)["7.tiff"]
    assert manifest.shape == (16, 16, 3)
    modes = ImageFolder(root, preprocessing=PHOTO).originals()
    assert sum(modes.values()) == 11
    assert modes[Original(20, 24, "RGB", "JPEG")] == 1


def test_encoded_pictures_stay_as_they_are_or_become_png(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b")
    picture(9).save(root / "a" / "x.jpg", quality=60)
    picture(10, mode="CMYK").save(root / "b" / "x.tiff")
    (root / "b" / "y.jpg").write_bytes(b"no picture")
    manifest = prepared(root, tmp_path / "out", encoded=True)
    assert (manifest.modality, manifest.shape) == ("encoded_image", (16, 16, 3))
    assert manifest.source["problems"]["count"] == 1
    with shards.ShardReader(tmp_path / "out", manifest) as reader:
        a, b = reader.read_class(0), reader.read_class(1)
    assert (root / "a" / "x.jpg").read_bytes() in a
    with Image.open(io.BytesIO(b[3])) as again:  # type: ignore[arg-type]
        assert again.format == "PNG"
        assert (PHOTO(again) == PHOTO(open_picture(root / "b" / "x.tiff"))).all()


def with_exif(exif: Image.Exif, **settings: Any) -> bytes:
    picture(1, 20, 24).save(stream := io.BytesIO(), exif=exif, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("encoded", [False, True])
def test_a_rotated_photo_with_odd_exif_is_turned(encoded: bool, tmp_path: Path) -> None:
    """Pillow cannot write this EXIF anew: an entry says it is a number and holds text."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "Camera"
    content = bytearray(with_exif(exif, format="JPEG"))
    entry = content.index(struct.pack(">HH", ExifTags.Base.Make, 2))
    content[entry : entry + 4] = struct.pack(">HH", ExifTags.Base.XResolution, 2)
    root = folders(tmp_path / "mine", "a", "b")
    (root / "a" / "x.jpg").write_bytes(content)
    with pytest.raises((struct.error, TypeError, AttributeError, ValueError)):
        ImageOps.exif_transpose(open_picture(root / "a" / "x.jpg"))
    manifest = prepared(root, tmp_path / "out", encoded=encoded)
    assert manifest.num_examples == 7
    turned = open_picture(root / "a" / "x.jpg").transpose(Image.Transpose.ROTATE_270)
    turned.info.clear()
    assert (PHOTO(open_picture(root / "a" / "x.jpg")) == PHOTO(turned)).all()


def test_what_cannot_be_preprocessed_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path, "a", count=1)

    def fails(*_: Any, **__: Any) -> None:
        raise struct.error("odd")

    monkeypatch.setattr(Image.Image, "resize", fails)
    with pytest.raises(DataError, match=r"0\.png: cannot be preprocessed \(odd\)"):
        PHOTO(open_picture(root / "a" / "0.png"))
    with pytest.raises(DataError, match=r"0\.png: cannot be preprocessed \(odd\)"):
        encoded_picture(root / "a" / "0.png", PHOTO)


@pytest.mark.parametrize("mode", ["F", "I"])
@pytest.mark.parametrize("encoded", [False, True])
def test_grey_of_an_unknown_scale_is_refused(mode: str, encoded: bool, tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b")
    picture(1, mode="L").convert(mode).save(root / "a" / "x.tiff")
    assert "8 or 16 bit grey" in reasons(prepared(root, tmp_path / "out", encoded=encoded))["x.tiff"]


def test_a_phone_photo_of_several_frames_stays_a_turned_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = tmp_path / "x.jpg"
    file.write_bytes(with_exif(exif, format="MPO", save_all=True, quality=95, append_images=[picture(2)]))
    content = encoded_picture(file, PHOTO)
    assert content == file.read_bytes()
    with Image.open(io.BytesIO(content)) as again:
        assert again.format == "MPO"
    grey = Preprocessing(kind="photo", size=16)
    turned = picture(1, 20, 24).transpose(Image.Transpose.ROTATE_270)
    assert abs(grey(open_picture(file)).astype(int) - grey(turned)).mean() < 5


def test_a_rotated_tiff_becomes_an_upright_png(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = tmp_path / "x.tiff"
    file.write_bytes(with_exif(exif, format="TIFF"))
    with Image.open(io.BytesIO(encoded_picture(file, PHOTO))) as again:
        assert again.size == (24, 20)
        assert (PHOTO(again) == PHOTO(open_picture(file))).all()


@settings(max_examples=60, deadline=None)
@given(paper=st.integers(0, 255), other=st.integers(0, 255), seed=st.integers(0, 99))
def test_ink_is_that_of_exact_arithmetic(paper: int, other: int, seed: int) -> None:
    grey = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    grey[0] = grey[:, 0] = paper
    grey[-1] = grey[:, -1] = other
    level = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    ink = (level - grey if level > 127 else grey - level).clip(0, 255).astype(np.uint8)
    found = _ink_high(grey)
    assert found.dtype == np.uint8
    assert (found == ink).all()


# --- names


def test_names_that_look_the_same(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = folders(tmp_path / "mine", "Cat", "cat", composed, decomposed)
    manifest = prepared(root, tmp_path / "out")
    names = [entry.name for entry in manifest.classes]
    assert {"Cat", "cat"} <= set(names)
    assert len(names) == 3
    found = [reason for _, reason in manifest.source["problems"]["first"]]
    assert any("another Unicode form" in reason and "left out" in reason for reason in found)
    assert any("case or form alone; both are kept" in reason for reason in found)


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", "a", "b")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    shutil.copy(root / "a" / "0.png", os.fsdecode(os.fsencode(root) + b"/caf\xe9/0.png"))
    shutil.copy(root / "a" / "0.png", os.fsdecode(os.fsencode(root) + b"/a/caf\xe9.png"))
    Path(os.fsdecode(os.fsencode(root) + b"/b/bad\xff.png")).write_bytes(b"no picture")
    manifest = prepared(root, tmp_path / "out")
    assert [(entry.name, entry.count) for entry in manifest.classes] == [("a", 4), ("b", 3)]
    text = str(manifest.source["problems"]["first"])
    assert "not UTF-8" in text
    assert "bad�.png" in text


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(max_size=6), max_size=12))
def test_names_are_kept_once_and_each_other_is_told_of(names: list[str]) -> None:
    kept, problems = check_names(names)
    normal = [unicodedata.normalize("NFC", name) for name in kept]
    assert len(set(normal)) == len(normal)
    assert all(name.strip() for name in kept)
    told = [problem for problem in problems if "left out" in problem.reason]
    assert len(kept) + len(told) == len(names)
    for problem in problems:
        problem.item.encode()
        problem.reason.encode()


# --- any damage

FILES: dict[str, bytes] = {}
for _format in ("PNG", "JPEG", "WEBP"):
    picture(1).save(_stream := io.BytesIO(), _format)
    FILES[_format] = _stream.getvalue()
_exif = Image.Exif()
_exif[ExifTags.Base.Orientation] = 6
_exif[ExifTags.Base.Make] = "Camera"
_exif[ExifTags.Base.XResolution] = 72.0
_exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
picture(1).save(_stream := io.BytesIO(), "JPEG", exif=_exif)
FILES["rotated"] = _stream.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd metadata
@settings(max_examples=25, deadline=None)
@given(data=st.data(), format=st.sampled_from(sorted(FILES)), encoded=st.booleans())
def test_any_damage_to_any_picture_leaves_a_whole_data_set(
    data: st.DataObject, format: str, encoded: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(FILES[format])
    for _ in range(data.draw(st.integers(1, 4))):
        # the EXIF of a JPEG is in its first bytes
        last = data.draw(st.sampled_from([250, len(content)]))
        content[data.draw(st.integers(0, min(last, len(content)) - 1))] = data.draw(st.integers(0, 255))
    root = tmp_path_factory.mktemp("damaged")
    folders(root / "mine", "a", "b", count=1)
    file = root / "mine" / "a" / "x.png"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    manifest = prepared(root / "mine", root / "out", encoded=encoded)
    problems = manifest.source.get("problems", {"count": 0})["count"]
    assert manifest.num_examples + problems == 3
    try:
        encoded_picture(file, PHOTO)
    except DataError:
        assert problems == 1
    else:
        assert problems == 0
    shutil.rmtree(root)
