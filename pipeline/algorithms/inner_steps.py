"""Differentiable inner steps: with their graph kept, or recomputed so that memory does not grow with their number.

A step is a function of named tensors (parameters, an inner optimizer's state, learned rates) to the new values of those
that it changes. Its vector-Jacobian product needs the step's inputs and nothing else, so keeping those and running the
step once more in the backward pass gives the same meta-gradient as the whole unrolled graph, for about one more
evaluation of each inner gradient (Shaban et al. 2019, "Truncated Back-propagation for Bilevel Optimization", sec. 2,
reverse mode with checkpoints; for one SGD step the product is v − α·Hv).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.types import Params


class InnerStep(Protocol):
    def __call__(self, state: Params, learned: Params, step: int, *, create_graph: bool) -> Params:
        """The new `state`, with the same names and shapes.

        state: what steps change: adapted parameters, momentum. learned: what they only use: rates. Every tensor that
        the meta-gradient should reach must be in one of them. step: 0, 1, … create_graph: of the inner gradient;
        without it the inner gradient counts as a constant (first order).
        """
        ...


def path(
    step: InnerStep,
    state: Params,
    steps: int,
    *,
    learned: Params | None = None,
    first_order: bool = False,
    recompute: bool = False,
    first_order_keeps_a_graph: bool = False,
) -> Iterator[Params]:
    """The state after 0, 1, … `steps` inner steps, differentiable with respect to `state` and `learned`.

    recompute: keep each step's inputs only. First order mostly keeps no graph of a step's inside anyway, and is then
    left as it is; `first_order_keeps_a_graph` says that it does (of a learned update rule, say).
    """
    learned = learned or {}
    yield state
    for number in range(steps):
        if recompute and (first_order_keeps_a_graph or not first_order):
            state = _recomputed(step, number, state, learned, first_order)
        else:
            state = step(state, learned, number, create_graph=not first_order)
        yield state


def last(states: Iterator[Params]) -> Params:
    """The last state. The ones before it are not held meanwhile."""
    return deque(states, maxlen=1).pop()


def _recomputed(step: InnerStep, number: int, state: Params, learned: Params, first_order: bool) -> Params:
    names = list(state), list(learned)
    values = _RecomputedStep.apply(step, number, first_order, *names, *state.values(), *learned.values())
    return dict(zip(state, values, strict=True))


class _RecomputedStep(Function):
    """One step, of which the inputs and the state of the random generators are kept. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        step: InnerStep,
        number: int,
        first_order: bool,
        names: list[str],
        learned_names: list[str],
        *values: Tensor,
    ) -> Any:
        ctx.step, ctx.number, ctx.names, ctx.learned_names = step, number, names, learned_names
        ctx.first_order = first_order
        ctx.random = _random_state(values)
        ctx.save_for_backward(*values)
        with torch.enable_grad():
            state = _run(ctx, [value.detach().requires_grad_() for value in values], create_graph=False)
        return tuple(state[name].detach() for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        with torch.enable_grad(), _replayed(ctx.random):
            inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
            state = _run(ctx, inputs, create_graph=not ctx.first_order)
            reached = [(state[name], v) for name, v in zip(ctx.names, cotangents, strict=True)]
            reached = [(value, v) for value, v in reached if value.requires_grad]
            outputs, vectors = zip(*reached, strict=True)
            grads = torch.autograd.grad(outputs, inputs, vectors, allow_unused=True)
        return None, None, None, None, None, *grads


def _run(ctx: Any, inputs: list[Tensor], *, create_graph: bool) -> Params:
    state = dict(zip(ctx.names, inputs, strict=False))
    learned = dict(zip(ctx.learned_names, inputs[len(ctx.names) :], strict=True))
    return ctx.step(state, learned, ctx.number, create_graph=create_graph)


def _random_state(values: tuple[Tensor, ...]) -> tuple[Tensor, dict[torch.device, Tensor]]:
    devices = {value.device for value in values if value.is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


@contextmanager
def _replayed(random: tuple[Tensor, dict[torch.device, Tensor]]) -> Iterator[None]:
    """Random numbers as they were drawn in the forward pass; afterwards the generators are where they had been."""
    on_cpu, on_cuda = random
    with torch.random.fork_rng(devices=list(on_cuda)):
        torch.set_rng_state(on_cpu)
        for device, state in on_cuda.items():
            torch.cuda.set_rng_state(state, device)
        yield
