"""The outer optimizer and its learning-rate schedule, all of whose state is checkpointed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor

from pipeline.config import Section, is_stored
from pipeline.types import Params


class OuterConfig(Section):
    """The outer update."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    outer_lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)  # sgd only
    schedule: Literal["constant", "linear", "cosine", "exponential", "plateau"] = "constant"
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    # linear, cosine and exponential: share of outer_lr left at the last step; plateau: the share below which it stops
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=5, ge=0)  # validations without a new best before the rate is reduced
    warmup_steps: int = Field(default=0, ge=0)  # linear from outer_lr / warmup_steps
    gradient_clip: float | None = Field(default=None, gt=0)  # bound on the meta-gradient's global norm

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self, info: ValidationInfo) -> OuterConfig:
        if self.momentum and self.optimizer != "sgd" and not is_stored(info):
            raise ValueError(f"momentum ({self.momentum}) is for optimizer: sgd; {self.optimizer} has its own")
        return self

    @model_validator(mode="after")
    def _no_power_reaches_zero(self) -> OuterConfig:
        if self.schedule == "exponential" and self.final_lr_fraction == 0:
            raise ValueError(
                "final_lr_fraction: 0 is not reached by schedule: exponential. Set it above 0, or the schedule to "
                "linear or cosine"
            )
        return self


def make_optimizer(config: OuterConfig, params: Params) -> torch.optim.Optimizer:
    """The outer optimizer over the meta-parameters (its learning rate is set at every step)."""
    leaves = list(params.values())
    on_gpu = leaves[0].is_cuda  # there Adam must count its steps on the device too
    if config.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=config.outer_lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(leaves, lr=config.outer_lr, weight_decay=config.weight_decay, capturable=on_gpu)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put a checkpoint's optimizer state into this one, in place. Where its counters live follows this device."""
    groups = []
    for own, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        groups.append({**theirs, **{key: own[key] for key in ("capturable",) if key in own}})
    optimizer.load_state_dict({**saved, "param_groups": groups})


@dataclass
class Plateau:
    """Reduce-on-plateau: the rate is multiplied by `plateau_factor` after more than `plateau_patience` validations
    in a row without a new best."""

    scale: float = 1.0
    bad_validations: int = 0

    def after_validation(self, config: OuterConfig, *, improved: bool) -> None:
        if config.schedule != "plateau":
            return
        self.bad_validations = 0 if improved else self.bad_validations + 1
        if self.bad_validations > config.plateau_patience:
            self.scale = max(self.scale * config.plateau_factor, config.final_lr_fraction)
            self.bad_validations = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outer_lr(config: OuterConfig, step: int, total_steps: int, plateau: Plateau) -> float:
    """The rate of outer step `step` (from 0): a pure function of the step and the plateau state."""
    rate = config.outer_lr
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.schedule == "linear":
        return rate * (1 - (1 - config.final_lr_fraction) * progress)
    if config.schedule == "cosine":
        return rate * (
            config.final_lr_fraction + (1 - config.final_lr_fraction) * (1 + math.cos(math.pi * progress)) / 2
        )
    if config.schedule == "exponential":
        return rate * config.final_lr_fraction**progress
    if config.schedule == "plateau":
        return rate * plateau.scale
    return rate


def update(
    config: OuterConfig, optimizer: torch.optim.Optimizer, params: Params, grads: Params, *, lr: float
) -> Tensor:
    """One outer update, in place on `params`. Returns the gradient's norm before clipping."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
    if config.gradient_clip is not None:
        scale = (config.gradient_clip / (norm.to(torch.float64) + 1e-12)).clamp(max=1.0)
        grads = {name: g * scale.to(g.dtype) for name, g in grads.items()}
    for name, leaf in params.items():
        leaf.grad = grads[name]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def update_where(
    finite: Tensor, config: OuterConfig, optimizer: torch.optim.Optimizer, params: Params, grads: Params, *, lr: float
) -> Tensor:
    """As `update` where `finite` (bool, scalar) holds; else parameters and optimizer stay. The host does not look."""
    leaves = list(params.values())
    before = [leaf.detach().clone() for leaf in leaves]
    state_before = {
        (leaf, name): value.clone()
        for leaf in leaves
        for name, value in optimizer.state[leaf].items()
        if isinstance(value, Tensor)
    }
    norm = update(config, optimizer, params, grads, lr=lr)
    with torch.no_grad():
        for leaf, old in zip(leaves, before, strict=True):
            leaf.copy_(torch.where(finite, leaf, old))
            for name, value in optimizer.state[leaf].items():
                if isinstance(value, Tensor):  # all of it starts as zeros
                    was = state_before.get((leaf, name))
                    value.copy_(torch.where(finite, value, torch.zeros_like(value) if was is None else was))
    return norm
