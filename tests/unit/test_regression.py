"""Random functions against what they are in closed form. Shapes: T tasks · N points · I inputs · D outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.tasks.regression import RegressionConfig, RegressionTasks

POINTS = {"k_shot": 30, "n_query": 30, "eval_k_shot": 30, "eval_n_query": 30}


def family(function: str, **options: Any) -> RegressionTasks:
    content = {"family": "regression", "function": function, **POINTS, **options}
    config = validate(RegressionConfig, content, source="test")
    return config.build(device=torch.device("cpu"), dtype=torch.float64)


def points(tasks: RegressionTasks, split: Any = "meta_train") -> tuple[Tensor, Tensor]:
    """x [T, N, I] and y [T, N, D] of support and query sets together."""
    batch = tasks.sample(split, 0, torch.arange(100), seed=0)
    return torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)


def fitted(basis: Tensor, y: Tensor) -> Tensor:
    """The coefficients [T, B, D] of y in a basis [T, N, B], which must give it exactly."""
    solution = torch.linalg.lstsq(basis, y).solution
    assert float((basis @ solution - y).abs().max()) < 1e-9
    return solution


def assert_fills(values: Tensor, low: float, high: float) -> None:
    """Uniform draws of a range: nothing outside, and something near both ends."""
    margin = 0.05 * (high - low)
    assert low - 1e-9 <= float(values.min()) < low + margin
    assert high - margin < float(values.max()) <= high + 1e-9


def test_sinusoids() -> None:
    x, y = points(family("sinusoid", num_outputs=3, ranges={"frequency": [1.5, 1.5], "amplitude": [1, 2]}))
    coefficients = fitted(torch.cat([torch.sin(1.5 * x), torch.cos(1.5 * x)], -1), y)
    assert_fills(coefficients.norm(dim=1), 1, 2)
    assert_fills(torch.atan2(-coefficients[:, 1], coefficients[:, 0]), 0, torch.pi)
    assert float(coefficients[:, :, 0].sub(coefficients[:, :, 1]).abs().max()) > 1, (
        "outputs have functions of their own"
    )
    assert_fills(x, -5, 5)


def test_frequencies_fill_their_range() -> None:
    tasks = family("sinusoid", ranges={"amplitude": [1, 1], "phase": [0, 0], "input": [0.5, 0.5]})
    at = points(tasks)[1][:, 0, 0]  # sin(ω / 2), increasing for ω up to 2
    assert_fills(2 * torch.asin(at), 0.5, 2)


def test_lines() -> None:
    x, y = points(family("linear", num_inputs=3, num_outputs=2, ranges={"slope": [-1, 4]}))
    coefficients = fitted(torch.cat([x, torch.ones_like(x[..., :1])], -1), y)
    assert coefficients.shape == (100, 4, 2)
    assert_fills(coefficients[:, :3], -1, 4)
    assert_fills(coefficients[:, 3], -3, 3)


def test_harmonics() -> None:
    x, y = points(family("harmonic", num_outputs=2, ranges={"frequency": [0.7, 0.7]}))
    angle = 0.7 * x
    basis = [torch.sin(angle), torch.cos(angle), torch.sin(2 * angle), torch.cos(2 * angle)]
    coefficients = fitted(torch.cat(basis, -1), y)
    for tone in (coefficients[:, :2], coefficients[:, 2:]):
        assert 1.8 < float(tone.norm(dim=1).max()) <= 2 + 1e-9


def test_steps() -> None:
    x, y = points(family("step", edges=3, num_outputs=2))
    order = x.squeeze(-1).argsort(dim=1)
    along = y.gather(1, order.unsqueeze(-1).expand_as(y))
    jumps = (along.diff(dim=1) != 0).sum(1)
    assert int(jumps.min()) > 0
    assert int(jumps.max()) == 3
    assert_fills(y, -3, 3)


def test_meta_test_has_ranges_of_its_own() -> None:
    tasks = family("linear", ranges={"slope": [0, 1]}, test_ranges={"slope": [5, 6], "input": [7, 9]})
    for split, slopes, inputs in (
        ("meta_train", (0, 1), (-5, 5)),
        ("meta_val", (0, 1), (-5, 5)),
        ("meta_test", (5, 6), (7, 9)),
    ):
        x, y = points(tasks, split)
        assert_fills(x, *inputs)
        assert_fills(fitted(torch.cat([x, torch.ones_like(x)], -1), y)[:, 0], *slopes)
    assert tasks.config.verify() != family("linear", ranges={"slope": [0, 1]}).config.verify()


def test_noise_is_on_what_is_observed() -> None:
    options: dict[str, Any] = {"num_outputs": 2}
    noisy, clean = family("linear", noise=0.5, **options), family("linear", **options)
    for split in ("meta_train", "meta_test"):
        ours, theirs = (tasks.sample(split, 0, torch.arange(300), seed=0) for tasks in (noisy, clean))
        assert torch.equal(ours.support_x, theirs.support_x)
        on_support, on_queries = ours.support_y - theirs.support_y, ours.query_y - theirs.query_y
        assert abs(float(on_support.std()) - 0.5) < 0.02
        assert abs(float(on_support.mean())) < 0.02
        assert float(on_queries.std()) == (0 if split == "meta_test" else pytest.approx(0.5, abs=0.02))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranges": {"slope": [0, 1]}}, r"ranges\.slope: function sinusoid has input, amplitude"),
        ({"test_ranges": {"phase": [2, 1]}}, r"test_ranges\.phase: should be \[lowest, highest\]"),
        ({"num_inputs": 2}, "num_inputs: sinusoid is a function of one number"),
    ],
)
def test_ranges_that_are_none_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        family("sinusoid", **options)
