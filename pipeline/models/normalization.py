"""Batch-statistics normalization over a leading task axis, from a pass's own statistics or from given ones.

No running state lives in a model: statistics go in and come out, so nothing leaks between tasks or from query to
support. Layers are named; a layer's statistics are `NAME.mean` and `NAME.var` (biased), [T, channels].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.types import Statistics

EPSILON = 1e-5


class Normalizer:
    """One forward pass's normalization: `Normalizer(statistics, observe)`, call it per layer, read `observed`.

    statistics: None for the pass's own batch statistics, else the ones to use.
    observe: record the batch statistics of this pass (differentiable).
    """

    def __init__(self, statistics: Statistics | None, observe: bool) -> None:
        self.statistics = statistics
        self.observe = observe
        self.observed: Statistics = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [N, T·channels, ...], weight and bias [T, channels] -> the same shape as x.

        Tasks lie side by side on the channel axis, so per-channel statistics are per-task statistics.
        """
        tasks, channels = weight.shape
        gain, offset = weight.reshape(-1), bias.reshape(-1)
        several = x.numel() > x.shape[1]  # F.batch_norm refuses one value per channel; its variance is 0
        if self.statistics is None and not self.observe and several:
            return F.batch_norm(x, None, None, gain, offset, training=True, eps=EPSILON)
        if self.statistics is None or self.observe:
            var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
            if self.observe:
                self.observed[f"{name}.mean"] = mean.view(tasks, channels)
                self.observed[f"{name}.var"] = var.view(tasks, channels)
        if self.statistics is not None:
            mean = self.statistics[f"{name}.mean"].reshape(-1)
            var = self.statistics[f"{name}.var"].reshape(-1)
        # one multiply and one add per element: fold the statistics into the affine part
        scale = gain * torch.rsqrt(var + EPSILON)
        shift = offset - mean * scale
        broadcast = (1, -1) + (1,) * (x.ndim - 2)
        return x * scale.view(broadcast) + shift.view(broadcast)
