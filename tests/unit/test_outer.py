"""The outer update: schedules against closed forms, optimizers and plateaus against torch's own."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.outer import OuterConfig, Plateau, make_optimizer, outer_lr, update
from pipeline.types import Params

RATE, FINAL, STEPS, WARMUP = 0.2, 0.05, 101, 10


def rate_at(step: int, steps: int = STEPS, scale: float = 1.0, **options: Any) -> float:
    return outer_lr(OuterConfig(outer_lr=RATE, final_lr_fraction=FINAL, **options), step, steps, Plateau(scale=scale))


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("constant", RATE, RATE),
        ("linear", RATE * (1 + FINAL) / 2, RATE * FINAL),
        ("cosine", RATE * (1 + FINAL) / 2, RATE * FINAL),
        ("exponential", RATE * math.sqrt(FINAL), RATE * FINAL),
    ],
)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_first_middle_and_last_step(schedule: str, middle: float, last: float, warmup: int) -> None:
    steps = STEPS + warmup
    rates = [rate_at(step, steps, schedule=schedule, warmup_steps=warmup) for step in range(steps)]
    assert rates[warmup] == pytest.approx(RATE, rel=1e-12)
    assert rates[warmup + (STEPS - 1) // 2] == pytest.approx(middle, rel=1e-12)
    assert rates[-1] == pytest.approx(last, rel=1e-12)
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    assert rates[:warmup] == pytest.approx([RATE * (i + 1) / warmup for i in range(warmup)], rel=1e-12)


def test_schedules_at_a_quarter() -> None:
    """The middle alone would not tell a cosine from a line."""
    quarter = (STEPS - 1) // 4
    assert rate_at(quarter, schedule="linear") == pytest.approx(RATE * (3 + FINAL) / 4, rel=1e-12)
    cosine = RATE * (FINAL + (1 - FINAL) * (1 + math.sqrt(0.5)) / 2)
    assert rate_at(quarter, schedule="cosine") == pytest.approx(cosine, rel=1e-12)
    assert rate_at(quarter, schedule="exponential") == pytest.approx(RATE * FINAL**0.25, rel=1e-12)


def test_linear_to_zero_is_reptiles_schedule() -> None:
    """ε·(1 − i/n) for i = 0 … n, in n + 1 steps; a power never gets to 0."""
    config = OuterConfig(outer_lr=RATE, schedule="linear", final_lr_fraction=0)
    rates = [outer_lr(config, step, STEPS, Plateau()) for step in range(STEPS)]
    assert rates == pytest.approx([RATE * (1 - i / (STEPS - 1)) for i in range(STEPS)], rel=1e-12, abs=1e-15)
    with pytest.raises(ValueError, match="final_lr_fraction: 0 is not reached by schedule: exponential"):
        OuterConfig(schedule="exponential", final_lr_fraction=0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential", "plateau"])
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 50), warmup=st.integers(0, 60), step=st.integers(0, 60))
def test_no_step_has_a_rate_outside_its_bounds(schedule: str, steps: int, warmup: int, step: int) -> None:
    """One-step runs, warm-ups longer than the run and steps beyond its end included."""
    rate = rate_at(step, steps, schedule=schedule, warmup_steps=warmup)
    assert min(FINAL, 1 / max(1, warmup)) * RATE * (1 - 1e-12) <= rate <= RATE * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(
    improved=st.lists(st.booleans(), max_size=40),
    patience=st.integers(0, 4),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_plateau_agrees_with_torch(improved: list[bool], patience: int, factor: float) -> None:
    config = OuterConfig(
        schedule="plateau", outer_lr=RATE, final_lr_fraction=FINAL, plateau_factor=factor, plateau_patience=patience
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, threshold=0, min_lr=RATE * FINAL, eps=0
    )
    plateau, loss = Plateau(), 0.0
    reference.step(loss)
    for better in improved:
        loss -= better
        reference.step(loss)
        plateau.after_validation(config, improved=better)
        assert outer_lr(config, 3, 10, plateau) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert Plateau(**plateau.to_dict()) == plateau


def test_plateau_leaves_other_schedules_alone() -> None:
    plateau = Plateau()
    for _ in range(20):
        plateau.after_validation(OuterConfig(schedule="cosine", plateau_patience=0), improved=False)
    assert plateau == Plateau()
    assert rate_at(3, scale=0.5) == RATE


def test_momentum_without_sgd_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum \(0.9\) is for optimizer: sgd; adam has its own"):
        OuterConfig(momentum=0.9)


def random_params(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (4, 3), "bias": (4,), "scalar": ()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def global_norm(grads: Params) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).norm())


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"optimizer": "sgd"}, (torch.optim.SGD, {})),
        (
            {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
            (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        ),
        ({"optimizer": "adam"}, (torch.optim.Adam, {})),
        ({"optimizer": "adam", "weight_decay": 0.1}, (torch.optim.Adam, {"weight_decay": 0.1})),
        ({"optimizer": "adamw", "weight_decay": 0.1}, (torch.optim.AdamW, {"weight_decay": 0.1})),
        ({"optimizer": "adamw"}, (torch.optim.AdamW, {"weight_decay": 0.0})),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_equal_torchs_own(options: dict[str, Any], reference: Any, clip: float | None) -> None:
    """Five steps, each with its own rate and gradient."""
    config = OuterConfig(gradient_clip=clip, **options)
    params, theirs = random_params(0), random_params(0)
    optimizer = make_optimizer(config, params)
    kind, arguments = reference
    their_optimizer = kind(list(theirs.values()), lr=1.0, **arguments)
    for step in range(5):
        lr, grads = 0.1 / (step + 1), random_params(step + 1)
        kept = {name: g.clone() for name, g in grads.items()}
        norm = update(config, optimizer, params, grads, lr=lr)
        assert float(norm) == pytest.approx(global_norm(kept), rel=1e-12)
        for name, leaf in theirs.items():
            leaf.grad = kept[name].clone()
            assert grads[name].equal(kept[name]), "the caller's gradient was changed"
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        their_optimizer.param_groups[0]["lr"] = lr
        their_optimizer.step()
        for name in params:
            # torch divides by the norm + 1e-6 where it clips
            torch.testing.assert_close(params[name], theirs[name], rtol=1e-12 if clip is None else 1e-5, atol=1e-12)
            assert params[name].grad is None


@settings(max_examples=40, deadline=None)
@given(clip=st.floats(1e-4, 1e4), size=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_clipping_gives_exactly_the_bound(clip: float, size: float, seed: int) -> None:
    """With SGD and rate 1 the step is the clipped gradient: same direction, norm min(norm, bound)."""
    grads = {name: g * size for name, g in random_params(seed).items()}
    params = {name: torch.zeros_like(g) for name, g in grads.items()}
    config = OuterConfig(optimizer="sgd", gradient_clip=clip)
    norm = float(update(config, make_optimizer(config, params), params, grads, lr=1.0))
    assert global_norm(params) == pytest.approx(min(norm, clip), rel=1e-9)
    for name in params:
        torch.testing.assert_close(-params[name], grads[name] * min(1.0, clip / norm), rtol=1e-9, atol=0)


def test_a_gradient_of_zeros_can_be_clipped() -> None:
    params = random_params(0)
    before = {name: p.clone() for name, p in params.items()}
    config = OuterConfig(optimizer="sgd", gradient_clip=1.0)
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    assert float(update(config, make_optimizer(config, params), params, zeros, lr=1.0)) == 0
    assert all(params[name].equal(before[name]) for name in params)
