"""Sums of embeddings over a leading task axis, as an op closed under differentiation.

PyTorch's embedding_bag has no second derivative, and F.embedding with a sum holds every token's vector. A sum of
rows is linear in the table, so its gradient is the transposed sum, whose gradient is the sum again: two ops that are
each other's derivative, to any order. A table that was expanded over tasks is read once and never copied.

Shapes: T tasks · N examples · L tokens · V rows of the table · D; table [T, V, D] · rows int64 [T, N, L].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

PADDING = 0  # a row that is left out of every sum


def bag(table: Tensor, rows: Tensor) -> Tensor:
    """table [T, V, D] and row numbers [T, N, L] -> sums of its rows [T, N, D], but for those of number 0."""
    return _Sum.apply(table, rows)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.height = table.shape[1]
        tasks, examples, _ = rows.shape
        one = table.stride(0) == 0
        numbers = rows if one else _side_by_side(rows, ctx.height)
        flat = table[0] if one else table.flatten(0, 1)
        sums = F.embedding_bag(numbers.flatten(0, 1), flat, mode="sum", padding_idx=PADDING)
        return sums.view(tasks, examples, -1)

    @staticmethod
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Spread.apply(sums, rows, ctx.height), None


class _Spread(Function):
    """sums [T, N, D] -> [T, V, D]: every row's sum over the tokens that name it."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, rows: Tensor, height: int) -> Tensor:
        ctx.save_for_backward(rows)
        tasks, _, tokens = rows.shape
        each = sums.unsqueeze(2).expand(-1, -1, tokens, -1).contiguous()
        # sorted on a GPU, where index_add would add in another order each time
        spread = torch.ops.aten.embedding_dense_backward(
            each, _side_by_side(rows, height), tasks * height, PADDING, False
        )
        return spread.view(tasks, height, -1)

    @staticmethod
    def backward(ctx: Any, table: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Sum.apply(table, rows), None, None


def _side_by_side(rows: Tensor, height: int) -> Tensor:
    """Row numbers in the tables of all tasks, one below the other; the padding stays row 0."""
    offsets = torch.arange(len(rows), device=rows.device).view(-1, 1, 1) * height
    return torch.where(rows == PADDING, PADDING, rows + offsets)
