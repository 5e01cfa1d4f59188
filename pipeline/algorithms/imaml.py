"""iMAML: the meta-gradient at the solution of a regularized inner problem, whatever way led there.

Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients". The inner problem (eq. 3) keeps the
adapted parameters φ near the initialization θ: φ* = argmin_φ L_support(φ) + λ/2 ‖φ − θ‖². Its solution depends on θ
through the condition ∇L_support(φ*) + λ(φ* − θ) = 0 alone, so by the implicit function theorem (lemma 1, eq. 6)

    dφ*/dθ = (I + ∇²L_support(φ*)/λ)⁻¹,    meta-gradient = Σ_tasks (I + ∇²L_support(φ)/λ)⁻¹ ∇L_query(φ),

which a few steps of conjugate gradient on Hessian-vector products approximate (eq. 7, algorithm 2). The inner loop
keeps no graph, so memory does not grow with its steps, and any inner optimizer will do: momentum, Adam and clipping
lead to the same condition. Inner weight decay w adds wφ to it, and wI to the Hessian.

The condition holds whatever the inner problem uses besides θ, so the same product with the inverse also gives the
derivatives of what inner steps leave alone (`freeze`) and of λ: with v = (∇²L_support + λI)⁻¹ ∇L_query(φ), the gradient
by log λ is −λ vᵀ(φ − θ). `learn_regularization` learns log λ.

`cg_damping` δ is added to the matrix: (1 + δ)I + ∇²L_support/λ. Networks are not convex. Where conjugate gradient
meets a direction of no positive curvature, that task's system is left as solved up to there; if it was the first one,
with the query gradient itself, as in first-order MAML. A solution is at most LONGEST times as long as the query
gradient, which takes effect only where the Hessian has eigenvalues below −3/4 λ. The metric `cg_residual` is
‖∇L_query − Ax‖ / ‖∇L_query‖.

`eval_regularization` is λ at test, where nothing needs the condition. The authors' code has the proximal term in none
of its inner steps, but for one step of it alone after those of training; so it adapts further than λ = 2 lets it here.
It solves with 2I + ∇²L_support/(λ + 10): at λ = 2 that is `cg_damping: 11`, but for a factor that Adam does not see.

Disadvantages: all of this is true at the solution, so too few inner steps, or a λ that is small beside the curvature,
give a wrong gradient without a word; a large λ keeps a task from adapting. The Hessian is that of the support loss
under one pass's batch statistics and dropout masks. Each step of conjugate gradient costs about two inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.algorithms.episodic import Support
from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig, gradients
from pipeline.config import is_stored
from pipeline.types import Adapted, MetaState, Objective, Params, Statistics, TaskModel

LOG_LAMBDA = "imaml/log_lambda"  # [], a meta-parameter where it is learned; [T] among what steps use
LONGEST = 4.0  # times the query gradient: eigenvalues of the Hessian above −3/4 λ are left as they are
CENTRE = "imaml/centre/"  # the names of θ among what steps use


class IMAMLConfig(InnerLoopConfig):
    """Implicit MAML."""

    name: Literal["imaml"]
    regularization: float = Field(default=2.0, gt=0)  # λ, or what it starts from
    learn_regularization: bool = False  # log λ as a meta-parameter
    eval_regularization: float | None = Field(default=None, ge=0)  # λ in evaluation and serving; None: as in training
    cg_steps: int = Field(default=5, ge=1)  # of conjugate gradient
    cg_damping: float = Field(default=0.0, ge=0)  # δ: a multiple of the identity that is added to the matrix

    differentiates_steps: ClassVar[bool] = False

    @model_validator(mode="after")
    def _steps_can_converge(self, info: ValidationInfo) -> Self:
        at_test = None if is_stored(info) else self.eval_regularization  # older versions did not look at it
        for key, given in (("regularization", self.regularization), ("eval_regularization", at_test)):
            curvature = (given or 0.0) + self.inner_weight_decay
            if self.inner_optimizer == "sgd" and self.inner_lr * curvature >= 2 * (1 + self.inner_momentum):
                raise ValueError(
                    f"inner_lr ({self.inner_lr}) times {key} and inner_weight_decay ({curvature}) is at least "
                    f"{2 * (1 + self.inner_momentum):g}, so inner steps diverge by the regularization alone. Lower one "
                    "of them, well below that"
                )
        return self

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> IMAML:
        return IMAML(self, model=model, objective=objective)


class IMAML(GradientBased):
    """Algorithm: inner steps without a graph, and one linear system a task for the derivative of where they end."""

    config: IMAMLConfig

    def init(self, seed: int) -> MetaState:
        state = super().init(seed)
        if not self.config.learn_regularization:
            return state
        return MetaState({**state.params, LOG_LAMBDA: _log(self.config.regularization, state.params)}, state.buffers)

    def describe(self, state: MetaState) -> dict[str, float]:
        if LOG_LAMBDA not in state.params:
            return {}
        return {"lambda": float(state.params[LOG_LAMBDA].detach().exp())}

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        if self.config.eval_regularization is not None:
            log_lambda = _log(self.config.eval_regularization, state.params)
            state = state._replace(params={**state.params, LOG_LAMBDA: log_lambda})
        return super().adaptation_path(
            state, support_x, support_y, steps=steps, inductive=inductive, num_classes=num_classes, last_only=last_only
        )

    def _support_passes(self) -> int:
        return self.train_steps + 2  # one for the Hessian, one for inductive statistics

    def _start(self, meta_params: Params, support: Support, keys: Tensor | None) -> tuple[Params, Params]:
        inner, learned = super()._start(meta_params, support, keys)
        if LOG_LAMBDA not in learned:
            learned[LOG_LAMBDA] = _log(self.config.regularization, meta_params).expand(support.tasks)
        return inner, learned | {CENTRE + name: inner[name] for name in self.adapted_names}

    def _inner_losses(
        self, adapted: Params, learned: Params, number: int, support: Support, keys: Tensor | None
    ) -> Tensor:
        squares = [(v - learned[CENTRE + k]).square().reshape(support.tasks, -1).sum(1) for k, v in adapted.items()]
        proximal = learned[LOG_LAMBDA].exp() / 2 * torch.stack(squares).sum(0)
        return super()._inner_losses(adapted, learned, number, support, keys) + proximal

    def _adapt(
        self, meta_params: Params, buffers: Statistics, support: Support, keys: list[Tensor | None], *, step: int
    ) -> tuple[Adapted, dict[str, Tensor]]:
        *of_steps, at_end, on_support = keys
        inner, learned = self._start(meta_params, support, of_steps[0])
        constants = {k: v.detach() for k, v in learned.items()}
        for number, of_step in enumerate(of_steps):
            inner = self._step_without_graph(inner, constants, number, support, of_step)
        metrics: dict[str, Tensor] = {}  # there once the meta-gradient is

        def condition(adapted: Params, learned: Params) -> Params:
            """What is zero at the solution: the inner problem's gradient, with a graph."""
            losses = self._inner_losses(adapted, learned, self.train_steps, support, at_end)
            grads = gradients(losses.sum(), adapted, create_graph=True)
            return {k: g + self.config.inner_weight_decay * adapted[k] for k, g in grads.items()}

        def solve(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
            """The condition's derivative by φ is a matrix; its inverse times b [T, P]."""
            scale = constants[LOG_LAMBDA].exp().unsqueeze(1)
            x, residual = conjugate_gradient(
                lambda p: product(p) / scale + self.config.cg_damping * p, b, steps=self.config.cg_steps
            )
            norm = torch.linalg.vector_norm(b, dim=1).clamp(min=torch.finfo(b.dtype).tiny)
            metrics["cg_residual"] = (torch.linalg.vector_norm(residual, dim=1) / norm).sum()
            return x / scale

        names = self.adapted_names
        end = _Implicit.apply(condition, solve, names, list(learned), *(inner[k] for k in names), *learned.values())
        params = self._params(dict(zip(names, end, strict=True)), learned, self.train_steps)
        return self._adapted(
            params, buffers, support, inductive=self._inductive, step=self.train_steps, keys=on_support
        ), metrics


class _Implicit(Function):
    """Adapted parameters as a function of what the inner problem uses, at a point where its condition holds."""

    @staticmethod
    def forward(ctx: Any, condition: Any, solve: Any, names: list[str], learned: list[str], *values: Tensor) -> Any:
        """values: the adapted parameters [T, ...] by `names`, then what the inner problem uses by `learned`."""
        ctx.condition, ctx.solve, ctx.names, ctx.learned = condition, solve, names, learned
        ctx.save_for_backward(*values)
        return tuple(value.clone() for value in values[: len(names)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        adapted, used = ctx.saved_tensors[: len(ctx.names)], ctx.saved_tensors[len(ctx.names) :]
        asked = ctx.needs_input_grad[4 + len(ctx.names) :]
        with torch.enable_grad():
            adapted = [value.detach().requires_grad_() for value in adapted]
            used = [value.detach().requires_grad_(needed) for value, needed in zip(used, asked, strict=True)]
            named = dict(zip(ctx.names, adapted, strict=True)), dict(zip(ctx.learned, used, strict=True))
            condition = list(ctx.condition(*named).values())

        def product(p: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(condition, adapted, _like(p, adapted), retain_graph=True))

        v = ctx.solve(product, _flat(cotangents))
        wanted = [value for value in used if value.requires_grad]
        through = torch.autograd.grad(condition, wanted, _like(-v, adapted), allow_unused=True)
        grads = iter(through)
        return *(None for _ in range(4 + len(adapted))), *(next(grads) if needed else None for needed in asked)


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Approximately A⁻¹b and what is left of b, for a symmetric matrix A of each task: b [T, P], `product` p ↦ Ap.

    Hestenes & Stiefel 1952, from zero. A task whose direction has no positive curvature stops where it is; at the first
    direction, which is b, at b. So does one that would get longer than LONGEST times b, where it gets as long (Steihaug
    1983): iterates grow in length, and the solution is no longer than b where the Hessian has no negative eigenvalue.
    The host never looks.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    left = residual.square().sum(1)  # [T]
    bound = LONGEST**2 * left
    going = torch.ones_like(left, dtype=torch.bool)
    for number in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(1)
        going = going & (curvature > 0)
        length = torch.where(going, left / torch.where(going, curvature, 1.0), 1.0 if number == 0 else 0.0)
        # the length at which ‖x + length·direction‖² = bound
        square, along = direction.square().sum(1), (x * direction).sum(1)
        room = (bound - x.square().sum(1)).clamp(min=0)
        furthest = room / (along + (along.square() + square * room).sqrt()).clamp(min=torch.finfo(b.dtype).tiny)
        too_long = going & (length > furthest)
        length, going = torch.where(too_long, furthest, length), going & ~too_long
        x = x + length.unsqueeze(1) * direction
        residual = residual - length.unsqueeze(1) * image
        before, left = left, residual.square().sum(1)
        turn = torch.where(before > 0, left / torch.where(before > 0, before, 1.0), 0.0)
        direction = residual + turn.unsqueeze(1) * direction
    return x, residual


def _flat(values: tuple[Tensor, ...]) -> Tensor:
    """[T, ...] each -> [T, P]."""
    return torch.cat([value.reshape(len(value), -1) for value in values], dim=1)


def _like(flat: Tensor, values: list[Tensor]) -> list[Tensor]:
    """[T, P] -> of the shapes of `values`, [T, ...] each."""
    pieces = flat.split([value[0].numel() for value in values], dim=1)
    return [piece.reshape(value.shape) for piece, value in zip(pieces, values, strict=True)]


def _log(number: float, params: Params) -> Tensor:
    """log(number), a scalar of the kind of the parameters; −∞ for 0."""
    leaf = next(iter(params.values()))
    return torch.full((), math.log(number) if number else -math.inf, dtype=leaf.dtype, device=leaf.device)
