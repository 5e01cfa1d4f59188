"""Convolution and normalization over a leading task axis, closed under differentiation, in PyTorch alone.

A convolution is bilinear, and so are its two gradients; the derivatives of the three are again these three. Stock
PyTorch differentiates a gradient by slower detours. The same holds for batch normalization + ReLU + pooling, whose
double backward is written out here.

Tasks lie side by side on the channel axis: activations [N, T·C, H, W], channels-last on a CPU (two to ten times
faster there than the default layout for pooling and strided gradients). Any floating dtype, any device.

The first layer sees fixed images, so its batch statistics are known functions of its weights: with μ and Σ the mean
and covariance of the images' 3×3 patches, a filter w has the mean w·μ and the variance wᵀΣw. They are computed once
per episode; normalization is then part of the filter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPSILON = 1e-5  # added to variances, as in `pipeline.models.normalization`
aten = torch.ops.aten


class Images(NamedTuple):
    """Images made ready for several passes over them."""

    side_by_side: Tensor  # [N, T·C, H, W]
    padded: Tensor  # [T, N, C, H + 2, W + 2]
    patch_mean: Tensor  # [T, 9·C]
    patch_covariance: Tensor  # [T, 9·C, 9·C]


def prepare(x: Tensor, *, stride: int) -> Images:
    """x [T, N, C, H, W] -> itself for a first 3×3 convolution of this stride with padding 1."""
    tasks, _, channels = x.shape[:3]
    padded = F.pad(x, (1, 1, 1, 1))
    moments = [_patch_moments(some, stride) for some in padded.split(_tasks_at_once(x))]
    mean, covariance = (torch.cat(part) for part in zip(*moments, strict=True))
    side_by_side = layout(x.transpose(0, 1).reshape(-1, tasks * channels, *x.shape[3:]))
    return Images(side_by_side, padded, mean, covariance)


def _tasks_at_once(x: Tensor) -> int:
    """Whose patches are laid out together: nine times the images leave a CPU's caches, a GPU wants few launches."""
    return 1 if x.device.type == "cpu" else len(x)


def _patch_moments(padded: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Padded images [T, N, C, H + 2, W + 2] -> mean [T, 9·C] and covariance [T, 9·C, 9·C] of their patches."""
    # a covariance does not see the pivot; without it that of bright images would lose digits
    pivot = padded.mean(dim=(1, 2, 3, 4), keepdim=True)
    patches = (padded - pivot).unfold(3, 3, stride).unfold(4, 3, stride)  # [T, N, C, H', W', 3, 3]
    patches = patches.permute(0, 2, 5, 6, 1, 3, 4).reshape(len(padded), 9 * padded.shape[2], -1)
    mean = patches.mean(dim=2)
    products = torch.bmm(patches, patches.transpose(1, 2)) / patches.shape[2]
    return mean + pivot.flatten(1), products - mean.unsqueeze(2) * mean.unsqueeze(1)


def layout(x: Tensor) -> Tensor:
    """x [N, C, H, W] in the memory format that is fastest on its device."""
    return x.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format


def fold(weight: Tensor, gain: Tensor, offset: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """The first layer's filters and offsets with its batch normalization in them.

    weight [T, O, C, 3, 3], gain and offset [T, O] -> weight [T, O, 9·C] and offset [T, O].
    """
    mean, variance = moments(weight, images)
    scale = gain * torch.rsqrt(variance + EPSILON)
    return weight.flatten(2) * scale.unsqueeze(2), offset - mean * scale


def moments(weight: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """Mean and variance of the first layer's outputs before normalization: weight [T, O, C, 3, 3] -> [T, O] each."""
    flat = weight.flatten(2)
    mean = torch.bmm(flat, images.patch_mean.unsqueeze(2)).squeeze(2)
    return mean, (torch.bmm(flat, images.patch_covariance) * flat).sum(dim=2)


def first_layer(
    images: Images, weight: Tensor, gain: Tensor, offset: Tensor, *, stride: int, pool: int, dtype: torch.dtype
) -> Tensor:
    """pool(relu(normalize(convolution(images)))): [N, T·O, H', W'] of `dtype`.

    weight [T, O, C, 3, 3], gain and offset [T, O]; pool: side of the max-pooling window, 1 for none.
    """
    tasks, _, channels = weight.shape[:3]
    folded, shift = fold(weight, gain, offset, images)
    x = convolution(images.side_by_side, folded.reshape(-1, channels, 3, 3), stride=stride, tasks=tasks)
    if pool > 1:  # before the offset and ReLU, which keep the order of values: on a quarter of them
        x = F.max_pool2d(x, pool)
    return F.relu(x + shift.reshape(1, -1, 1, 1)).to(dtype)


# convolution


def convolution(x: Tensor, weight: Tensor, *, stride: int, tasks: int) -> Tensor:
    """3×3 convolutions with padding 1: x [N, T·C, H, W], weight [T·O, C, 3, 3] -> [N, T·O, H', W']."""
    return _Convolution.apply(x, layout(weight.to(x.dtype)), stride, tasks)


def _gradients(gy: Tensor, x: Tensor, weight: Tensor, stride: int, tasks: int, wanted: list[bool]) -> list[Tensor]:
    return aten.convolution_backward(
        gy, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], tasks, [*wanted, False]
    )


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, tasks: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = stride, tasks
        return aten.convolution(x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], tasks)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        gy = layout(gy)
        g_x = _InputGradient.apply(gy, weight, x.shape, *ctx.how) if ctx.needs_input_grad[0] else None
        g_weight = _WeightGradient.apply(x, gy, weight.shape, *ctx.how) if ctx.needs_input_grad[1] else None
        return g_x, g_weight, None, None


