"""Random changes of meta-training's images, each image its own, on the device, without any global random number.

torchvision's v2 transforms draw one set of parameters from the global generator for all images of a call, and their
functional kernels check and convert the parameters as Python numbers (`float(ratio)`, `if factor < 0`), so that neither
takes a tensor of parameters, nor does vmap help. Here the parameters of all images are drawn at once by the episodes'
keys, and the same arithmetic is done for all of them: torchvision's `rgb_to_grayscale` and its HSV conversion, which
have no parameters, and PyTorch's `grid_sample`, which torchvision's affine kernel is. A test compares every image
with what torchvision's `crop`, `affine`, `horizontal_flip`, `adjust_…` and `erase` make of it with its parameters.

In this order: crop, affine, flip, brightness, contrast, saturation, hue, erasing. What comes in from outside an image
is 0, and so is what is erased. Validation and test images stay as they are.

Shapes: T tasks · N examples · B = T·N images · C H W of one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import keys as random_numbers
from pipeline.config import Section

_STREAM = 0x6175676D656E74  # no small number: those are the samplers' streams

Part = Annotated[float, Field(ge=0, le=1)]


class AugmentationConfig(Section):
    """Random changes of meta-training's images; 0 leaves one out."""

    apply_to: Literal["both", "support", "query"] = "both"
    crop_padding: int = Field(default=0, ge=0)  # pixels around the image, from which one of its size is cropped
    rotation: float = Field(default=0.0, ge=0, le=180)  # degrees, uniform in ±
    translation: Part = 0.0  # of height and width, uniform in ±
    scale: tuple[float, float] = (1.0, 1.0)  # uniform in [lowest, highest]
    shear: float = Field(default=0.0, ge=0, lt=90)  # degrees along the rows, uniform in ±
    flip: Part = 0.0  # probability of left for right
    brightness: Part = 0.0  # factors of these three are uniform in 1 ±
    contrast: Part = 0.0
    saturation: Part = 0.0  # of RGB images
    hue: float = Field(default=0.0, ge=0, le=0.5)  # of the colour circle, uniform in ±; of RGB images
    erasing: Part = 0.0  # probability that a rectangle is erased
    erasing_area: tuple[Part, Part] = (0.02, 0.33)  # of the image

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: should be [lowest, highest], above 0, got {list(self.scale)}")
        if not 0 < self.erasing_area[0] <= self.erasing_area[1]:
            raise ValueError(f"erasing_area: should be [lowest, highest], above 0, got {list(self.erasing_area)}")
        if not (self.crop_padding or self.affine or self.flip or self.colours or self.erasing):
            raise ValueError("names no change of the images: set one of its keys, or leave augmentation out")
        return self

    @property
    def affine(self) -> bool:
        return bool(self.rotation or self.translation or self.shear) or self.scale != (1.0, 1.0)

    @property
    def colours(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    def __call__(self, support: Tensor, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Images in 0…1, [T, S, C, H, W] and [T, Q, C, H, W], of the episodes with `keys` [T] -> changed ones."""
        shots = support.shape[1]
        if self.apply_to != "query":
            support = self._changed(support, keys, 0)
        if self.apply_to != "support":
            query = self._changed(query, keys, shots)
        return support, query

    def _changed(self, images: Tensor, keys: Tensor, first: int) -> Tensor:
        numbers = torch.arange(first, first + images.shape[1], device=images.device)
        each = random_numbers.fold(random_numbers.fold(keys, _STREAM).unsqueeze(-1), numbers)  # [T, N]
        height, width = images.shape[-2:]
        changes = self.draw(each.flatten(), height, width)
        return self.apply(images.flatten(0, 1), changes).unflatten(0, images.shape[:2])

    def draw(self, keys: Tensor, height: int, width: int) -> Changes:
        """What happens to the image of each key [B]."""
        u = random_numbers.uniform(keys, 17).unbind(-1)

        def around(u: Tensor, centre: float, distance: float) -> Tensor:
            return centre + distance * (2 * u - 1)

        low, high = self.erasing_area
        area = (low + (high - low) * u[11]) * height * width
        ratio = ((2 * u[12] - 1) * math.log(3.3)).exp()  # height to width
        tall = (area * ratio).sqrt().round().clamp(1, height).long()
        wide = (area / ratio).sqrt().round().clamp(1, width).long()
        return Changes(
            top=random_numbers.below(u[0], 2 * self.crop_padding + 1) - self.crop_padding,
            left=random_numbers.below(u[1], 2 * self.crop_padding + 1) - self.crop_padding,
            angle=around(u[2], 0, self.rotation),
            shift_x=(self.translation * width * (2 * u[3] - 1)).round(),
            shift_y=(self.translation * height * (2 * u[4] - 1)).round(),
            scale=self.scale[0] + (self.scale[1] - self.scale[0]) * u[5],
            shear=around(u[6], 0, self.shear),
            flip=u[7] < self.flip,
            brightness=around(u[8], 1, self.brightness),
            contrast=around(u[9], 1, self.contrast),
            saturation=around(u[10], 1, self.saturation),
            hue=around(u[13], 0, self.hue),
            erase_top=random_numbers.below(u[14], height - tall + 1),
            erase_left=random_numbers.below(u[15], width - wide + 1),
            erase_height=torch.where(u[16] < self.erasing, tall, 0),
            erase_width=wide,
        )

    def apply(self, images: Tensor, changes: Changes) -> Tensor:
        """Images [B, C, H, W] in 0…1 -> changed ones. Nothing waits for a GPU."""
        if self.crop_padding:
            images = cropped(images, changes.top, changes.left)
        if self.affine:
            images = transformed(images, changes)
        if self.flip:
            images = torch.where(_each(changes.flip), images.flip(-1), images)
        if self.colours:
            images = self._coloured(images, changes)
        if self.erasing:
            images = erased(images, changes)
        return images

    def _coloured(self, images: Tensor, changes: Changes) -> Tensor:
        from torchvision.transforms.v2.functional import rgb_to_grayscale
        from torchvision.transforms.v2.functional._color import _hsv_to_rgb, _rgb_to_hsv

        factor = {name: _each(getattr(changes, name).to(images.dtype)) for name in ("brightness", "contrast")}
        if self.brightness:
            images = (images * factor["brightness"]).clamp(0, 1)
        if self.contrast:
            mean = rgb_to_grayscale(images).mean(dim=(-3, -2, -1), keepdim=True)
            images = torch.lerp(mean, images, factor["contrast"]).clamp(0, 1)
        if self.saturation:
            saturation = _each(changes.saturation.to(images.dtype))
            images = torch.lerp(rgb_to_grayscale(images), images, saturation).clamp(0, 1)
        if self.hue:
            hue, saturation, value = _rgb_to_hsv(images).unbind(dim=-3)
            hue = (hue + changes.hue.to(images.dtype).view(-1, 1, 1)).remainder(1.0)
            images = _hsv_to_rgb(torch.stack((hue, saturation, value), dim=-3))
        return images


class Changes(NamedTuple):
    """Of B images, [B] each."""

    top: Tensor  # int64, pixels down from where the image begins to where the crop does
    left: Tensor
    angle: Tensor  # degrees
    shift_x: Tensor  # whole pixels, to the right
    shift_y: Tensor
    scale: Tensor
    shear: Tensor  # degrees
    flip: Tensor  # bool
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    erase_top: Tensor  # int64, pixels
    erase_left: Tensor
    erase_height: Tensor  # 0 where nothing is erased
    erase_width: Tensor


def cropped(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Images [B, C, H, W] moved by whole pixels: row r is what row r + top was, 0 outside."""
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + top.unsqueeze(1)  # [B, H]
    columns = torch.arange(width, device=images.device) + left.unsqueeze(1)
    inside = _between(rows, 0, height).unsqueeze(2) & _between(columns, 0, width).unsqueeze(1)  # [B, H, W]
    which = torch.arange(count, device=images.device).view(-1, 1, 1)
    rows, columns = rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    moved = images.movedim(1, -1)[which, rows, columns]
    return (moved * inside.unsqueeze(-1)).movedim(-1, 1)


def transformed(images: Tensor, changes: Changes) -> Tensor:
    """Images [B, C, H, W] turned, moved, scaled and sheared about their centres, bilinear: `F.affine` of each."""
    height, width = images.shape[-2:]
    angle, shear = (torch.deg2rad(part) for part in (changes.angle, changes.shear))
    cosine, sine, slope = angle.cos(), angle.sin(), shear.tan()
    # the inverse, from a place in the result to its place in the image; without scale its determinant is 1
    a, b = (cosine - sine * slope) / changes.scale, (cosine * slope + sine) / changes.scale
    c, d = -sine / changes.scale, cosine / changes.scale
    x, y = changes.shift_x, changes.shift_y
    inverse = torch.stack([a, b, -a * x - b * y, c, d, -c * x - d * y], dim=-1).unflatten(-1, (2, 3))
    # affine_grid's coordinates go from −1 to 1 over the width and over the height
    size = torch.stack([inverse.new_full((), width / 2), inverse.new_full((), height / 2)])  # no copy to a GPU
    scaled = torch.cat([inverse[..., :2] * size, inverse[..., 2:]], dim=-1) / size.unsqueeze(-1)
    grid = F.affine_grid(scaled.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def erased(images: Tensor, changes: Changes) -> Tensor:
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    top, left = changes.erase_top.unsqueeze(1), changes.erase_left.unsqueeze(1)
    tall = _between(rows, top, top + changes.erase_height.unsqueeze(1))
    wide = _between(columns, left, left + changes.erase_width.unsqueeze(1))
    return images.masked_fill((tall.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1), 0.0)


def _between(values: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    return (values >= low) & (values < high)


def _each(values: Tensor) -> Tensor:
    """[B] beside images [B, C, H, W]."""
    return values.view(-1, 1, 1, 1)
