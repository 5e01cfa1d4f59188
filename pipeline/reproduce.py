"""Every algorithm on every setting (`5w1s`: 5-way 1-shot), trained and evaluated within a budget, beside the papers.

A cell is an algorithm at a setting: an experiment file with overrides, trained as an ordinary run (workflow.py). What
is finished is read from its run and what is not goes on from its checkpoint, so the same command run again goes on.

OUT/runs/NAME-SETTING-ALGORITHM-BUDGET/001/         a run folder each (runs.py)
OUT/runs/NAME-SETTING-ALGORITHM-BUDGET/failure.json why its last attempt ended, where it failed
OUT/results-BUDGET.md, .json, .png                  see reproduce_table.py
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from pipeline import config, runs, storage, workflow
from pipeline import experiment as experiments
from pipeline.config import Section
from pipeline.credentials import redacted
from pipeline.errors import ConfigError, DataError, RunTaken, StopRequested, UserError
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.storage import Location
from pipeline.tasks import shards
from pipeline.training import journal
from pipeline.training.hardware import Hardware

FAILURE_FILE = "failure.json"
SETTING = re.compile(r"(?P<n_way>\d+)w(?P<k_shot>\d+)s")

BudgetName: TypeAlias = Literal["cpu", "gpu"]
Mode: TypeAlias = Literal["inductive", "transductive", "unstated"]
Status: TypeAlias = Literal["finished", "under way", "failed", "not run"]
Watch: TypeAlias = Callable[[Experiment], AbstractContextManager[workflow.Observer]]


# --- the files


class Method(Section):
    """A published method: what its paper, or the one that quotes it, reports."""

    title: str
    citation: str
    note: str = ""
    results: dict[str, dict[Mode, list[float]]] = Field(default_factory=dict)
    # setting -> mode -> [accuracy in %, and where it is reported the half-width of its 95 % interval]


class PublishedConfig(Section):
    """The file of published numbers."""

    methods: dict[str, Method]


class CellPlan(Section):
    """One algorithm at one setting."""

    set: dict[str, Any] = Field(default_factory=dict)  # dotted keys of the experiment -> values
    minutes: float | None = Field(default=None, gt=0)  # the whole cell takes about so long; None: nobody has seen it


class AlgorithmPlan(Section):
    """One algorithm: its experiment file, and the cells that it is trained for."""

    config: Path  # relative to the reproduction file
    set: dict[str, Any] = Field(default_factory=dict)  # for each of its cells
    cells: dict[str, CellPlan] = Field(min_length=1)


class BudgetPlan(Section):
    """What is trained within one budget."""

    about: str  # what the budget is, for the table's readers
    settings: list[str] = Field(min_length=1)  # in the order in which they are run
    set: dict[str, Any] = Field(default_factory=dict)  # for every cell
    algorithms: dict[str, AlgorithmPlan] = Field(min_length=1)  # in the order in which they are run


class ReproduceConfig(Section):
    """A reproduction file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    published: Path  # relative to this file
    prepare: str  # the command that prepares the data set
    budgets: dict[BudgetName, BudgetPlan] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One algorithm at one setting, as it is to be run."""

    algorithm: str
    setting: str
    file: Path  # the experiment file
    overrides: dict[str, Any]  # that make it this cell
    minutes: float | None  # that it is expected to take, evaluation included
    experiment: Experiment

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def folder(self) -> Location:
        """Of its runs."""
        return runs.runs_of(self.experiment)


@dataclass(frozen=True)
class Plan:
    """A reproduction within one budget: its cells in the order in which they are run."""

    name: str
    budget: BudgetName
    about: str
    settings: list[str]
    methods: dict[str, Method]  # published, by algorithm
    cells: list[Cell]
    prepare: str
    out: Location

    def select(self, *, only: Iterable[str] = (), settings: Iterable[str] = ()) -> list[Cell]:
        """The cells of these algorithms and settings; of all where none is given.

        Raises ConfigError: there is no such algorithm or setting in the plan, or no cell of both.
        """
        only, settings = list(only), list(settings)
        algorithms = list(dict.fromkeys(cell.algorithm for cell in self.cells))
        for option, chosen, known in (("--only", only, algorithms), ("--settings", settings, self.settings)):
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{option} {name}: the {self.budget} budget has only {', '.join(known)}.")
        found = [
            cell
            for cell in self.cells
            if (not only or cell.algorithm in only) and (not settings or cell.setting in settings)
        ]
        if not found:
            there = ", ".join(f"{cell.algorithm} {cell.setting}" for cell in self.cells if cell.algorithm in only)
            raise ConfigError(f"--only and --settings: the {self.budget} budget has no such cell, only {there}.")
        return found


def load(path: str | Path, *, budget: BudgetName, out: str | Location, data: str | None = None) -> Plan:
    """The plan of a reproduction file for one budget, with every cell's experiment checked.

    data: the data set, in place of that of the experiment files.

    Raises ConfigError: names the file, the cell, the key and what to do.
    """
    path = Path(path)
    content = config.validate(ReproduceConfig, config.read_yaml(path), source=str(path))
    if budget not in content.budgets:
        raise ConfigError(f"{path}: has no budget {budget!r}; it has {', '.join(content.budgets)}.")
    published_file = path.parent / content.published
    published = config.validate(PublishedConfig, config.read_yaml(published_file), source=str(published_file))
    chosen = content.budgets[budget]
    for setting in chosen.settings:
        _shape(setting, source=f"{path}: budgets.{budget}.settings")
    place = storage.location(out).absolute()
    common: dict[str, Any] = {"tracking.runs": str(place / "runs"), "tracking.register_model": False}
    common |= {"tracking.experiment": f"reproduce-{content.name}", **({"task.data": data} if data else {})}
    cells = [
        _cell(path, content.name, budget, setting, algorithm, chosen, common)
        for setting in chosen.settings
        for algorithm, plan in chosen.algorithms.items()
        if setting in plan.cells
    ]
    for algorithm, plan in chosen.algorithms.items():
        for setting in plan.cells.keys() - set(chosen.settings):
            where = f"{path}: budgets.{budget}.algorithms.{algorithm}.cells.{setting}"
            raise ConfigError(f"{where}: is not one of the budget's settings: {', '.join(chosen.settings)}.")
    return Plan(content.name, budget, chosen.about, chosen.settings, published.methods, cells, content.prepare, place)


def _cell(
    path: Path,
    name: str,
    budget: BudgetName,
    setting: str,
    algorithm: str,
    chosen: BudgetPlan,
    common: dict[str, Any],
) -> Cell:
    plan = chosen.algorithms[algorithm]
    where = f"{path}: budgets.{budget}.algorithms.{algorithm}.cells.{setting}"
    file = Path(os.path.normpath(path.parent / plan.config))
    overrides = {"name": f"{name}-{setting}-{algorithm}-{budget}", **chosen.set, **plan.set, **plan.cells[setting].set}
    overrides |= {key: value for key, value in common.items() if key == "task.data"}
    content = config.read_yaml(file)
    for key, value in {**overrides, **common}.items():
        config.put(content, key, value, source=where)
    experiment = config.validate(Experiment, content, source=f"{where} ({file})").absolute()
    tested = getattr(experiment.task, "episode", lambda _: ())("meta_test")[:2]
    if tested != _shape(setting, source=where):
        raise ConfigError(f"{where}: its test tasks are (n_way, k_shot) = {tested}; set task.n_way and task.k_shot.")
    return Cell(algorithm, setting, file, overrides, plan.cells[setting].minutes, experiment)


def _shape(setting: str, *, source: str) -> tuple[int, int]:
    """n_way and k_shot of a setting. Raises ConfigError: it is not written like 5w1s."""
    match = SETTING.fullmatch(setting)
    if match is None:
        raise ConfigError(f"{source}: {setting}: write a setting as N-way K-shot, like 5w1s.")
    return int(match["n_way"]), int(match["k_shot"])


# --- what became of a cell


class Standing(NamedTuple):
    """Of one cell: whether it is done, and where."""

    status: Status
    run: RunFolder | None = None
    note: str = ""  # how far it is, or why it failed, or why an earlier run does not count


def standing(cell: Cell, *, data_digest: str | None = None) -> Standing:
    """What became of a cell. data_digest: of the data set it would be run on; None: not compared."""
    failure = _failure(cell)
    run = runs.latest_run(cell.folder)
    if run is None:
        return Standing("failed", None, failure) if failure else Standing("not run")
    changes = runs.changes_since(run, cell.experiment, data_digest=data_digest)
    if run.finished and not changes:
        return Standing("finished", run)
    if failure:
        return Standing("failed", run, failure)
    if run.finished:
        return Standing("not run", None, f"{run.path} was run differently: {'; '.join(changes)}")
    return Standing("under way", run, f"outer step {step_of(run)} of {cell.experiment.training.steps}")


def step_of(run: RunFolder) -> int:
    """Outer steps that a run has come to."""
    return max((record["step"] for record in journal.read(run.journal)), default=0)


def training_seconds(run: RunFolder) -> float:
    """Of the outer steps, each counted once however often the run was resumed.

    Not of start-up, validation, evaluation and what a kill has cost: the journal drops those records itself.
    """
    return sum(record["step_seconds"] for record in journal.read(run.journal))


def hardware_of(run: RunFolder) -> list[Hardware]:
    """What a run was trained on; several where it went on elsewhere, none where an older version ran it."""
    return run.read().get("hardware", [])


def test_of(run: RunFolder) -> dict[str, Any]:
    """A finished run's `Evaluation.to_dict()`. Raises DataError: it is missing or damaged."""
    place = run.evaluation / "test.json"
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error}). Remove {run.path} to have its cell run anew.") from error


