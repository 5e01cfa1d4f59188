"""LSTM meta-learner: the update rule itself is learned, as the gates of an LSTM whose cell state is the network.

Ravi & Larochelle 2017, "Optimization as a Model for Few-Shot Learning". A step of gradient descent is the update of an
LSTM's cell, with the parameters θ as its state and the negative gradient as its candidate (eqs. 1–2):

    θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ ∇_t,    ∇_t = ∇L_t(θ_{t−1})

so the gates are learned, for every coordinate from its own gradient, the loss, its value and its previous gate
(sec. 3.1):

    i_t = σ(W_I [∇_t, L_t, θ_{t−1}, i_{t−1}] + b_I),    f_t = σ(W_F [∇_t, L_t, θ_{t−1}, f_{t−1}] + b_F)

where [∇_t, L_t] first go through an ordinary LSTM (sec. 4, "a 2-layer LSTM"), of the same weights for all coordinates
and a state for each, and before it through the preprocessing of Andrychowicz et al. 2016, "Learning to learn by
gradient descent by gradient descent", appendix A:

    x -> (log|x| / p, sgn x) where |x| ≥ e^−p, else (−1, e^p x),    p = 10

The cell's first state c_0 is learned too: it is the model's meta-parameters, the initialization. Gradients and losses
count as constants (sec. 3.2), so `first_order` is the default here, as in the paper.

It starts as gradient descent: the weights are near zero, σ(b_I) = `inner_lr` and b_F = `forget_bias`. (The paper draws
b_I from −5…−4, that is a rate about 0.01, and b_F from 4…6.) All of a support set is a step's batch; the paper draws
smaller ones where there are 5 shots.

Disadvantages: a step keeps `hidden_units`·4 numbers and more for every coordinate and task, which
`recompute_inner_steps` does not keep from step to step; what is learned is bound to the number of steps it was trained
with; without second derivatives the initialization does not know what the rule will do to it.

Shapes: T tasks · H hidden units · P coordinates, of all adapted parameters: last, so that each gate's lie together.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.algorithms.gradient_based import GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig, clipped
from pipeline.types import MetaState, Objective, Params, TaskModel

OWN = "lstm_meta_learner/"
HIDDEN, CELL, ENTER, KEEP = (OWN + name for name in ("hidden", "cell", "input_gate", "forget_gate"))
RANGE = 10.0  # p of the preprocessing
SPREAD = 0.01  # the weights start uniform in ± this


class LSTMMetaLearnerConfig(InnerLoopConfig):
    """Learned update rule; `inner_lr` is the rate that it starts with."""

    name: Literal["lstm_meta_learner"]
    inner_lr: float = Field(gt=0, lt=1)  # where the input gate starts: b_I = log(α / (1 − α))
    forget_bias: float = 6.0  # where the forget gate starts, before the sigmoid: 6 keeps 99.75 % of a parameter
    hidden_units: int = Field(default=20, ge=1)  # H of the LSTM before the gates
    first_order: bool = True

    @field_validator("inner_optimizer", "inner_momentum", "inner_weight_decay")
    @classmethod
    def _the_rule_is_learned(cls, value: Any) -> Any:
        if value not in ("sgd", 0.0):
            raise ValueError("lstm_meta_learner learns the update rule in its place: leave it out")
        return value

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> LSTMMetaLearner:
        return LSTMMetaLearner(self, model=model, objective=objective)


class LSTMMetaLearner(GradientBased):
    """Algorithm: MAML whose inner step is θ ← f ⊙ θ − i ⊙ ∇ with learned gates."""

    config: LSTMMetaLearnerConfig
    first_order_keeps_a_graph = True  # the gates' own

    def init(self, seed: int) -> MetaState:
        hidden = self.config.hidden_units
        meta = super().init(seed)
        generator = torch.Generator().manual_seed(seed)
        own: Params = {}
        shapes = {"lstm": (4 * hidden, 4 + hidden), "input_gate": (1, hidden + 2), "forget_gate": (1, hidden + 2)}
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.float64)
            own[f"{OWN}{name}.weight"] = weight.uniform_(-SPREAD, SPREAD, generator=generator)
            own[f"{OWN}{name}.bias"] = torch.zeros(shape[0], dtype=torch.float64)
        rate = self.config.inner_lr
        own[f"{OWN}input_gate.bias"] += math.log(rate / (1 - rate))
        own[f"{OWN}forget_gate.bias"] += self.config.forget_bias
        dtype = meta.params[self.adapted_names[0]].dtype
        return MetaState(meta.params | {k: v.to(dtype) for k, v in own.items()}, meta.buffers)

    def describe(self, state: MetaState) -> dict[str, float]:
        """The gates of a coordinate that has no gradient and is zero, as their biases have it."""
        gates = ("input_gate", "forget_gate")
        return {f"{OWN}{name}": float(state.params[f"{OWN}{name}.bias"].detach().sigmoid()) for name in gates}

    def _optimizer_state(self, adapted: Params) -> Params:
        """No hidden state, and no gate before the first one."""
        leaf = next(iter(adapted.values()))
        tasks, coordinates = len(leaf), sum(value[0].numel() for value in adapted.values())
        units = leaf.new_zeros(tasks, self.config.hidden_units, coordinates)
        gate = leaf.new_zeros(tasks, 1, coordinates)
        return {HIDDEN: units, CELL: units, ENTER: gate, KEEP: gate}

    def _update(
        self, adapted: Params, optimizer: Params, grads: Params, losses: Tensor, learned: Params, number: int
    ) -> tuple[Params, Params]:
        if self.config.inner_gradient_clip is not None:
            grads = clipped(grads, self.config.inner_gradient_clip)
        theta, gradient = flat(adapted), flat(grads)  # [T, 1, P]
        hidden, cell = self._lstm(learned, gradient, losses, optimizer[HIDDEN], optimizer[CELL])
        gates = {}
        for name in (ENTER, KEEP):
            inputs = torch.cat([hidden, theta, optimizer[name]], dim=1)
            gates[name] = across(learned[f"{name}.weight"], inputs, learned[f"{name}.bias"]).sigmoid()
        theta = gates[KEEP] * theta - gates[ENTER] * gradient
        return unflat(theta, adapted), {HIDDEN: hidden, CELL: cell, **gates}

    def _lstm(
        self, learned: Params, gradient: Tensor, losses: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients [T, 1, P] and losses [T] -> the hidden units and the cells of every coordinate [T, H, P]."""
        weight, bias = learned[f"{OWN}lstm.weight"], learned[f"{OWN}lstm.bias"]
        # the columns: two of the gradient, H of the hidden units, two of the loss, which is one for all coordinates
        of_loss = across(weight[..., -2:], preprocessed(losses.view(-1, 1, 1)), bias).squeeze(-1)
        gates = across(weight[..., :-2], torch.cat([preprocessed(gradient), hidden], dim=1), of_loss)
        enter, keep, leave, new = gates.chunk(4, dim=1)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell

    def _metrics(self, inner: Params) -> dict[str, Tensor]:
        """The last step's gates, their means over coordinates."""
        return {
            "lstm_input_gate": inner[ENTER].detach().mean(dim=(1, 2)).sum(),
            "lstm_forget_gate": inner[KEEP].detach().mean(dim=(1, 2)).sum(),
        }


def across(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """The same layer for every coordinate: weight [T, O, I], x [T, I, P], bias [T, O] -> [T, O, P]."""
    return torch.baddbmm(bias.unsqueeze(-1), weight, x)


def preprocessed(x: Tensor) -> Tensor:
    """x [T, 1, P] -> [T, 2, P]: its magnitude on a logarithmic scale and its sign, or, where it is tiny, itself."""
    smallest = math.exp(-RANGE)
    size = x.abs()
    large = size >= smallest
    magnitude = torch.where(large, size.clamp(min=smallest).log() / RANGE, -1.0)
    return torch.cat([magnitude, torch.where(large, x.sign(), x / smallest)], dim=1)


def flat(params: Params) -> Tensor:
    """[T, ...] each -> all coordinates [T, 1, P]."""
    return torch.cat([value.reshape(len(value), -1) for value in params.values()], dim=1).unsqueeze(1)


def unflat(coordinates: Tensor, like: Params) -> Params:
    """The reverse."""
    pieces = coordinates.squeeze(1).split([value[0].numel() for value in like.values()], dim=1)
    return {name: piece.view_as(value) for (name, value), piece in zip(like.items(), pieces, strict=True)}