class _InputGradient(Function):
    """Bilinear in gy and weight."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, weight: Tensor, shape: torch.Size, stride: int, tasks: int) -> Tensor:
        ctx.save_for_backward(gy, weight)
        ctx.how = stride, tasks
        return _gradients(gy, _shape_of(shape, gy), weight, stride, tasks, [True, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        gy, weight = ctx.saved_tensors
        v = layout(v)
        g_gy = _Convolution.apply(v, weight, *ctx.how) if ctx.needs_input_grad[0] else None
        g_weight = _WeightGradient.apply(v, gy, weight.shape, *ctx.how) if ctx.needs_input_grad[1] else None
        return g_gy, g_weight, None, None, None


class _WeightGradient(Function):
    """Bilinear in x and gy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, shape: torch.Size, stride: int, tasks: int) -> Tensor:
        ctx.save_for_backward(x, gy)
        ctx.how = stride, tasks
        return _gradients(gy, x, _shape_of(shape, gy), stride, tasks, [False, True])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        x, gy = ctx.saved_tensors
        v = layout(v)
        g_x = _InputGradient.apply(gy, v, x.shape, *ctx.how) if ctx.needs_input_grad[0] else None
        g_gy = _Convolution.apply(x, v, *ctx.how) if ctx.needs_input_grad[1] else None
        return g_x, g_gy, None, None, None


# batch normalization + ReLU + max-pooling


def norm_relu_pool(x: Tensor, gain: Tensor, offset: Tensor, *, pool: int) -> Tensor:
    """pool(relu(gain · x̂ + offset)), x̂ normalized by the batch statistics of x [N, C, H, W]; gain, offset [C].

    pool: side of the max-pooling window, 1 for none. Twice differentiable. x may be in bfloat16, gain and offset in
    float32: activations and their cotangents are then kept in bfloat16, and everything is computed in float32.
    """
    return _Norm.apply(x, gain, offset, pool)


def _shape_of(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of which only the shape and the memory format are looked at."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_format(like))


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(0, 2, 3))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


