"""The data card: statistics, copies of examples across parts, and a page that user's texts cannot break."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import duplicates, near_duplicates
from pipeline.datasets.card import CARD, PICTURE, STATISTICS, write_card
from pipeline.datasets.duplicates import Digests, Likeness, Pair, normalized, thumbnails
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.source import Column, Original
from pipeline.datasets.survey import Moments, survey
from pipeline.tasks import shards
from pipeline.types import SPLITS

RANDOM = np.random.default_rng(0)
GREY = Preprocessing(kind="photo", size=20).model_dump(mode="json")


def written(
    out: Path, classes: Mapping[str, Any], parts: Sequence[int], *, modality: str = "image", **options: Any
) -> shards.Manifest:
    """A data set with one class split, the classes in these parts."""
    from pipeline.tasks.shards.writer import ClassExamples

    split = {name: SPLITS[part] for name, part in zip(classes, parts, strict=True)}
    raw = [ClassExamples(name, "all", examples) for name, examples in classes.items()]
    options.setdefault("preprocessing", GREY if "image" in modality else {})
    return shards.write(out, raw, splits={"random": split}, source={"name": "test"}, modality=modality, **options)


def images(count: int, side: int = 20, channels: int = 1) -> np.ndarray:
    """Smooth pictures, as photos are: noise has no thumbnail to speak of."""
    coarse = RANDOM.integers(0, 256, (count, 5, 5, channels)).astype(np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(c.squeeze()).resize((side, side), Image.Resampling.BICUBIC)).reshape(
                side, side, channels
            )
            for c in coarse
        ]
    )


def jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, "JPEG", quality=70)
    return np.asarray(Image.open(stream)).reshape(image.shape)


# --- statistics


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=3), kind=st.sampled_from(["uint8", "float"]))
def test_moments_are_numpys_however_the_rows_are_cut(seed: int, cuts: list[int], kind: str) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(1e4, 3, (30, 4))
    values[random.random(values.shape) < 0.2] = np.nan
    given_values = values
    if kind == "uint8":
        given_values = random.integers(0, 256, (30, 2, 3, 4)).astype(np.uint8)
        values = given_values.reshape(-1, 4) / 255
    moments = Moments()
    for part in np.split(given_values, sorted(cuts)):
        moments.add(part)
    np.testing.assert_allclose(moments.means(), np.nanmean(values, axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.stds(), np.nanstd(values, axis=0), rtol=1e-4)
    np.testing.assert_allclose(moments.missing(), np.isnan(values).mean(axis=0), atol=1e-5)


def test_statistics_by_class(tmp_path: Path) -> None:
    classes = {"dark": images(4, channels=3) // 4, "light": 255 - images(3, channels=3) // 4}
    found = survey(tmp_path / "out", written(tmp_path / "out", classes, [0, 2]))
    for entry, pixels in zip(found.classes, classes.values(), strict=True):
        np.testing.assert_allclose(entry.mean, (pixels / 255).mean(axis=(0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(entry.std, (pixels / 255).std(axis=(0, 1, 2)), rtol=1e-4)
        assert entry.examples == len(pixels)
    everything = np.concatenate(list(classes.values())) / 255
    np.testing.assert_allclose(found.mean, everything.mean(axis=(0, 1, 2)), rtol=1e-5)


# --- copies


def test_identical_and_near_identical_pictures_across_parts(tmp_path: Path) -> None:
    train, val, test = images(30), images(20), images(20)
    test[3] = train[7]
    test[4] = train[7]
    test[5] = jpeg(val[2])
    val[9] = jpeg(train[11])
    train[1] = train[0]
    found = survey(tmp_path / "out", written(tmp_path / "out", {"a": train, "b": val, "c": test}, [0, 1, 2]))
    assert found.identical["random"] == (2, [Pair("a", 7, "c", 3), Pair("a", 7, "c", 4)])
    assert set(found.near["random"].listed) == {Pair("b", 2, "c", 5), Pair("a", 11, "b", 9)}
    assert (found.copies_within, found.copies_across) == (2, 1)  # train[1] and test[4]; test[3]


def test_look_alike_classes_of_any_pictures_that_were_prepared_by_anyone(tmp_path: Path) -> None:
    classes = {f"c{i}": images(1).repeat(4, axis=0) for i in range(6)}
    classes["c5"] = np.stack([jpeg(image) for image in classes["c0"]])
    manifest = written(tmp_path / "out", classes, [0, 0, 1, 1, 2, 2])
    assert "near_duplicates" not in manifest.source
    found = write_card(tmp_path / "out", manifest)
    assert [(pair.class_a, pair.class_b) for pair in found.look_alikes["random"]] == [("c5", "c0")]
    assert "c5 (meta_test) and c0 (meta_train)" in (tmp_path / "out" / CARD).read_text()


def test_copies_inside_one_part_are_no_leak(tmp_path: Path) -> None:
    one, other = images(5), images(5)
    other[2] = one[3]
    found = survey(tmp_path / "out", written(tmp_path / "out", {"a": one, "b": other, "c": images(2)}, [0, 0, 1]))
    assert found.identical["random"].examples == 0
    assert found.copies_across == 1


def test_blank_pictures_are_copies_and_do_not_flood_the_comparison(tmp_path: Path) -> None:
    blank = np.zeros((200, 20, 20, 1), np.uint8)
    found = survey(
        tmp_path / "out", written(tmp_path / "out", {"a": blank, "b": blank[:50], "c": images(5)}, [0, 1, 2])
    )
    assert found.identical["random"].examples == 50
    assert found.near["random"].examples == 0


def test_texts_that_differ_in_case_and_marks_alone(tmp_path: Path) -> None:
    classes = {"greet": ["Good morning!", "hello there"], "part": ["good  morning", "bye", "hello there"]}
    manifest = written(tmp_path / "out", classes, [0, 2], modality="text")
    found = survey(tmp_path / "out", manifest)
    assert found.identical["random"] == (1, [Pair("greet", 1, "part", 2)])
    assert found.near["random"] == (1, [Pair("greet", 0, "part", 0)])
    assert found.mean == pytest.approx([np.mean([13, 11, 13, 3, 11])], rel=1e-5)
    write_card(tmp_path / "out", manifest)
    page = (tmp_path / "out" / CARD).read_text()
    assert "| meta\\_train | greet | Good morning\\! |" in page
    assert page.count("| meta\\_test | part |") == 2


def test_identical_vectors(tmp_path: Path) -> None:
    rows = RANDOM.normal(size=(6, 2)).astype(np.float32)
    rows[0, 1] = np.nan
    columns = [Column(name="x"), Column(name="y")]
    manifest = written(
        tmp_path / "out", {"a": rows[:4], "b": rows[[0, 4, 5]]}, [0, 1], modality="vector", columns=columns
    )
    found = survey(tmp_path / "out", manifest)
    assert found.identical["random"] == (1, [Pair("a", 0, "b", 0)])
    assert found.near == {}  # two columns
    assert found.missing == pytest.approx([0, 2 / 7], abs=1e-5)
    write_card(tmp_path / "out", manifest)
    assert "| y | numeric |" in (tmp_path / "out" / CARD).read_text()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of ten words each, of 500 that there are."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefghijklmnop"), 6)) for _ in range(500)]
    return [" ".join(random.choice(words, 10)) for _ in range(count)]


def test_texts_that_differ_by_a_word_across_parts(tmp_path: Path) -> None:
    texts = sentences(300)
    more = [f"{text} please" for text in texts[:20]]  # 1 of 11 words
    other = [" ".join([*text.split()[:5], *sentences(1, seed=i)[0].split()[:5]]) for i, text in enumerate(texts[20:40])]
    cased = [texts[40].upper()]
    classes = {"a": texts[:150], "b": texts[150:300], "c": [*more, *other, *cased, texts[41]]}
    manifest = written(tmp_path / "out", classes, [0, 0, 2], modality="text")
    found = write_card(tmp_path / "out", manifest)
    assert found.identical["random"] == (1, [Pair("a", 41, "c", 41)])
    assert {(p.class_a, p.number_a, p.number_b) for p in found.near["random"].listed} == {
        *(("a", i, i) for i in range(20)),
        ("a", 40, 40),
    }
    assert found.near["random"].examples == 21
    assert found.near_compared == manifest.num_examples
    assert "Near-identical across the parts of `random`" in (tmp_path / "out" / CARD).read_text()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0.1, 0.95))
def test_minhash_estimates_what_pieces_are_shared(seed: int, share: float) -> None:
    words = sentences(1, seed)[0].split() + sentences(1, seed + 1)[0].split()
    cut = int(share * len(words))
    pair = [" ".join(words), " ".join(words[:cut] + sentences(3, seed + 2)[2].split())]
    pieces = [{f" {t} "[i : i + 4] for i in range(len(t) - 1)} for t in pair]
    kind = duplicates._Texts()
    estimate = float(kind.closeness(kind.features(pair))[0, 1])
    assert abs(estimate - len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])) < 0.25


@pytest.mark.parametrize("categories", [0, 3])
def test_vectors_that_nearly_agree_across_parts(tmp_path: Path, categories: int) -> None:
    """Whatever the columns' scales: rounded numbers are copies, and other rows or another category are not."""
    scales = 10.0 ** np.array([-4, -3, -2, -1, 0, 1, 2, 3, 4, 30])  # the last one's squares are beyond float32
    rows = np.random.default_rng(1).normal(size=(400, 10)) * scales + 3 * scales
    columns = [Column(name=f"x{i}") for i in range(10)]
    if categories:
        columns[3] = Column(name="x3", kind="categorical", categories=["p", "q", "r"])
        rows[:, 3] = np.random.default_rng(2).integers(0, 3, 400)
    rows[:, 5][::7] = np.nan
    copies = np.round(rows[:30] / scales, 2) * scales
    if categories:
        copies[:, 3] = rows[:30, 3]
        copies[0, 3] = (copies[0, 3] + 1) % 3
    columns[5] = Column(name="x5", missing=True)
    classes = {"a": rows[:200], "b": rows[200:], "c": np.concatenate([copies, rows[50:51]])}
    typed = {name: values.astype(np.float32) for name, values in classes.items()}
    found = survey(tmp_path / "out", written(tmp_path / "out", typed, [0, 0, 1], modality="vector", columns=columns))
    assert found.identical["random"] == (1, [Pair("a", 50, "c", 30)])
    expected = {Pair("a", i, "c", i) for i in range(bool(categories), 30)}
    assert set(found.near["random"].listed) == expected
    assert found.near["random"].examples == len(expected)


