"""Layers that take from outside what PyTorch's own keep or draw by themselves: normalization statistics, random masks.

A module of PyTorch's keeps BatchNorm's running statistics in a buffer and draws dropout's masks from a global
generator, so its answer depends on what was computed before. With these in their place a pass is a function of its
inputs: the same by a loop over tasks or by vmap, in chunks of any size, on any worker, and when it is computed again.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import keys
from pipeline.errors import ConfigError

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class EpisodeBatchNorm(nn.Module):
    """BatchNorm whose statistics come from the pass (given is None) or from outside; it keeps no running ones."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = original.eps
        self.weight = original.weight
        self.bias = original.bias
        self.given: tuple[Tensor, Tensor] | None = None
        self.observed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        self.observed = (mean, var)
        if self.given is not None:
            mean, var = self.given
        broadcast = (1, -1) + (1,) * (x.ndim - 2)
        normalized = (x - mean.view(broadcast)) * torch.rsqrt(var + self.eps).view(broadcast)
        if self.weight is None:
            return normalized
        return normalized * self.weight.view(broadcast) + self.bias.view(broadcast)


class FixedBatchNorm(nn.Module):
    """BatchNorm by the running statistics that came with its weights, in every pass: a constant affine map.

    They are buffers of their layer's names, `running_mean` and `running_var`, and take no gradient.
    """

    def __init__(self, original: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = original.eps
        self.weight = original.weight
        self.bias = original.bias
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.detach(), self.running_var.detach()
        scale = torch.rsqrt(var + self.eps)
        broadcast = (1, -1) + (1,) * (x.ndim - 2)
        if self.weight is None:
            return (x - mean.view(broadcast)) * scale.view(broadcast)
        scale = scale * self.weight
        return x * scale.view(broadcast) + (self.bias - mean * scale).view(broadcast)


class EpisodeDropout(nn.Module):
    """Dropout (of single numbers, or of whole channels) with masks from a key; without one nothing is dropped.

    The key is one task's for one pass (int64 scalar). A layer that is called again in the same pass draws anew.
    """

    def __init__(self, p: float, *, channels: bool = False) -> None:
        super().__init__()
        self.p = p
        self.channels = channels
        self._key: Tensor | None = None
        self._calls = 0

    def start(self, key: Tensor | None) -> None:
        """The key of the pass that begins."""
        self._key = key
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._key is None or self.p == 0:
            return x
        key = keys.fold(self._key, self._calls) if self._calls else self._key
        self._calls += 1
        shape = x.shape[:2] + (1,) * (x.ndim - 2) if self.channels else x.shape
        kept = keys.uniform(key, math.prod(shape)).view(shape) >= self.p
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return x * (kept.to(x.dtype) * scale)


class EpisodeAttention(nn.MultiheadAttention):
    """Multi-head attention whose dropout of attention weights is an `EpisodeDropout`.

    Takes over the parameters of the original. Raises ConfigError: a kind of attention that it cannot stand for.
    """

    def __init__(self, original: nn.MultiheadAttention, *, name: str) -> None:
        nn.Module.__init__(self)
        if original.bias_k is not None or original.add_zero_attn:
            raise ConfigError(
                f"model.dropout: {name} is an nn.MultiheadAttention with add_bias_kv or add_zero_attn, whose attention "
                "weights cannot be dropped by key. Build it with dropout=0, or set model.dropout: false."
            )
        self.__dict__.update(original.__dict__)
        self.weight_dropout = EpisodeDropout(original.dropout)
        self.dropout = 0.0  # of the functional form that computes the weights below

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        _, weights = super().forward(
            query, key, value, key_padding_mask, True, attn_mask, average_attn_weights=False, is_causal=is_causal
        )
        assert weights is not None
        weights = self.weight_dropout(weights)  # [N, heads, L, S]
        size = self.embed_dim
        weight = self.in_proj_weight[2 * size :] if self._qkv_same_embed_dim else self.v_proj_weight
        bias = None if self.in_proj_bias is None else self.in_proj_bias[2 * size :]
        sequence_first = value.ndim == 3 and not self.batch_first
        values = F.linear(value.transpose(0, 1) if sequence_first else value, weight, bias)  # [N, S, E]
        values = values.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # [N, heads, S, E / heads]
        output = self.out_proj((weights @ values).transpose(-3, -2).flatten(-2))
        if sequence_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(dim=-3) if average_attn_weights else weights


def with_episode_layers(module: nn.Module, *, dropout: bool, fixed_statistics: bool = False) -> nn.Module:
    """A copy of the module with these layers in place of PyTorch's own; parameters keep their names.

    dropout: replace dropout too. fixed_statistics: BatchNorm normalizes by its running statistics.
    Raises ConfigError: a layer that drops by itself and cannot be replaced.
    """
    holder = nn.Module()  # so that the module itself may be one of the layers
    holder.add_module("network", copy.deepcopy(module))
    replaced: dict[nn.Module, nn.Module | None] = {}  # a layer in several places stays one layer
    for path, layer in list(holder.named_modules(remove_duplicate=False)):
        if layer not in replaced:
            replaced[layer] = _replacement(
                layer, path.removeprefix("network."), dropout=dropout, fixed_statistics=fixed_statistics
            )
        replacement = replaced[layer]
        if replacement is not None:
            parent, _, attribute = path.rpartition(".")
            setattr(holder.get_submodule(parent), attribute, replacement)
    return holder.get_submodule("network")


def _replacement(layer: nn.Module, name: str, *, dropout: bool, fixed_statistics: bool) -> nn.Module | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return FixedBatchNorm(layer) if fixed_statistics and layer.track_running_stats else EpisodeBatchNorm(layer)
    if not dropout:
        return None
    if isinstance(layer, _DROPOUTS):
        return EpisodeDropout(layer.p, channels=not isinstance(layer, nn.Dropout))
    if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0:
        return EpisodeAttention(layer, name=name)
    if isinstance(layer, nn.RNNBase) and layer.dropout > 0 and layer.num_layers > 1:
        raise ConfigError(
            f"model.dropout: {name} is an {type(layer).__name__} that drops between its layers by itself. Write it as "
            "one-layer ones with nn.Dropout between them, or set model.dropout: false."
        )
    return None