def _failure(cell: Cell) -> str:
    place = cell.folder / FAILURE_FILE
    return json.loads(place.read_text(encoding="utf-8"))["error"] if place.exists() else ""


def _forget_failure(cell: Cell) -> None:
    place = cell.folder / FAILURE_FILE
    if place.exists():
        place.unlink()


def _note_failure(cell: Cell, error: Exception) -> str:
    told = str(error) if isinstance(error, UserError) else redacted(f"{type(error).__name__}: {error}")
    content = {"error": told, "traceback": redacted(traceback.format_exc())}
    storage.make_folder(cell.folder)
    storage.write(cell.folder / FAILURE_FILE, json.dumps(content, indent=1) + "\n")
    return told


# --- running


def digests_of(cells: Iterable[Cell], prepare: str) -> dict[str, str]:
    """The digest of each data set by its address, checked against its bytes.

    Raises DataError: a data set is missing (tells how to prepare it) or damaged.
    """
    digests: dict[str, str] = {}
    for data in dict.fromkeys(cell.experiment.task.data for cell in cells):
        if not storage.location(data).is_dir():
            raise DataError(
                f"{data}: no such data set. Prepare it with `{prepare}`, or name a prepared one with --data."
            )
        digests[data] = shards.verify(data).digest
    return digests


