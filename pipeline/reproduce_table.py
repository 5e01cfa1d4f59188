"""The results of a reproduction beside the published ones: as Markdown for people, JSON for machines, and a picture."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import reproduce, reproduce_pictures, storage
from pipeline.reproduce import Cell, Method, Mode, Plan, Status
from pipeline.storage import Location
from pipeline.training import hardware
from pipeline.training.evaluate import MODES

COUNTED = (
    "Minutes are those of the outer steps, each counted once however often the run was resumed; drawing episodes, "
    "start-up, validation and evaluation are not counted."
)


@dataclass(frozen=True)
class Accuracy:
    """A fraction in 0…1 with the half-width of its 95 % interval; None where a paper reports none."""

    mean: float
    ci95: float | None

    def __str__(self) -> str:
        if self.ci95 is None:
            return str(round(100 * self.mean, 2))
        return f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f}"


@dataclass(frozen=True)
class Row:
    """An algorithm at a setting: what is published, and what became of ours."""

    algorithm: str
    setting: str
    status: Status
    note: str
    published: dict[Mode, Accuracy]
    inductive: Accuracy | None
    transductive: Accuracy | None
    reached: list[str] | None  # see `_reached`; None: nothing to compare
    episodes: int | None  # test episodes
    training_minutes: float | None
    outer_steps: int | None  # so far
    hardware: list[hardware.Hardware]
    config: str | None
    command: str | None  # repeats the cell by itself
    run: str | None
    mlflow_run_id: str | None
    data_digest: str | None

    def ours(self, mode: str) -> Accuracy | None:
        return self.inductive if mode == "inductive" else self.transductive


def rows(plan: Plan) -> list[Row]:
    """Every algorithm that is planned or published, at every setting; algorithm by algorithm."""
    cells = {(cell.algorithm, cell.setting): cell for cell in plan.cells}
    algorithms = dict.fromkeys([*(cell.algorithm for cell in plan.cells), *plan.methods])
    return [
        _row(algorithm, setting, _published(plan.methods.get(algorithm), setting), cells.get((algorithm, setting)))
        for algorithm in algorithms
        for setting in plan.settings
    ]


def _published(method: Method | None, setting: str) -> dict[Mode, Accuracy]:
    found = method.results.get(setting, {}) if method else {}
    return {m: Accuracy(n[0] / 100, n[1] / 100 if len(n) > 1 else None) for m, n in found.items()}


def _row(algorithm: str, setting: str, published: dict[Mode, Accuracy], cell: Cell | None) -> Row:
    found = reproduce.standing(cell) if cell else reproduce.Standing("not run", note="not in this budget")
    run = found.run
    test = reproduce.test_of(run) if run and found.status == "finished" else None
    ours = {mode: Accuracy(test[mode][-1]["mean"], test[mode][-1]["ci95"]) if test else None for mode in MODES}
    facts = run.read() if run else {}
    return Row(
        algorithm=algorithm,
        setting=setting,
        status=found.status,
        note=found.note,
        published=published,
        inductive=ours["inductive"],
        transductive=ours["transductive"],
        reached=_reached(published, ours) if test and published else None,
        episodes=test["episodes"] if test else None,
        training_minutes=reproduce.training_seconds(run) / 60 if run else None,
        outer_steps=reproduce.step_of(run) if run else None,
        hardware=reproduce.hardware_of(run) if run else [],
        config=str(cell.file) if cell else None,
        command=command(cell) if cell else None,
        run=str(run.path) if run else None,
        mlflow_run_id=facts.get("mlflow_run_id"),
        data_digest=facts.get("data_digest"),
    )


def _reached(published: dict[Mode, Accuracy], ours: dict[Any, Accuracy | None]) -> list[str]:
    """The modes in which ours is in the published interval or better, or where none is given at the number or better.

    A number whose paper does not say the mode is compared with both of ours.
    """
    reached: list[str] = []
    for mode in MODES:
        theirs, own = published.get(mode) or published.get("unstated"), ours[mode]
        if theirs and own and own.mean >= theirs.mean - (theirs.ci95 or 0.0):
            reached.append(mode)
    return reached


def command(cell: Cell) -> str:
    """Trains and evaluates the cell by itself, from the same folder."""
    sets = [f"--set {shlex.quote(f'{key}={_value(value)}')}" for key, value in cell.overrides.items()]
    return " ".join(["metapipe train", shlex.quote(str(cell.file)), *sets])


def _value(value: Any) -> str:
    """As --set reads it back."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)


