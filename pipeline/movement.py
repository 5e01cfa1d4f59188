"""Why a learner adapts as it does: which layers a task moves, how far, and how much tasks differ.

The movement of a layer after k adaptation steps is ‖θ_k − θ_0‖ / ‖θ_0‖ over its parameters, one number for each task.
A layer is a module: its weight and bias together, so that an offset that starts at zero has something to be compared
with. It is measured on validation episodes, for whatever algorithm has adaptation steps.

Shapes: K + 1 steps, step 0 being where adaptation starts · L layers · E episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.training.evaluate import SELECTION_SEED, episode_batches
from pipeline.types import Algorithm, MetaState, Params, Split, TaskFamily

SPLIT: Split = "meta_val"
EPISODES = 64


@dataclass(frozen=True)
class Movement:
    """Float64 tensors [K + 1, L, E] on the CPU."""

    layers: list[str]
    distances: Tensor  # ‖θ_k − θ_0‖
    relative: Tensor  # the same by ‖θ_0‖; not finite for what starts at zero

    def to_dict(self) -> dict[str, Any]:
        """Means and standard deviations over episodes by step, and every episode's number after the last step."""
        mean, spread = self.relative.mean(-1), self.relative.std(-1)
        return {
            "split": SPLIT,
            "episode_seed": SELECTION_SEED,
            "episodes": self.relative.shape[-1],
            "movement": "‖θ_k − θ_0‖ / ‖θ_0‖ of a layer's parameters after k = 0, 1, … steps; null: it starts at zero",
            "layers": {
                layer: {
                    "mean": _numbers(mean[:, i]),
                    "standard_deviation": _numbers(spread[:, i]),
                    "mean_distance": _numbers(self.distances[:, i].mean(-1)),
                    "episodes": _numbers(self.relative[-1, i]),
                }
                for i, layer in enumerate(self.layers)
            },
        }

    def metrics(self) -> dict[str, float]:
        """The mean movement of each layer after the last step; without those that start at zero."""
        means = dict(zip(self.layers, self.relative[-1].mean(-1), strict=True))
        return {f"movement/{layer}": float(mean) for layer, mean in means.items() if mean.isfinite()}


def measure(
    algorithm: Algorithm, family: TaskFamily, state: MetaState, *, episodes: int = EPISODES, chunk: int | None = None
) -> Movement | None:
    """On the first validation episodes; None for an algorithm without adaptation steps.

    chunk: episodes adapted at once (None: 32).
    """
    if algorithm.eval_steps == 0:
        return None
    pieces = []
    for _, batch in episode_batches(family, SPLIT, torch.arange(episodes), seed=SELECTION_SEED, chunk=chunk):
        path = algorithm.adaptation_path(
            state,
            batch.support_x,
            batch.support_y,
            steps=algorithm.eval_steps,
            inductive=False,
            num_classes=batch.num_classes,
        )
        start = _in_order(next(path).params, state.params)
        lengths = _by_layer(start)
        steps = [{layer: torch.zeros_like(value) for layer, value in lengths.items()}]
        steps += [_by_layer({k: adapted.params[k] - v for k, v in start.items()}) for adapted in path]
        distances = torch.stack([torch.stack(list(step.values())) for step in steps])  # [K + 1, L, T]
        pieces.append((distances, distances / torch.stack(list(lengths.values()))))
    distances, relative = (torch.cat(part, dim=-1).cpu() for part in zip(*pieces, strict=True))
    return Movement(list(lengths), distances, relative)


def _in_order(params: Params, of: Params) -> Params:
    """As the network has them, and not those first that adapt."""
    return {name: params[name] for name in of if name in params} | params


def _by_layer(params: Params) -> Params:
    """Named parameters [T, ...] -> the length of each module's, all of its parameters together: float64 [T]."""
    layers: dict[str, list[Tensor]] = {}
    for name, value in params.items():
        length = torch.linalg.vector_norm(value.detach().reshape(len(value), -1), dim=1, dtype=torch.float64)
        layers.setdefault(name.rpartition(".")[0] or name, []).append(length)
    return {layer: torch.linalg.vector_norm(torch.stack(lengths), dim=0) for layer, lengths in layers.items()}


def _numbers(values: Tensor) -> list[float | None]:
    """JSON has neither NaN nor infinity."""
    return [float(value) if value.isfinite() else None for value in values]
