"""Classes of meta-training by how hard they have been of late, and how often each is drawn.

A class's difficulty is a running average of its query loss after adaptation; the share of draws goes with a power of
it. Weights that lean towards what is hard bias the meta-objective: a mislabelled or hopeless class attracts draws
for nothing, and the loss that is learned is no longer that of the episodes of evaluation, whose classes are
uniform. `uniform_share` bounds this.

The state is a few tensors that training keeps, checkpoints and hands back; everything here is a pure function of it.
It follows from losses that are summed over all ranks, so it is the same on every rank, and with any number of ranks the
same but for the order of summation.

Shapes: C classes that meta-training draws from.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Section
from pipeline.types import Statistics

TINY = 1e-12  # nats: the loss of a class that is always answered with certainty


class DifficultyConfig(Section):
    """Draws hard classes of meta-training more often."""

    strength: float = Field(default=1.0, ge=0, le=10)  # a class is drawn in proportion to its loss to this power
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of a class's average loss, at each step that meets the class
    uniform_share: float = Field(default=0.2, gt=0, le=1)  # of the draws that no loss changes: no class is forgotten
    warmup_steps: int = Field(default=100, ge=0)  # first outer steps, whose classes are uniform


class ClassDifficulty:
    """`pipeline.types.ClassWeighting` by recent loss.

    State: `loss` and `count` [C], discounted sums whose quotient is the average; `weights` [C], which the next outer
    step is drawn with, and `next` [C], which the one after it is: a family that reads from a disk draws that one while
    the next is computed, so its weights must be known by then. All float64.
    """

    def __init__(self, config: DifficultyConfig, *, classes: int, device: torch.device) -> None:
        self.config = config
        self._classes = classes
        self._device = device

    def start(self) -> Statistics:
        def full(value: float) -> Tensor:
            return torch.full((self._classes,), value, dtype=torch.float64, device=self._device)

        return {"loss": full(0), "count": full(0), "weights": full(1 / self._classes), "next": full(1 / self._classes)}

    def weights(self, state: Statistics, step: int, *, completed: int) -> Tensor | None:
        """[C], which sum to 1, for outer step `step`: `completed` or the one after it. None: uniform.

        state: after `completed` steps.
        """
        if step < self.config.warmup_steps:
            return None
        assert step in (completed, completed + 1), f"step {step} is drawn after {completed} steps"
        return state["weights" if step == completed else "next"]

    def after_step(self, state: Statistics, observed: Statistics, finite: Tensor) -> Statistics:
        """The state after an outer step that met the classes of `observed`; without them where it was not `finite`."""
        count = torch.where(finite, observed["count"].to(torch.float64), 0)
        loss = torch.where(finite, observed["loss"].to(torch.float64), 0)
        keep = torch.where(count > 0, self.config.momentum, torch.ones_like(count))  # what was not met is not forgotten
        averages = {"loss": keep * state["loss"] + loss, "count": keep * state["count"] + count}
        return {**averages, "weights": state["next"], "next": self._shares(**averages)}

    def _shares(self, loss: Tensor, count: Tensor) -> Tensor:
        """[C], which sum to 1. A class that was never met counts as one of average loss."""
        overall = (loss.sum() / count.sum().clamp_min(TINY)).clamp_min(TINY)
        average = torch.where(count > 0, loss / count.clamp_min(TINY), overall).clamp_min(TINY)
        hard = (average / overall) ** self.config.strength
        return (1 - self.config.uniform_share) * hard / hard.sum() + self.config.uniform_share / self._classes

    def describe(self, state: Statistics) -> dict[str, float]:
        """For the metrics of a validation. Waits for a GPU."""
        weights = state["weights"]
        return {
            "difficulty_effective_classes": float(1 / weights.square().sum()),  # so many equal ones vary as much
            "difficulty_largest_share": float(weights.max()),
            "difficulty_smallest_share": float(weights.min()),
        }
