"""A sweep's file: what varies over what, the trials that follow from it, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline import sweep as sweeps
from pipeline.errors import ConfigError
from pipeline.sweep import Sweep

BASE: dict[str, Any] = {
    "name": "trial",
    "task": {"family": "sinusoid"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_lr": 0.01},
    "training": {"steps": 10, "meta_batch_size": 4, "validate_every": 5, "num_workers": 2},
}
RATES = {"inner_lr": {"log_uniform": [0.001, 1.0]}, "outer_lr": {"log_uniform": [1e-4, 1e-2]}}


def load(folder: Path, *overrides: str, **settings: Any) -> Sweep:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    content = {"name": "sweep", "experiment": "base.yaml", "search": RATES, **settings}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return sweeps.load(folder / "sweep.yaml", overrides)


def test_short_names_stand_for_the_two_rates(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    assert list(sweep.search) == ["algorithm.inner_lr", "training.outer.outer_lr"]
    exp = sweep.experiment({"algorithm.inner_lr": 0.5, "training.outer.outer_lr": 0.002})
    assert (exp.algorithm.inner_lr, exp.training.outer.outer_lr) == (0.5, 0.002)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: search names a key twice"):
        load(tmp_path, search={**RATES, "algorithm.inner_lr": {"choice": [1.0]}})


def test_trials_are_a_function_of_the_seed_and_more_keep_the_first(tmp_path: Path) -> None:
    trials = load(tmp_path, trials=5).trials()
    assert trials == load(tmp_path, trials=5).trials()
    assert load(tmp_path, trials=8).trials()[:5] == trials
    assert load(tmp_path, trials=5, seed=1).trials() != trials
    assert len({str(trial) for trial in trials}) == 5


def test_the_first_trials_of_a_grid(tmp_path: Path) -> None:
    search = {"inner_lr": {"grid": [0.1, 0.2, 0.3]}, "outer_lr": {"log_uniform": [1e-4, 1e-2]}}
    everything = load(tmp_path, search=search, trials=2).trials()
    assert len(everything) == 6
    assert load(tmp_path, search=search, trials=4, max_trials=4).trials() == everything[:4]


def test_a_point_that_is_drawn_again_is_another_trial(tmp_path: Path) -> None:
    from ray.tune.search import Searcher

    from pipeline import tuning

    sweep = load(tmp_path, search={"inner_lr": {"choice": [0.1]}}, searcher="optuna")
    searcher: Searcher = tuning._optuna(sweep, [])
    space = {"params": {key: tuning._domain(domain) for key, domain in sweep.search.items()}}
    assert searcher.set_search_properties("score", "max", space)
    names = [tuning.trial_name(searcher.suggest(trial)) for trial in "abc"]
    assert names[0] == sweeps.digest({"algorithm.inner_lr": 0.1})
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]


def test_a_network_of_ones_own_may_lie_elsewhere_the_next_time(tmp_path: Path) -> None:
    """Each job on a cluster unpacks its working directory anew."""
    (tmp_path / "nets.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(1, 1)\n")
    sweep = load(tmp_path)
    sweeps_of = []
    for folder in ("one", "two"):
        model = {"name": "module", "factory": "nets:net", "folder": str(tmp_path / folder)}
        sweeps_of.append(Sweep(sweep.settings, {**BASE, "model": model}, source="sweep.yaml").to_dict())
    assert sweeps_of[0] == sweeps_of[1]


@given(seed=st.integers(0, 2**31), low=st.floats(1e-6, 1.0), factor=st.floats(1.01, 1e4))
def test_draws_stay_within_their_ranges(
    seed: int, low: float, factor: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    high = low * factor
    for kind in ("log_uniform", "uniform"):
        value = sweeps.Range.model_validate({kind: [low, high]}).draw(random)
        assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
    assert 3 <= sweeps.Range(integer=(3, 5)).draw(random) <= 5
    assert sweeps.Range(choice=["a", "b"]).draw(random) in ("a", "b")


def test_grids_are_crossed_with_each_other_and_with_every_draw(tmp_path: Path) -> None:
    grids = {"inner_lr": {"grid": [0.1, 0.2]}, "algorithm.adaptation_steps": {"grid": [1, 2, 3]}}
    trials = load(tmp_path, search=grids, trials=7).trials()
    assert len(trials) == 6, "nothing is drawn, so once each"
    assert len({str(trial) for trial in trials}) == 6
    crossed = load(tmp_path, search={**grids, "outer_lr": {"uniform": [0.001, 0.002]}}, trials=2).trials()
    assert len(crossed) == 12
    assert len({trial["training.outer.outer_lr"] for trial in crossed}) == 2


def test_how_a_trial_trains(tmp_path: Path) -> None:
    alone = load(tmp_path).base.training
    assert (alone.backend, alone.num_workers) == ("local", 1)
    distributed = load(tmp_path, workers_per_trial=3).base.training
    assert (distributed.backend, distributed.num_workers) == ("ray", 3)


def test_set_and_overrides_reach_every_trial(tmp_path: Path) -> None:
    sweep = load(tmp_path, "training.meta_batch_size=6", set={"training.steps": 20, "training.validate_every": 10})
    assert all(sweep.experiment(params).training.steps == 20 for params in sweep.trials())
    assert sweep.base.training.meta_batch_size == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": {"algorithm.inner_rl": {"choice": [1.0]}}}, r"algorithm\.inner_rl: unknown key.*inner_lr"),
        ({"search": {"inner_lr": {"uniform": [-1.0, 1.0]}}}, r"algorithm\.inner_lr.*greater than 0.*-1\.0"),
        ({"search": {"inner_lr": {"log_uniform": [0.0, 1.0]}}}, "log_uniform needs ends above 0"),
        ({"search": {"inner_lr": {"log_uniform": [1.0, 0.1]}}}, "low < high"),
        ({"search": {"inner_lr": {"uniform": [0.1, 1.0], "grid": [1]}}}, "exactly one of"),
        ({"search": {"inner_lr": {}}}, "exactly one of"),
        ({"search": {"inner_lr": {"loguniform": [0.1, 1.0]}}}, r"search\.inner_lr\.loguniform: unknown key"),
        ({"search": {}}, "search: .*at least 1 item"),
        ({"searcher": "bayes"}, "searcher: .*random"),
        ({"searcher": "optuna", "search": {"inner_lr": {"grid": [0.1]}}}, "write choice instead of grid"),
        ({"scheduler": {"name": "asha"}}, r"scheduler\.grace_steps: missing"),
        ({"scheduler": {"name": "hyperband"}}, r"scheduler\.name: choose one of"),
        ({"scheduler": {"name": "pbt", "interval_steps": 7}}, r"interval_steps=7 is no multiple.*validate_every=5"),
        ({"scheduler": {"name": "pbt", "interval_steps": 5}, "workers_per_trial": 2}, "leave workers_per_trial out"),
        ({"experiment": "absent.yaml"}, r"absent\.yaml: no such configuration file"),
        ({"set": {"training.stepz": 5}}, r"training\.stepz: unknown key"),
    ],
)
def test_mistakes_are_named_before_anything_starts(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **settings)


def test_a_sweep_may_be_given_more_trials_and_time_later(tmp_path: Path) -> None:
    before = load(tmp_path, trials=2).to_dict()
    assert load(tmp_path, trials=5, budget_minutes=3.0, max_concurrent=1).to_dict() == before
    assert load(tmp_path, seed=1).to_dict() != before
    assert load(tmp_path, "training.steps=20").to_dict() != before


@pytest.mark.parametrize(
    ("settings", "now", "grown"),
    [
        ({"trials": 5}, 1, 5),
        ({"trials": 5, "searcher": "optuna"}, 1, 5),
        ({"trials": 5, "search": {**RATES, "seed": {"grid": [1, 2]}}}, 1, 10),
        ({"trials": 5, "workers_per_trial": 2}, 1, 5),
    ],
)
def test_a_cluster_that_grows_is_asked_for_every_trial_at_once(
    settings: dict[str, Any], now: int, grown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no workers yet: the trials that wait are what makes it grow."""
    import ray

    from pipeline import launch, tuning

    sweep = load(tmp_path, **settings)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.delenv(launch.AUTOSCALING_VARIABLE, raising=False)
    assert tuning._room(sweep) == now
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setenv(launch.AUTOSCALING_VARIABLE, "1")
    assert tuning._room(sweep) == grown
