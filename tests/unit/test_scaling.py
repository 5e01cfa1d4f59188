"""The cost model of infra/scaling: its limits, its agreement with the simulation, and its fit to what was measured."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "infra" / "scaling"))  # it is run as a folder, `python infra/scaling`

import fit as fitting
from cost_model import Compute, Cost, Feed, Network, Occasional, Setting, cost, expected_slowest, shares
from disagreement import GRID, compare
from saturation import saturation
from scenarios import SCENARIOS, row_groups_touched
from step_simulation import simulate

TOLERANCE = 0.01  # closed form against simulation, beyond the simulation's own 95 % interval

settings_ = st.builds(
    Setting,
    workers=st.integers(1, 40),
    meta_batch_size=st.integers(1, 100),
    gradient_bytes=st.floats(1e3, 1e8),
    compute=st.builds(Compute, st.floats(1e-4, 1), st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5])),
    network=st.builds(Network, st.floats(1e7, 1e12), st.floats(0, 1e-2)),
    feed=st.builds(Feed, st.floats(0, 1e7), st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.integers(1, 8)),
    occasional=st.builds(Occasional, st.integers(1, 1000), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 10)),
    sharing=st.floats(1, 4),
)


@pytest.mark.parametrize("title", GRID)
def test_closed_form_and_simulation_agree(title: str) -> None:
    found = compare(GRID[title])
    assert abs(found.closed - found.simulated) <= TOLERANCE * found.simulated + found.half_width


@given(setting=settings_)
@settings(max_examples=60, deadline=None)
def test_without_noise_they_agree_exactly(setting: Setting) -> None:
    """Any shares, any ring; a feed of whole nodes, whose busiest node the closed form knows."""
    quiet = setting.with_(compute=replace(setting.compute, cv=0.0), feed=replace(setting.feed, workers_per_node=1))
    found = cost(quiet)
    assert simulate(quiet, steps=1).mean == pytest.approx(found.step - found.occasional, rel=1e-9)


def test_the_ring_in_the_limit_without_computing() -> None:
    nothing = Compute(0.0, 0.0)
    for workers in (2, 3, 8, 1024):
        setting = Setting(workers, workers, 1e6, nothing, Network(1e9, 1e-5))
        expected = 2 * (workers - 1) / workers * 1e6 / 1e9 + 2 * (workers - 1) * 1e-5
        assert cost(setting).step == pytest.approx(expected, rel=1e-12)
        if workers < 10:
            assert simulate(setting, steps=1).all_reduce == pytest.approx(expected, rel=1e-9)
    alone = Setting(1, 4, 1e6, Compute(0.5, 0.25), Network(1e9, 1e-5))
    assert cost(alone).step == 4 * 0.5 + 0.25


@pytest.mark.parametrize(("cv", "workers"), [(0.1, 2), (0.1, 64), (0.5, 4), (0.02, 1024)])
def test_the_slowest_workers_expectation(cv: float, workers: int) -> None:
    """Against plain sampling."""
    setting = Setting(workers, workers, 1.0, Compute(1.0, 0.0, cv), Network(1.0, 0.0))
    sigma = math.sqrt(math.log(1 + cv**2))
    drawn = np.random.default_rng(0).lognormal(-(sigma**2) / 2, sigma, (4_000_000 // workers, workers)).max(axis=1)
    assert expected_slowest(setting) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(len(drawn)))


@given(tasks=st.integers(1, 300), workers=st.integers(1, 64))
def test_shares_are_dealt_as_in_training(tasks: int, workers: int) -> None:
    import torch

    from pipeline.training.context import LocalContext
    from pipeline.training.step import slots_of_rank

    context = LocalContext()
    context.world_size = workers
    dealt = []
    for context.rank in range(workers):
        dealt.append(len(slots_of_rank(context, tasks)) if context.rank < tasks else 0)
    assert torch.tensor(dealt).sum() == tasks
    assert sorted(dealt) == sorted(n for count, n in shares(tasks, workers) for _ in range(count))


@given(setting=settings_)
@settings(max_examples=60, deadline=None)
def test_more_of_anything_costs_more(setting: Setting) -> None:
    before = cost(setting)
    parts = (before.compute, before.waiting, before.feed, before.bandwidth, before.latency, before.occasional)
    assert min(parts) >= -1e-9 * before.step
    compute, network, feed = setting.compute, setting.network, setting.feed
    for worse in (
        setting.with_(meta_batch_size=setting.meta_batch_size + setting.workers),
        setting.with_(gradient_bytes=2 * setting.gradient_bytes),
        setting.with_(compute=replace(compute, task_seconds=2 * compute.task_seconds)),
        setting.with_(compute=replace(compute, cv=compute.cv + 0.1)),
        setting.with_(network=replace(network, latency=network.latency + 1e-3)),
        setting.with_(network=replace(network, bandwidth=network.bandwidth / 2)),
        setting.with_(feed=replace(feed, store_bandwidth=feed.store_bandwidth / 2)),
        setting.with_(sharing=2 * setting.sharing),
    ):
        assert cost(worse).step >= before.step * (1 - 1e-3)  # the integral's own error
    doubled = setting.with_(workers=2 * setting.workers)
    assert cost(doubled).compute <= before.compute * (1 + 1e-9)
    assert cost(doubled).latency >= before.latency


def test_saturation_is_where_the_parts_cross() -> None:
    """With the latency of 2 (W − 1) rounds equal to M / W tasks at a W that is known."""
    setting = Setting(8, 1024, 1.0, Compute(1e-3, 0.0), Network(1e15, 1e-3))

    def make(workers: int) -> Setting:
        return setting.with_(workers=workers)

    found = saturation(make, growing=False)
    crossing = next(w for w in range(8, 1025, 8) if 2 * (w - 1) * 1e-3 > 1024 / w * 1e-3)
    assert found["all-reduce latency above computing"] == crossing == 24
    assert found["one task per worker (no more can be used)"] == 1024
    assert found["a node's reads above computing"] is None
    fed = setting.with_(feed=Feed(2.0, 1e3, math.inf, 8))  # 2 ms a task for each of 8 workers on a node
    assert saturation(lambda w: fed.with_(workers=w), growing=False)["a node's reads above computing"] == 8


def test_row_groups_touched() -> None:
    assert row_groups_touched(1, 16) == 1
    drawn = np.random.default_rng(0).integers(0, 7, (20_000, 16))
    distinct = np.mean([len(set(row)) for row in drawn.tolist()])
    assert row_groups_touched(7, 16) == pytest.approx(distinct, abs=0.02)


@pytest.mark.parametrize("name", SCENARIOS)
def test_predictions_are_finite_and_below_the_ideal(name: str) -> None:
    scenario = SCENARIOS[name]
    for rate in scenario.rates:
        for gpus in (8, 64, 1024):
            found: Cost = cost(scenario.setting(gpus, rate=rate, growing=True))
            assert 0 < found.tasks_per_second < gpus * rate


def test_the_fit_finds_the_parameters_it_was_made_from() -> None:
    alone, together, network = Compute(0.02, 0.01, 0.0), Compute(0.03, 0.02, 0.0), Network(2e9, 1e-4)
    truth = fitting.Fit(alone, together, network, 2, 4e5)
    lines = [
        {"workers": w, "meta_batch_size": m, "step_seconds": [cost(truth.setting(w, m)).step] * 5}
        for w in (1, 2, 4)
        for m in (4, 32)
    ]
    reduces = [
        {
            "workers": w,
            "numbers": n,
            "seconds": 2 * (w - 1) * 1e-4 + 2 * (w - 1) / w * 4 * n / 2e9,
        }
        for w in (2, 4)
        for n in (1, 10**6)
    ]
    content = {
        "machine": {"cores": 2},
        "gradient_numbers": 10**5,
        "rounds": [{"steps": lines, "all_reduce": reduces}],
    }
    found = fitting.fit(content)
    assert found.alone.task_seconds == pytest.approx(0.02)
    assert found.together.task_seconds == pytest.approx(0.03)
    assert found.alone.overhead_seconds == pytest.approx(0.01)
    assert found.together.overhead_seconds == pytest.approx(0.02)
    assert found.network.bandwidth == pytest.approx(2e9)
    assert found.network.latency == pytest.approx(1e-4)


def test_the_model_gives_the_measurements_back() -> None:
    """Of the machine that measurements.json was made on; SCALING.md shows the table."""
    content = fitting.read()
    found = fitting.fit(content)
    for (workers, size), measured in fitting.steps_of(content).items():
        assert cost(found.setting(workers, size)).step == pytest.approx(measured.quiet, rel=0.25)
