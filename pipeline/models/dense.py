"""Fully connected layers with ReLU between them, over a leading task axis, as an op closed under differentiation.

Small layers cost what their ops cost to launch, and PyTorch's own derivatives of a derivative launch many: views,
sums and masks for every product. Written out, a second-order inner step takes half as many.

Layers l = 1 … L, with h_0 = x:  a_l = h_{l−1} W_lᵀ + b_l,  h_l = relu(a_l) for l < L,  output a_L.

    forward          x, W, b -> a_L, h_1 … h_{L−1}
    its gradients    g_{l−1} = mask_{l−1} · (g_l W_l + cotangent of h_{l−1}),  ∂W_l = g_lᵀ h_{l−1},  ∂b_l = Σ_N g_l
    their adjoint    u_l = h_{l−1} v_lᵀ + w_l + (mask_{l−1} · u_{l−1}) W_lᵀ, for cotangents v_l of ∂W_l, w_l of ∂b_l

The hidden layers are outputs, so that the adjoint can hand back a cotangent for them and the chain closes: the second
derivative is one more pass of the first op. A third derivative is refused.

Shapes: T tasks · N examples · I, O units into and out of a layer; W [T, O, I] · b [T, O] · h, a, g, u [T, N, units].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """x [T, N, I] -> [T, N, O of the last layer]. The inputs x are data: no gradient goes to them.

    Raises ValueError: x requires a gradient.
    """
    if x.requires_grad:
        raise ValueError("dense: x requires a gradient, and this op has none for its inputs")
    return _Dense.apply(len(weights), x, *weights, *biases)[0]


class _Dense(Function):
    @staticmethod
    def forward(ctx: Any, count: int, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        weights, biases = params[:count], params[count:]
        layers = [x]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            layers.append(_affine(layers[-1], weight, bias).relu_())
        ctx.count = count
        ctx.save_for_backward(*weights, *layers)
        ctx.set_materialize_grads(False)
        return _affine(layers[-1], weights[-1], biases[-1]), *layers[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *g_hidden: Tensor | None) -> tuple:
        if g is None:  # the loss does not depend on the outputs; the hidden layers may still have cotangents
            last_weight, last_layer = ctx.saved_tensors[ctx.count - 1], ctx.saved_tensors[-1]
            g = last_layer.new_zeros(*last_layer.shape[:2], last_weight.shape[1])
        return None, None, *_DenseGradients.apply(ctx.count, g, *g_hidden, *ctx.saved_tensors)


class _DenseGradients(Function):
    @staticmethod
    def forward(ctx: Any, count: int, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        g_hidden, weights, layers = rest[: count - 1], rest[count - 1 : 2 * count - 1], rest[2 * count - 1 :]
        gradients = [g]  # with respect to a_L, …, a_1
        for weight, layer, extra in zip(weights[:0:-1], layers[:0:-1], g_hidden[::-1], strict=True):
            below = torch.bmm(g, weight) if extra is None else torch.bmm(g, weight).add_(extra)
            g = torch.ops.aten.threshold_backward(below, layer, 0)
            gradients.append(g)
        gradients.reverse()
        ctx.count = count
        ctx.has_extra = [extra is not None for extra in g_hidden]
        ctx.save_for_backward(*weights, *layers, *gradients)
        by_weight = [torch.bmm(g.transpose(1, 2), layer) for g, layer in zip(gradients, layers, strict=True)]
        return *by_weight, *(g.sum(1) for g in gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        count, saved = ctx.count, ctx.saved_tensors
        weights, layers, gradients = saved[:count], saved[count : 2 * count], saved[2 * count :]
        u = _affine(layers[0], cotangents[0], cotangents[count])
        by_hidden: list[Tensor | None] = []
        by_layer: list[Tensor] = []
        by_weight: list[Tensor | None] = [None]
        for i in range(1, count):
            u = torch.ops.aten.threshold_backward(u, layers[i], 0)
            by_hidden.append(u if ctx.has_extra[i - 1] else None)  # the cotangent of h_i was added where u arrives
            by_weight.append(torch.bmm(gradients[i].transpose(1, 2), u))
            by_layer.append(torch.bmm(gradients[i], cotangents[i]))
            u = _affine(u, weights[i], cotangents[count + i]).add_(torch.bmm(layers[i], cotangents[i].transpose(1, 2)))
        return None, u, *by_hidden, *by_weight, None, *by_layer


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The bias is added in place: `baddbmm` first writes it into every row, which takes longer."""
    return torch.bmm(x, weight.transpose(1, 2)).add_(bias.unsqueeze(1))