def test_classes_of_texts_that_read_alike(tmp_path: Path) -> None:
    texts = sentences(300)
    classes = {f"c{i}": texts[40 * i : 40 * i + 20] for i in range(7)}
    classes["c6"] = [f"{first} {second}" for first, second in zip(classes["c0"], classes["c0"][1:], strict=False)]
    manifest = written(tmp_path / "out", classes, [0, 0, 0, 1, 1, 2, 2], modality="text")
    found = write_card(tmp_path / "out", manifest)
    assert [(pair.class_a, pair.class_b) for pair in found.look_alikes["random"]] == [("c6", "c0")]
    assert "c6 (meta_test) and c0 (meta_train)" in (tmp_path / "out" / CARD).read_text()


def test_likeness_is_looked_for_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert duplicates.Likeness("vector", [Column(name=str(i)) for i in range(7)]).most == 0
    assert duplicates.Likeness("vector", [Column(name=str(i)) for i in range(10_000)]).most == 2000
    assert duplicates.Likeness("text").most == 50_000


def test_of_more_classes_than_likeness_has_room_for_some_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {f"c{i}": images(3) for i in range(10)}
    classes["c6"][1] = classes["c0"][1] ^ 1  # nearly the same
    manifest = written(tmp_path / "out", classes, [0, *[1] * 9])
    monkeypatch.setattr(duplicates._Pictures, "most", 7)
    found = survey(tmp_path / "out", manifest)
    assert found.near_compared == 8  # two each of c0, c3, c6 and c9
    assert found.near["random"].listed == [Pair("c0", 1, "c6", 1)]


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=40),
    parts=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_leaks_are_what_comparing_each_with_each_finds(contents: list[tuple[int, int]], parts: list[int]) -> None:
    rows = sorted(contents)  # (class, content)
    digests = Digests(len(rows), texts=False)
    for class_id in range(4):
        values = np.array([[v] for c, v in rows if c == class_id], dtype=np.uint8)
        if len(values):
            digests.add(class_id, 0, values)
    expected = sum(any(v == w and parts[d] < parts[c] for d, w in rows) for c, v in rows)
    assert digests.leaks(list("abcd"), np.array(parts))[0].examples == expected
    copies = sum(digests.copies())
    assert copies == len(rows) - len({v for _, v in rows})


