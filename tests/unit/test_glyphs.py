"""The embedded data set: what classes there are, how they are split, and that drawings are pure and varied."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest

from pipeline.datasets import glyphs
from pipeline.datasets.near_duplicates import near_duplicates
from pipeline.errors import DataError
from pipeline.types import SPLITS, Split


@pytest.fixture(scope="module")
def characters() -> tuple[glyphs.Character, ...]:
    return glyphs.characters()


def drawings_of(character: glyphs.Character, *, seed: int, size: int = 28, drawings: int = 20) -> np.ndarray:
    """uint8 [drawings, size, size, 1]"""
    return glyphs.Glyphs(seed=seed, size=size).read([glyphs.Drawing(character, i) for i in range(drawings)])[0]


@pytest.fixture(scope="module")
def sample(characters: tuple[glyphs.Character, ...]) -> dict[str, np.ndarray]:
    """Every 40th class, 20 drawings each."""
    return {character.name: drawings_of(character, seed=0) for character in characters[::40]}


def test_class_list(characters: tuple[glyphs.Character, ...]) -> None:
    assert len(characters) >= 600
    assert len({character.name for character in characters}) == len(characters)
    assert all(character.name.split("/")[0] == character.group for character in characters)


def test_look_alikes_are_one_class(characters: tuple[glyphs.Character, ...]) -> None:
    codepoints = {character.codepoint for character in characters}
    for alike in ("AΑА", "oOоОοΟօՕ", "sSѕЅ", "xXхХΧ", "ВBΒв", "TТΤ"):
        assert sum(ord(character) in codepoints for character in alike) == 1, alike
    for different in ("EFHKMRTWZ", "abdefhkqt", "ДЖЯЮ", "ΔΞΨΩ", "אבלש", "ბდეზ"):
        assert all(ord(character) in codepoints for character in different), different


def test_whole_scripts_in_each_split(characters: tuple[glyphs.Character, ...]) -> None:
    split_of = glyphs.splits({character.name: character.group for character in characters})
    scripts = {
        split: {character.group for character in characters if split_of[character.name] == split} for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not scripts[one] & scripts[other]
    assert len(scripts["meta_test"]) >= 3
    assert len(scripts["meta_val"]) >= 3
    count = Counter(split_of.values())
    assert count["meta_test"] >= 100
    assert count["meta_val"] >= 60
    assert 0.6 <= count["meta_train"] / len(characters) <= 0.75


def test_unknown_script_is_refused() -> None:
    with pytest.raises(DataError, match="Klingon"):
        glyphs.splits({"Klingon/a": "Klingon"})


def test_drawings_are_whole_grey_and_varied(sample: dict[str, np.ndarray]) -> None:
    for name, images in sample.items():
        assert images.dtype == np.uint8, name
        assert images.shape == (20, 28, 28, 1), name
        assert (images.max(axis=(1, 2, 3)) == 255).all(), name
        share = images.mean(axis=(1, 2, 3)) / 255
        assert share.min() > 0.02, f"{name}: a drawing is nearly blank"
        assert share.max() < 0.5, f"{name}: a drawing is a blob"
        border = images[:, [0, -1]].max(), images[:, :, [0, -1]].max()
        assert max(border) == 0, f"{name}: ink is cut off"
        grey = (images > 0) & (images < 255)
        assert grey.any(axis=(1, 2, 3)).all(), f"{name}: no anti-aliasing"
        for one, other in itertools.combinations(images.astype(np.int16), 2):
            assert np.abs(one - other).mean() > 2, f"{name}: two drawings are the same"


def test_a_drawing_depends_on_seed_name_and_number(characters: tuple[glyphs.Character, ...]) -> None:
    draw = partial(drawings_of, characters[10])
    first = draw(seed=0, drawings=4)
    assert (first == draw(seed=0, drawings=4)).all()
    assert (first[:2] == draw(seed=0, drawings=2)).all()
    assert (first != draw(seed=1, drawings=4)).any(axis=(1, 2, 3)).all()


def test_size_is_the_pictures_only(characters: tuple[glyphs.Character, ...]) -> None:
    small, large = (drawings_of(characters[10], seed=0, size=size, drawings=3).astype(float) for size in (28, 84))
    assert large.shape == (3, 84, 84, 1)
    reduced = large.reshape(3, 28, 3, 28, 3).mean(axis=(2, 4))
    for one, other in zip(small[..., 0], reduced, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("wrong", [{"size": 8}, {"drawings": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError):
        glyphs.Glyphs(**wrong)


def test_near_duplicates_finds_a_planted_pair_only(
    characters: tuple[glyphs.Character, ...], sample: dict[str, np.ndarray]
) -> None:
    letter = next(character for character in characters if character.name == "Latin/capital-letter-r")
    drawn, again = (drawings_of(letter, seed=seed) for seed in (0, 1))
    prototypes: dict[str, tuple[Split, np.ndarray]] = {name: ("meta_train", images) for name, images in sample.items()}
    prototypes["R"] = ("meta_train", drawn)
    prototypes["planted"] = ("meta_test", np.roll(again, 1, axis=2))
    found = near_duplicates(prototypes, threshold=0.75)  # few classes: what they share is known less well
    assert [pair[:4] for pair in found] == [("planted", "meta_test", "R", "meta_train")]
    assert found[0].similarity <= 1

    prototypes["planted"] = ("meta_train", again)
    assert near_duplicates(prototypes, threshold=0.75) == []  # the same split is no leak


def test_near_duplicates_refuses_mixed_shapes() -> None:
    images = {size: np.full((2, size, size, 1), 255, dtype=np.uint8) for size in (28, 32)}
    with pytest.raises(DataError, match="28, 28, 1"):
        near_duplicates({"a": ("meta_train", images[28]), "b": ("meta_test", images[32])})


def test_near_duplicates_of_little() -> None:
    assert near_duplicates({}) == []
    assert near_duplicates({"a": ("meta_train", np.zeros((1, 28, 28, 3), dtype=np.uint8))}) == []
