"""From strokes to a drawing: bend them, slant and turn them, run a pen along them.

1. the strokes are bent by a smooth random field; each bulges a little, its free ends over- or undershoot, and parts
   that do not touch move against each other;
2. the whole is stretched, slanted and turned;
3. a round pen of random, varying width runs along the points at SUPERSAMPLING times the final resolution, fitted into
   the picture with a random scale and position, and the picture is reduced by area averaging.

Everything random comes from the generator given. Points are float64 [n, 2] of (x, y), y down, in the strokes' units:
the larger side of a glyph is 2. In pictures ink is high (255), paper 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pipeline.datasets.glyph_strokes import POINT_SPACING, Stroke

SUPERSAMPLING = 4
REFERENCE_SIZE = 28  # pixels; pen widths are given for it and scale with the picture


def draw(strokes: Iterable[Stroke], rng: np.random.Generator, *, size: int) -> np.ndarray:
    """One wobbly drawing of the strokes (at least one): uint8 [size, size], size in pixels.

    Its darkest pixel is 255, and no ink touches the border. The numbers drawn from `rng` do not depend on `size`.
    """
    bent = _bent(strokes, rng)
    points = np.concatenate(bent)
    points = points @ _affine(rng).T
    extent = rng.uniform(0.7, 0.86)
    crowded = np.sqrt(min(1.0, 7.0 / (len(points) * POINT_SPACING)))  # an A is about 6 long: finer pens beyond
    widths = _pen_widths(points, rng) * (rng.uniform(1.8, 3.1) / REFERENCE_SIZE * extent * crowded)
    return _inked(points, widths, extent, rng.uniform(-1, 1, 2), size)


def clean_drawing(strokes: Iterable[Stroke]) -> np.ndarray:
    """The strokes as they are with a middling pen, blurred by a pixel: float32 [28, 28, 1] in [0, 255], to compare.

    Half-way to a square (the shorter side grows to the geometric mean), since drawings of one class vary in
    proportion: an O and a circle should meet, a bar and a dash should not.
    """
    points = np.concatenate([stroke.points for stroke in strokes])
    span = np.ptp(points, axis=0)
    points = points * np.maximum(span / span.max(), 0.15) ** -0.5
    picture = _inked(points, np.full(len(points), 2.5 / REFERENCE_SIZE), 0.75, np.zeros(2), REFERENCE_SIZE)
    return ndimage.gaussian_filter(picture.astype(np.float32), 1.0)[..., None]


def _bent(strokes: Iterable[Stroke], rng: np.random.Generator) -> list[np.ndarray]:
    """The strokes' points [n, 2] each, moved by an elastic field and each stroke by its own unsteadiness."""
    waves = rng.normal(0.0, 0.9, (5, 2))  # radians per unit: a glyph, 2 wide, sees up to about half a wave
    phases = rng.uniform(0, 2 * np.pi, (5, 2))
    amplitudes = rng.normal(0.0, 0.055, (5, 2))
    shifts: dict[int, np.ndarray] = {}
    bent = []
    for stroke in strokes:
        points = stroke.points
        if stroke.part not in shifts:
            shifts[stroke.part] = rng.normal(0.0, 0.05, 2) if shifts else np.zeros(2)
        moved = points + shifts[stroke.part]
        if len(points) > 2:
            moved = moved + _unsteadiness(stroke, rng)
        angles = (moved @ waves.T)[..., None] + phases
        bent.append(moved + (np.sin(angles) * amplitudes).sum(axis=1))
    return bent


def _unsteadiness(stroke: Stroke, rng: np.random.Generator) -> np.ndarray:
    """Displacements [n, 2]: a bulge across the stroke, and at free ends a hook and an over- or undershoot."""
    points = stroke.points
    length = len(points) * POINT_SPACING
    along = np.linspace(0.0, 1.0, len(points))[:, None]
    tangent = np.gradient(points, axis=0)
    tangent /= np.maximum(np.hypot(tangent[:, :1], tangent[:, 1:]), 1e-9)
    across = tangent[:, ::-1] * [1.0, -1.0]
    moved = across * (rng.normal(0.0, 0.05) * length * np.sin(np.pi * along))
    reach = min(length, 1.0)
    for free, towards_end in zip(stroke.free, (1 - along, along), strict=True):
        direction = rng.normal(0.0, 0.08, 2) * reach
        if free:
            moved = moved + direction * towards_end**2
    return moved


def _affine(rng: np.random.Generator) -> np.ndarray:
    """[2, 2]: stretched, slanted, turned."""
    stretch = np.diag(np.exp(rng.normal(0.0, 0.1, 2)))
    slant = np.array([[1.0, rng.normal(-0.06, 0.12)], [0.0, 1.0]])
    angle = rng.normal(0.0, 0.07)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ slant @ stretch


def _pen_widths(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative pen width at each point [n], about 1: pressure that varies slowly over the picture."""
    angles = points @ rng.normal(0.0, 1.5, (2, 3)) + rng.uniform(0, 2 * np.pi, 3)
    return np.exp(0.13 * np.sin(angles).sum(axis=1))


def _inked(points: np.ndarray, widths: np.ndarray, extent: float, offset: np.ndarray, size: int) -> np.ndarray:
    """A round pen along the points: uint8 [size, size].

    widths [n] and extent (of the larger side of the ink) are fractions of the picture; offset [2] in [-1, 1] takes
    the ink from the middle to what room is left beside it, short of one pixel.
    """
    canvas = size * SUPERSAMPLING
    radius = widths * (canvas / 2)
    low, high = points.min(axis=0), points.max(axis=0)
    room = canvas * extent - 2 * radius.max()
    scale = room / max(float((high - low).max()), 0.05)
    span = (high - low) * scale
    free = (canvas - 2 * SUPERSAMPLING - span - 2 * radius.max()) / 2  # on each side
    centre = canvas / 2 + offset * np.minimum(np.maximum(free, 0), 0.045 * canvas)
    placed = (points - (low + high) / 2) * scale + centre
    picture = Image.new("L", (canvas, canvas))
    pen = ImageDraw.Draw(picture)
    for (x, y), r in zip(placed.tolist(), radius.tolist(), strict=True):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    small = np.asarray(picture).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean(axis=(1, 3))
    return np.round(small * (255 / small.max())).astype(np.uint8)
