"""Windows of classes: which classes a step's episodes may hold, where not all of them are in memory at once.

A round is a random order of all classes of a part, dealt into windows of `classes` each; the next round has another
order. So within a round no class comes twice, and over rounds all come equally often (what a round leaves over at its
end is another rest in each). Windows are a pure function of (seed, split, number), and a number one of the step in
meta-training and of the slot in validation and test. So episodes stay a pure function of (seed, split, step, slot).

What it costs: the episodes of one window are not independent. For `steps` outer steps the gradient sees `classes`
classes alone: pairs of classes from different windows never meet in an episode of that round, and the parameters drift
towards the window, the more so the longer it lasts. An interval over evaluation episodes that share windows of
`eval_episodes` is a little too narrow. Take as many classes as memory allows, and as few steps as reading permits.

Shapes: T slots · B steps · N classes of a window · C classes of a part.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from pydantic import Field
from torch import Tensor

from pipeline import keys
from pipeline.config import Section
from pipeline.types import SPLITS, Split

_WINDOWS = 0x77696E646F7773  # no small number: those are steps
_KEPT_ROUNDS = 8


class WindowConfig(Section):
    """Episodes of some outer steps draw from some of the classes, and those of the next steps from others."""

    classes: int = Field(ge=2)  # of a window; two windows have to fit into task.cache_mb
    steps: int = Field(ge=1)  # outer steps that a window lasts; the next one is read meanwhile
    eval_episodes: int = Field(default=50, ge=1)  # that share a window in validation and test


class Windows:
    """The windows of every part of a class split."""

    def __init__(self, config: WindowConfig, num_classes: dict[Split, int]) -> None:
        self.config = config
        self.num_classes = num_classes
        self._rounds: OrderedDict[tuple[int, Split, int], Tensor] = OrderedDict()

    def applies(self, split: Split) -> bool:
        """False where one window holds the whole part: episodes are then what they are without windows."""
        return self.num_classes[split] > self.config.classes

    def numbers(self, split: Split, steps: int | Tensor, slots: Tensor) -> Tensor:
        """Of the window that each episode draws from: int64 of the shape of steps ([] or [B, 1]) or slots ([T])."""
        if split != "meta_train":
            return slots // self.config.eval_episodes
        return torch.as_tensor(steps) // self.config.steps

    def classes(self, seed: int, split: Split, number: int) -> Tensor:
        """int64 [N]: the classes of one window, numbers within the part, on the CPU."""
        size, every = self.config.classes, self.num_classes[split]
        in_round = every // size
        position = number % in_round
        return self._round(seed, split, number // in_round)[position * size : (position + 1) * size]

    def candidates(self, seed: int, split: Split, numbers: Tensor, *, copies: int = 1) -> Tensor:
        """Window numbers [...] -> their classes, int64 [..., copies · N], on the CPU.

        copies: how many classes to draw from each of these is; the second ones have numbers from C on. Steps of one
        window share its memory.
        """
        which, back = numbers.cpu().unique(return_inverse=True)
        classes = torch.stack([self.classes(seed, split, number) for number in which.tolist()])
        every = self.num_classes[split]
        classes = torch.cat([classes + copy * every for copy in range(copies)], dim=-1)
        return classes[0].expand(*back.shape, -1) if len(classes) == 1 else classes[back]

    def _round(self, seed: int, split: Split, number: int) -> Tensor:
        """int64 [C]: the order of one round. The last few are kept."""
        name = (seed, split, number)
        order = self._rounds.get(name)
        if order is None:
            key = keys.make(seed, SPLITS.index(split), _WINDOWS)
            order = self._rounds[name] = keys.order(key, self.num_classes[split], number)
            while len(self._rounds) > _KEPT_ROUNDS:
                self._rounds.popitem(last=False)
        return order