# --- out


def write(plan: Plan, found: list[Row]) -> list[Location]:
    """results-BUDGET.md, .json and .png in the plan's folder."""
    storage.make_folder(plan.out)
    places = [plan.out / f"results-{plan.budget}.{suffix}" for suffix in ("md", "json", "png")]
    storage.write(places[0], markdown(plan, found))
    storage.write(places[1], json.dumps(to_dict(plan, found), indent=1, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / places[2].name
        reproduce_pictures.accuracies(found, {a: m.title for a, m in plan.methods.items()}, plan.settings, picture)
        storage.write(places[2], picture.read_bytes())
    return places


def to_dict(plan: Plan, found: list[Row]) -> dict[str, Any]:
    return {
        "name": plan.name,
        "budget": plan.budget,
        "about": plan.about,
        "interval": "95 % over test episodes, 1.96·s/√n",
        "training_minutes": COUNTED,
        "methods": {algorithm: method.model_dump(exclude={"results"}) for algorithm, method in plan.methods.items()},
        "cells": [asdict(row) for row in found],
    }


def markdown(plan: Plan, found: list[Row]) -> str:
    """One table of accuracies, one of how each cell came about, the commands and the citations."""
    titles = {algorithm: method.title for algorithm, method in plan.methods.items()}
    parts = [
        f"# {plan.name}: the {plan.budget} budget",
        plan.about,
        "Accuracy in % on test tasks of unseen classes, ± 95 % interval over episodes. Inductive: no query sees "
        "another. Transductive: a task's queries are normalized by their own statistics. A published number without "
        "either word does not say which it is.",
        _accuracies(plan, found, titles),
        "## How each cell came about",
        COUNTED,
        _circumstances(found, titles),
    ]
    commands = [f"# {titles.get(r.algorithm, r.algorithm)} {r.setting}\n{r.command}" for r in found if r.command]
    if commands:
        parts += ["## Commands", "Each repeats one cell by itself:", "```sh\n" + "\n".join(commands) + "\n```"]
    citations = [
        f"- {method.title}: {method.citation}." + (f" {method.note}" if method.note else "")
        for method in plan.methods.values()
    ]
    return "\n\n".join([*parts, "## Published numbers", "\n".join(citations)]) + "\n"


def _accuracies(plan: Plan, found: list[Row], titles: dict[str, str]) -> str:
    by_place = {(row.algorithm, row.setting): row for row in found}
    lines = _header("algorithm", "", *plan.settings)
    for algorithm in dict.fromkeys(row.algorithm for row in found):
        of_algorithm = [by_place[algorithm, setting] for setting in plan.settings]
        lines.append(_line(titles.get(algorithm, algorithm), "published", *map(_published_text, of_algorithm)))
        for mode in MODES:
            lines.append(_line("", f"ours, {mode}", *(_ours_text(row, mode) for row in of_algorithm)))
    told = "Bold: in the published interval or better; where there is no interval, at the number or better."
    return "\n".join(lines) + f"\n\n{told}"


def _published_text(row: Row) -> str:
    told = [f"{accuracy}" + ("" if mode == "unstated" else f" ({mode})") for mode, accuracy in row.published.items()]
    return "<br>".join(told) or "–"


def _ours_text(row: Row, mode: str) -> str:
    accuracy = row.ours(mode)
    if accuracy is None:
        return row.status
    return f"**{accuracy}**" if mode in (row.reached or []) else str(accuracy)


def _circumstances(found: list[Row], titles: dict[str, str]) -> str:
    lines = _header("algorithm", "setting", "status", "episodes", "outer steps", "minutes", "hardware", "config")
    for row in (row for row in found if row.command):
        status = row.status + (f": {row.note}" if row.note else "")
        places = "; then ".join(hardware.told(h) for h in row.hardware) or ("not recorded" if row.run else "–")
        minutes = "–" if row.training_minutes is None else f"{row.training_minutes:.1f}"
        numbers = ["–" if value is None else str(value) for value in (row.episodes, row.outer_steps)]
        title = titles.get(row.algorithm, row.algorithm)
        lines.append(_line(title, row.setting, status, *numbers, minutes, places, row.config or "–"))
    return "\n".join(lines)


def _header(*titles: str) -> list[str]:
    return [_line(*titles), "|" + "---|" * len(titles)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