def run(
    plan: Plan,
    cells: list[Cell],
    *,
    watch: Watch,
    minutes: float | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    after_each: Callable[[], None] = lambda: None,
) -> int:
    """Train and evaluate the cells that are not finished yet; returns how many failed.

    minutes: for all of them. A cell that would take longer than what is left of them is not started; a shorter one
    after it may be. fresh: start each anew, finished or not. watch: shows one cell's training. after_each: is called
    when a cell has ended, also by an interrupt.

    Raises UserError: bad input, before any cell starts; StopRequested: a run was asked to stop.
    """
    digests = digests_of(cells, plan.prepare)
    deadline = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)

    def look(cell: Cell) -> Standing:
        return Standing("not run") if fresh else standing(cell, data_digest=digests[cell.experiment.task.data])

    for cell in cells:
        if look(cell).status != "finished":
            experiments.check_device(cell.experiment)
            _check_size(cell)
    failed = 0
    for number, cell in enumerate(cells, start=1):
        title = f"[{number}/{len(cells)}] {cell.algorithm} {cell.setting}"
        before = look(cell)
        left, needed = (deadline - time.monotonic()) / 60, _minutes_needed(cell, before)
        if before.status == "finished":
            say(f"{title}: finished before")
        elif left <= needed or left <= 0:
            say(f"{title}: left out, it takes about {needed:.0f} minutes and {max(left, 0):.0f} are left")
        else:
            say(f"{title}: {before.status}" + (f" ({before.note})" if before.note else ""))
            try:
                error = _run_cell(cell, watch, fresh=fresh, say=say)
            finally:
                after_each()
            if error:
                failed += 1
                say(f"{title}: failed: {error}")
    return failed


def _check_size(cell: Cell) -> None:
    """Raises DataError: the data set, which has been verified, is too small for the cell's tasks."""
    task = cell.experiment.task
    manifest = shards.read_manifest(task.data)
    for part in task.parts:
        task.check_size(manifest, part)


def _run_cell(cell: Cell, watch: Watch, *, fresh: bool, say: Callable[[str], None]) -> str:
    """Returns why it failed; empty where it did not."""
    _forget_failure(cell)
    try:
        with watch(cell.experiment) as observe:
            workflow.train(cell.experiment, fresh=fresh, observe=observe, say=say)
    except StopRequested:
        raise
    except RunTaken as error:
        return str(error)  # the other process will note how it ends
    except Exception as error:  # also a defect of one algorithm: the other cells can be had all the same
        return _note_failure(cell, error)
    return ""


def _minutes_needed(cell: Cell, before: Standing) -> float:
    """By the file's estimate, for what is left of a cell. Without an estimate 0: it is started while there is time."""
    done = step_of(before.run) / max(cell.experiment.training.steps, 1) if before.run else 0.0
    return (cell.minutes or 0.0) * max(1.0 - done, 0.0)