def test_of_many_examples_all_copies_are_kept_or_dropped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "DIGESTS", 500)
    digests = Digests(2000, texts=False)
    values = np.arange(1000, dtype=np.uint32).view(np.uint8).reshape(1000, 4)
    for class_id in range(2):
        digests.add(class_id, 0, values)
    found, _ = digests.leaks(["a", "b"], np.array([0, 2]))
    assert digests.share == 0.25
    assert 180 < found.examples < 320
    assert all(pair.number_a == pair.number_b for pair in found.listed)


def test_look_alike_classes_are_found_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    means = images(23).astype(np.float32)[:, :14, :14] / 255
    means[[3, 9, 21]] = means[17]
    given_means = {f"c{i:02d}": (SPLITS[i % 3], mean) for i, mean in enumerate(means)}
    whole = near_duplicates.alike(given_means, threshold=0.3)
    assert len(whole) > 6
    for block in (1, 4, 11, 22):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        in_blocks = near_duplicates.alike(given_means, threshold=0.3)
        assert [pair[:4] for pair in sorted(in_blocks)] == [pair[:4] for pair in sorted(whole)]
        np.testing.assert_allclose([p.similarity for p in in_blocks], [p.similarity for p in whole], atol=2e-4)


def test_thumbnails_are_means_by_area() -> None:
    pixels = RANDOM.integers(0, 256, (2, 42, 28, 3)).astype(np.uint8)
    expected = pixels.mean(axis=3).reshape(2, 14, 3, 14, 2).mean(axis=(2, 4))
    assert np.abs(thumbnails(pixels) - expected).max() <= 0.51
    assert thumbnails(np.full((1, 9, 50, 1), 77, np.uint8)).tolist() == np.full((1, 14, 14), 77).tolist()


