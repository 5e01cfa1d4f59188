"""A sweep: which keys of an experiment vary, over what, and how trials are chosen and stopped. No Ray here.

Trial i of a random or grid sweep is a function of (seed, i) alone, so a sweep that is run again has the same trials.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline import config
from pipeline import experiment as experiments
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment

SHORT_NAMES = {"inner_lr": "algorithm.inner_lr", "outer_lr": "training.outer.outer_lr"}

Params = dict[str, Any]  # dotted key of the experiment -> value


class Range(Section):
    """What a key varies over: exactly one of these."""

    log_uniform: tuple[float, float] | None = None  # [low, high], both above 0
    uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None  # both ends included
    choice: list[Any] | None = Field(default=None, min_length=1)  # one of these, drawn
    grid: list[Any] | None = Field(default=None, min_length=1)  # every one of these

    @model_validator(mode="after")
    def _exactly_one(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        low, high = self.ends[0], self.ends[-1]
        if not (self.choice or self.grid) and not low < high:
            raise ValueError(f"{given[0]} should be [low, high] with low < high")
        if self.log_uniform and low <= 0:
            raise ValueError("log_uniform needs ends above 0")
        return self

    @property
    def ends(self) -> list[Any]:
        """The values at its ends, or all of a list: what an experiment must accept."""
        return next(list(value) for value in self.__dict__.values() if value is not None)

    def draw(self, random: np.random.Generator) -> Any:
        if self.log_uniform:
            low, high = np.log(self.log_uniform)
            return float(np.exp(random.uniform(low, high)))
        if self.uniform:
            return float(random.uniform(*self.uniform))
        if self.integer:
            return int(random.integers(self.integer[0], self.integer[1], endpoint=True))
        assert self.choice is not None
        return self.choice[int(random.integers(len(self.choice)))]


class NoScheduler(Section):
    """Every trial trains to its end."""

    name: Literal["none"]


class ASHA(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): at each rung the best 1/reduction go on."""

    name: Literal["asha"]
    grace_steps: int = Field(ge=1)  # outer steps before a trial may be stopped; the first rung
    reduction_factor: int = Field(default=3, ge=2)


class MedianStopping(Section):
    """Stops a trial whose best score is below the median of the others' running means (Golovin et al. 2017)."""

    name: Literal["median"]
    grace_steps: int = Field(ge=1)
    min_trials: int = Field(default=3, ge=1)  # others that must have come as far


class PBT(Section):
    """Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): poor trials copy good ones and perturb."""

    name: Literal["pbt"]
    interval_steps: int = Field(ge=1)  # outer steps between exploits; a multiple of training.validate_every
    quantile: float = Field(default=0.25, gt=0, le=0.5)  # share of trials that copy, and that are copied
    synchronous: bool = True  # trials wait for each other at every interval: who copies whom is no matter of timing


