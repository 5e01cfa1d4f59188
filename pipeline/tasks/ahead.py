"""Draws of several outer steps at once, for a caller that goes step by step.

Drawing is a few hundred operators on small tensors (on a GPU: kernels), so a hundred episodes cost little more than
one. What is drawn is a pure function of (seed, split, step, slot), so it is the same whenever it is drawn.

Shapes: B steps · T slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.types import Split

EPISODES_AT_ONCE = 512  # more gain nothing: drawing is bound by its arithmetic from there on

DrawnT = TypeVar("DrawnT", bound=tuple[Tensor, ...])


class _Kept(NamedTuple, Generic[DrawnT]):
    seed: int
    slots: list[int]
    steps: range
    drawn: DrawnT  # [B, T, ...]


class StepsAhead(Generic[DrawnT]):
    """`draw`, asked for one step at a time; from the second step in a row on it draws as many as are worth it.

    draw: (split, seed, steps [B, 1], slots [T]) -> a named tuple of tensors [B, T, ...], on `device`.
    """

    def __init__(self, draw: Callable[[Split, int, Tensor, Tensor], DrawnT], device: torch.device) -> None:
        self._draw = draw
        self._device = device
        self._kept: dict[Split, _Kept[DrawnT]] = {}  # entries are replaced whole: threads may share them

    def __call__(self, split: Split, step: int, slots: Tensor, *, seed: int) -> DrawnT:
        """The draws [T, ...] of `slots` (int64 [T]; on the CPU, else this waits for the GPU) at one step."""
        numbers = slots.tolist()
        kept = self._kept.get(split)
        if kept is None or (kept.seed, kept.slots) != (seed, numbers) or step not in kept.steps:
            in_a_row = kept is not None and (kept.seed, kept.slots, kept.steps.stop) == (seed, numbers, step)
            steps = range(step, step + (max(1, EPISODES_AT_ONCE // len(numbers)) if in_a_row else 1))
            drawn = self._draw(
                split,
                seed,
                torch.arange(steps.start, steps.stop, device=self._device).unsqueeze(-1),
                slots.to(self._device),
            )
            kept = self._kept[split] = _Kept(seed, numbers, steps, drawn)
        return type(kept.drawn)(*(part[step - kept.steps.start] for part in kept.drawn))