def test_likeness_finds_most_copies_of_photos_and_few_others() -> None:
    photos = images(400, side=40, channels=3)
    likeness = Likeness("image")
    likeness.add(0, np.arange(400), photos, np.arange(400, dtype=np.uint64))
    copies = np.stack([jpeg(photo) for photo in photos])
    likeness.add(1, np.arange(400), copies, np.arange(400, 800, dtype=np.uint64))
    pairs, _ = likeness.pairs()
    found = {(a, b) for a, b in pairs.tolist()}
    assert sum((i, i + 400) in found for i in range(400)) > 360
    assert len(found) < 410


@given(st.text(max_size=20))
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalized(normalized(text)) == normalized(text)
    assert normalized(text.upper()) == normalized(text.upper().lower()) or not text.isascii()


# --- the card

RAW = {Original(20, 20, "L", "PNG"): 40, Original(300, 200, "RGB", "PNG"): 8}


def test_the_card_says_what_is_there(tmp_path: Path) -> None:
    classes = {f"class{i}": images(6) for i in range(8)}
    classes["class7"][0] = classes["class0"][0]
    manifest = written(tmp_path / "out", classes, [0, 0, 0, 0, 1, 1, 2, 2])
    before = shards.read_manifest(tmp_path / "out")
    write_card(tmp_path / "out", manifest, command="metapipe data prepare …", originals=RAW)
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    for part in ("# out", "48 images of 8 classes", "| random | meta_train | 4 | 1 | 24 |", "metapipe data prepare …"):
        assert part in text
    assert "class7 [0] is in class0 [0]" in text
    assert "| width | 20 | 20 | 300 |" in text
    assert "Their modes: L 40, RGB 8." in text
    assert "Their formats: PNG 48." in text
    assert manifest.digest in text
    with Image.open(tmp_path / "out" / PICTURE) as sheet:
        assert sheet.height > 8 * 50
        assert np.ptp(np.asarray(sheet)) == 255
    content = json.loads((tmp_path / "out" / STATISTICS).read_text())
    assert content["identical"]["random"]["examples"] == 1
    assert [entry["name"] for entry in content["classes"]] == list(classes)
    assert shards.verify(tmp_path / "out") == before, "the card changed the data set"
    again = text
    write_card(tmp_path / "out", manifest, command="metapipe data prepare …", originals=RAW)
    assert (tmp_path / "out" / CARD).read_text(encoding="utf-8") == again


def test_names_cannot_break_the_card(tmp_path: Path) -> None:
    names = ["a|b", "<script>alert(1)</script>", "*x* _y_ `z`", "[link](http://x)", "# head", "漢字"]
    manifest = written(tmp_path / "out", {name: images(3) for name in names}, [0, 0, 1, 1, 2, 2])
    write_card(tmp_path / "out", manifest)
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "<script" not in text
    table = text.partition("## Classes")[2].partition("##")[0].strip().splitlines()
    assert {line.replace("\\|", "").count("|") for line in table} == {6}
    assert "\\[link\\](http://x)" in text


def test_encoded_pictures_have_sizes_and_a_damaged_one_does_no_harm(tmp_path: Path) -> None:
    def file(seed: int, width: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (30, width)).astype(np.uint8)
        Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
        return stream.getvalue()

    classes = {"a": [file(0, 20), file(1, 40)], "b": [file(0, 20), b"no picture"]}
    manifest = written(tmp_path / "out", classes, [0, 2], modality="encoded_image", shape=(20, 20, 1))
    found = write_card(tmp_path / "out", manifest)
    assert found.originals == {Original(20, 30, "L", ""): 2, Original(40, 30, "L", ""): 1}
    assert found.identical["random"].examples == 1
    assert (tmp_path / "out" / PICTURE).is_file()