class SweepConfig(Section):
    """A sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    experiment: Path  # the experiment file, relative to the sweep file
    set: dict[str, Any] = Field(default_factory=dict)  # dotted keys of the experiment -> values for every trial
    search: dict[str, Range] = Field(min_length=1)  # dotted keys, or inner_lr and outer_lr
    searcher: Literal["random", "optuna"] = "random"  # grids are enumerated, the rest drawn; optuna: TPE
    scheduler: Annotated[NoScheduler | ASHA | MedianStopping | PBT, Field(discriminator="name")] = NoScheduler(
        name="none"
    )
    trials: int = Field(default=8, ge=1)  # draws; with grids, draws for each of their combinations
    max_trials: int | None = Field(default=None, ge=1)  # of all of these, the first so many
    max_concurrent: int | None = Field(default=None, ge=1)  # trials at once; None: as many as there is room for
    workers_per_trial: int = Field(default=0, ge=0)  # 0: a trial trains in one process; n: on n Ray Train workers
    budget_minutes: float | None = Field(default=None, gt=0)  # no trial starts or goes on after it
    fresh_episodes: int = Field(default=600, ge=2)  # for the best trial, which the selection episodes flatter
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parts_that_go_together(self) -> SweepConfig:
        if self.searcher == "optuna" and any(domain.grid for domain in self.search.values()):
            raise ValueError("searcher optuna draws its values: write choice instead of grid")
        if self.scheduler.name == "pbt" and self.workers_per_trial:
            raise ValueError("scheduler pbt works with trials in one process: leave workers_per_trial out")
        if self.scheduler.name == "pbt" and self.searcher == "optuna":
            raise ValueError("scheduler pbt perturbs what was drawn: use searcher random")
        return self


class Sweep:
    """A sweep and its base experiment, checked together."""

    def __init__(self, settings: SweepConfig, base: dict[str, Any], *, source: str) -> None:
        """Raises ConfigError: a value at an end of a range that the experiment does not accept, or an unknown key."""
        self.settings = settings
        self.source = source
        self._base = base
        self.search = {SHORT_NAMES.get(key, key): domain for key, domain in settings.search.items()}
        if len(self.search) < len(settings.search):
            raise ConfigError(f"{source}: search names a key twice, in short and in full.")
        first = {key: domain.ends[0] for key, domain in self.search.items()}
        for key, domain in self.search.items():
            for value in domain.ends:  # what lies between them is as good or as bad
                self.experiment({**first, key: value})
        base_experiment = self.experiment(first)
        scheduler, every = settings.scheduler, base_experiment.training.validate_every
        if isinstance(scheduler, PBT) and scheduler.interval_steps % every:
            raise ConfigError(
                f"{source}: scheduler.interval_steps={scheduler.interval_steps} is no multiple of the experiment's "
                f"training.validate_every={every}, when trials are compared."
            )

    @property
    def base(self) -> Experiment:
        """The experiment at one end of every range."""
        return self.experiment({key: domain.ends[0] for key, domain in self.search.items()})

    def experiment(self, params: Params) -> Experiment:
        """The experiment of a trial. Raises ConfigError."""
        content = json.loads(json.dumps(self._base))
        for key, value in params.items():
            config.put(content, key, value, source=f"{self.source}: search.{key}")
        workers = self.settings.workers_per_trial
        content.setdefault("training", {}).update(
            {"backend": "ray", "num_workers": workers} if workers else {"backend": "local", "num_workers": 1}
        )
        return experiments.from_dict(content, source=f"{self.source}: a trial with {params}")

    def absolute(self) -> Sweep:
        """With absolute paths: trials run in other folders."""
        return Sweep(self.settings, self.base.absolute().to_dict(), source=self.source)

    def trials(self) -> list[Params]:
        """Every trial of a random or grid sweep, in order."""
        grids = {key: domain.grid for key, domain in self.search.items() if domain.grid}
        combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
        drawn = [key for key in self.search if key not in grids]
        trials = []
        for i in range(self.settings.trials if drawn else 1):
            random = np.random.default_rng([self.settings.seed, i])
            draw = {key: self.search[key].draw(random) for key in drawn}
            trials += [{key: {**combination, **draw}[key] for key in self.search} for combination in combinations]
        return trials[: self.settings.max_trials]

    def to_dict(self) -> dict[str, Any]:
        """What must be the same for a sweep to be gone on with."""
        settings = self.settings.model_dump(mode="json")
        for name in ("experiment", "set", "trials", "max_trials", "max_concurrent", "budget_minutes"):
            del settings[name]  # the base holds the first two; the others may be raised
        base = {key: value for key, value in self._base.items() if key != "tracking"}
        # nor where a network's code lies: each job on a cluster unpacks it anew
        base["model"] = {key: value for key, value in base.get("model", {}).items() if key != "folder"}
        search = {key: domain.model_dump(exclude_none=True) for key, domain in self.search.items()}
        return {**settings, "search": search, "base": base}


def load(path: str | Path, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep in a YAML file.

    overrides: `dotted.key=value` of the experiment. changes: keys of the sweep file to replace.

    Raises ConfigError: names the file, the key and what to do.
    """
    path = Path(path)
    settings = config.validate(SweepConfig, {**config.read_yaml(path), **(changes or {})}, source=str(path))
    base = config.read_yaml(path.parent / settings.experiment)
    for key, value in settings.set.items():
        config.put(base, SHORT_NAMES.get(key, key), value, source=f"{path}: set.{key}")
    return Sweep(settings, config.apply_overrides(base, overrides), source=str(path))


def digest(params: Params) -> str:
    """A short name for a trial that is known only by what was drawn."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12]