class _Norm(Function):
    """y = pool(relu(gain · r · (x − mean) + offset)), with r = 1/√(variance + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, pool: int) -> Tensor:
        # the stock channels-last batch_norm sums naively: ten to a hundred times less accurate than these means
        wide = _wide(x)
        mean = _mean(wide)
        centered = wide - _per_channel(mean)
        r = torch.rsqrt(_mean(centered.square()) + EPSILON)
        y = torch.addcmul(_per_channel(offset), centered, _per_channel(gain * r), out=centered)
        winner = None
        if pool > 1:
            y, winner = aten.max_pool2d_with_indices(y, [pool, pool], [pool, pool])
        y = y.relu_().to(x.dtype)
        ctx.save_for_backward(x, gain, mean, r, y, winner)
        ctx.pool = pool
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, gain, mean, r, y, winner = ctx.saved_tensors
        return *_NormBackward.apply(x, gain, gy, mean, r, y.detach(), winner, ctx.pool), None


class _NormBackward(Function):
    """gx = gain · r · (a − A − x̂ · B), with a = gy at the winners, A and B the means of a and of a·x̂.

    A function of x, gain and gy: mean, r, y and winner come along as what they were.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, gy: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, r, y, winner, ctx.pool = saved
        wide = _wide(x)
        a = _to_winners(_wide(aten.threshold_backward(gy, y, 0)), wide, winner, ctx.pool)
        mean_a = _mean(a)
        mean_ax = (_mean(a * wide) - mean * mean_a) * r
        scale = gain * r
        gx = _affine(wide, mean, -scale * r * mean_ax, -scale * mean_a).addcmul_(a, _per_channel(scale))
        ctx.save_for_backward(x, gain, gy, mean, r, y, winner, mean_a, mean_ax)
        count = x.numel() // x.shape[1]
        return gx.to(x.dtype), mean_ax * count, mean_a * count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor, v_gain: Tensor, v_offset: Tensor) -> tuple:
        """With means V0 of vx, V1 of vx·x̂, VA of vx·a; k = v_gain − gain·r·V1 and D = VA − A·V0 − B·V1:

        d_x = r · (k · (a − A − x̂·B) − gain·r·B · (vx − V0 − x̂·V1) − gain·r·D · x̂)
        d_gain = r · count · D,   d_gy = gain·r · (vx − V0) + k · x̂ + v_offset at the winners
        """
        x, gain, gy, mean, r, y, winner, mean_a, mean_ax = ctx.saved_tensors
        dtype, x, vx = x.dtype, _wide(x), _wide(vx)
        a = _to_winners(_wide(aten.threshold_backward(gy, y, 0)), x, winner, ctx.pool)
        scale = gain * r
        v0 = _mean(vx)
        v1 = (_mean(vx * x) - mean * v0) * r
        k, d = v_gain - scale * v1, _mean(vx * a) - mean_a * v0 - mean_ax * v1
        d_x = _affine(
            x, mean, r * r * (scale * (mean_ax * v1 - d) - k * mean_ax), r * (scale * mean_ax * v0 - k * mean_a)
        )
        d_x = d_x.addcmul_(a, _per_channel(r * k)).addcmul_(vx, _per_channel(-r * scale * mean_ax))
        d_gy = _affine(x, mean, k * r, v_offset - scale * v0).addcmul_(vx, _per_channel(scale))
        d_gy = aten.threshold_backward(_at_winners(d_gy, winner), _wide(y), 0)
        count = x.numel() // x.shape[1]
        return d_x.to(dtype), r * count * d, d_gy.to(dtype), None, None, None, None, None


def _affine(x: Tensor, mean: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """factor · (x − mean) + summand, in one pass."""
    return torch.addcmul(_per_channel(summand - factor * mean), x, _per_channel(factor))


def _to_winners(pooled: Tensor, like: Tensor, winner: Tensor | None, pool: int) -> Tensor:
    """The adjoint of max-pooling."""
    if winner is None:
        return pooled
    window = [pool, pool]
    return aten.max_pool2d_with_indices_backward(layout(pooled), like, window, window, [0, 0], [1, 1], False, winner)


def _at_winners(x: Tensor, winner: Tensor | None) -> Tensor:
    """What max-pooling with these winners takes."""
    if winner is None:
        return x
    return x.flatten(2).gather(2, winner.flatten(2)).view_as(winner)
