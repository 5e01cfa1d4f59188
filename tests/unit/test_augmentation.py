"""Changes of images against torchvision's own, image by image. Shapes: B images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode

from pipeline import keys
from pipeline.config import validate
from pipeline.errors import ConfigError, DataError
from pipeline.tasks.augmentation import AugmentationConfig, Changes
from pipeline.tasks.images import ImagesConfig, ImageTasks

BILINEAR = InterpolationMode.BILINEAR


def affine(image: Tensor, c: dict[str, Any]) -> Tensor:
    shift = [int(c["shift_x"]), int(c["shift_y"])]
    return F.affine(image, c["angle"], shift, c["scale"], [c["shear"], 0.0], interpolation=BILINEAR)


def crop(image: Tensor, c: dict[str, Any]) -> Tensor:
    return F.crop(image, c["top"], c["left"], *image.shape[-2:])


def erase(image: Tensor, c: dict[str, Any]) -> Tensor:
    place = c["erase_top"], c["erase_left"], c["erase_height"], c["erase_width"]
    return F.erase(image, *place, torch.zeros(()))


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Tensor, dict[str, Any]], Tensor]]] = {
    "crop": ({"crop_padding": 3}, crop),
    "affine": ({"rotation": 40, "translation": 0.2, "scale": [0.7, 1.4], "shear": 20}, affine),
    "flip": ({"flip": 0.5}, lambda image, c: F.horizontal_flip(image) if c["flip"] else image),
    "brightness": ({"brightness": 0.9}, lambda image, c: F.adjust_brightness(image, c["brightness"])),
    "contrast": ({"contrast": 0.9}, lambda image, c: F.adjust_contrast(image, c["contrast"])),
    "saturation": ({"saturation": 0.9}, lambda image, c: F.adjust_saturation(image, c["saturation"])),
    "hue": ({"hue": 0.5}, lambda image, c: F.adjust_hue(image, c["hue"])),
    "erasing": ({"erasing": 0.7}, erase),
}


def config(**options: Any) -> AugmentationConfig:
    return validate(AugmentationConfig, options, source="test")


def images(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def of_image(changes: Changes, number: int) -> dict[str, Any]:
    return {name: value[number].item() for name, value in changes._asdict().items()}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 14)])
def test_every_image_is_changed_as_torchvision_does(name: str, shape: tuple[int, int, int]) -> None:
    options, reference = REFERENCES[name]
    if shape[0] == 1 and name in ("saturation", "hue"):
        pytest.skip("of RGB images")
    augmentation, x = config(**options), images(20, *shape)
    changes = augmentation.draw(keys.fold(keys.make(7), torch.arange(20)), *shape[1:])
    ours = augmentation.apply(x, changes)
    theirs = torch.stack([reference(image, of_image(changes, number)) for number, image in enumerate(x)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    changed = (ours - x).abs().flatten(1).amax(1) > 1e-3
    assert bool(changed.any())
    assert ours.dtype == x.dtype


def test_all_changes_one_after_the_other() -> None:
    augmentation = config(**{key: value for options, _ in REFERENCES.values() for key, value in options.items()})
    x = images(10, 3, 12, 12)
    changes = augmentation.draw(keys.fold(keys.make(3), torch.arange(10)), 12, 12)
    theirs = []
    for number, image in enumerate(x):
        for name in ("crop", "affine", "flip", "brightness", "contrast", "saturation", "hue", "erasing"):
            image = REFERENCES[name][1](image, of_image(changes, number))
        theirs.append(image)
    torch.testing.assert_close(augmentation.apply(x, changes), torch.stack(theirs), rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 40),
    padding=st.integers(0, 5),
    area=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0)),
    size=st.tuples(st.integers(2, 20), st.integers(2, 20)),
)
def test_draws_stay_in_their_ranges(seed: int, padding: int, area: tuple[float, float], size: tuple[int, int]) -> None:
    height, width = size
    augmentation = config(crop_padding=padding, rotation=30, scale=[0.5, 2], erasing=1, erasing_area=area)
    c = augmentation.draw(keys.fold(keys.make(seed), torch.arange(30)), height, width)
    assert int(c.top.abs().max()) <= padding
    assert int(c.left.abs().max()) <= padding
    assert float(c.angle.abs().max()) <= 30
    assert 0.5 <= float(c.scale.min()) <= float(c.scale.max()) <= 2
    assert int(c.erase_height.min()) >= 1
    assert int(c.erase_width.min()) >= 1
    assert int(c.erase_top.min()) >= 0
    assert int((c.erase_top + c.erase_height).max()) <= height
    assert int(c.erase_left.min()) >= 0
    assert int((c.erase_left + c.erase_width).max()) <= width


def test_draws_are_uniform() -> None:
    augmentation = config(crop_padding=2, rotation=10, flip=0.25, erasing=0.5)
    c = augmentation.draw(keys.fold(keys.make(0), torch.arange(20_000)), 10, 10)
    assert (c.top + 2).bincount(minlength=5).tolist() == pytest.approx([4000] * 5, rel=0.1)
    assert float(c.flip.double().mean()) == pytest.approx(0.25, abs=0.02)
    assert float((c.erase_height > 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(c.angle.std()) == pytest.approx(20 / 12**0.5, rel=0.03)
    apart = {name: part.double() for name, part in c._asdict().items() if not name.startswith("erase")}
    apart = {name: part for name, part in apart.items() if float(part.std()) > 0}
    assert set(apart) == {"top", "left", "angle", "flip"}
    correlated = torch.corrcoef(torch.stack(list(apart.values()))) - torch.eye(4)
    assert float(correlated.abs().max()) < 0.04, "each is drawn by itself"


def family(data: Path, **augmentation: Any) -> ImageTasks:
    content = {"family": "images", "data": data, "split": "random", "n_way": 3, "k_shot": 2, "n_query": 3}
    content |= {"eval_n_query": 3, "augmentation": augmentation or None}
    return validate(ImagesConfig, content, source="test").build(device=torch.device("cpu"), dtype=torch.float32)


def test_only_the_sets_that_are_asked_for_in_meta_training(tiny_data: Path) -> None:
    slots = torch.arange(4)
    plain = family(tiny_data).sample("meta_train", 3, slots, seed=0)
    both = family(tiny_data, rotation=90).sample("meta_train", 3, slots, seed=0)
    support = family(tiny_data, rotation=90, apply_to="support").sample("meta_train", 3, slots, seed=0)
    query = family(tiny_data, rotation=90, apply_to="query").sample("meta_train", 3, slots, seed=0)
    assert torch.equal(support.query_x, plain.query_x)
    assert torch.equal(support.support_x, both.support_x)
    assert torch.equal(query.support_x, plain.support_x)
    assert torch.equal(query.query_x, both.query_x)
    assert not torch.equal(both.support_x, plain.support_x)
    assert not torch.equal(both.query_x, plain.query_x)
    flipped = family(tiny_data, flip=1)
    for split in ("meta_val", "meta_test"):
        ours, theirs = (each.sample(split, 0, slots, seed=0) for each in (flipped, family(tiny_data)))
        assert torch.equal(ours.support_x, theirs.support_x)


def test_what_changes_nothing_or_cannot_is_refused(tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match="names no change"):
        config(apply_to="query")
    with pytest.raises(ConfigError, match="scale: should be"):
        config(scale=[2, 1])
    with pytest.raises(DataError, match="these are grey"):
        family(tiny_data, hue=0.1)
