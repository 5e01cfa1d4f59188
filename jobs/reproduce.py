"""`metapipe reproduce`: every algorithm's cells within a budget, beside the numbers of the papers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs import console
from jobs.train import Display

if TYPE_CHECKING:
    from pipeline.experiment import Experiment
    from pipeline.reproduce import Plan
    from pipeline.reproduce_table import Row
    from pipeline.storage import Location
    from pipeline.workflow import Observer

SOME_FAILED = 3  # as training that stopped early


class Budget(StrEnum):
    """The budgets of a reproduction file."""

    CPU = "cpu"
    GPU = "gpu"


def reproduce(
    plan_file: Annotated[Path, typer.Argument(metavar="FILE", help="Reproduction file.")] = Path(
        "configs/reproduce/omniglot.yaml"
    ),
    budget: Annotated[Budget, typer.Option(help="cpu: two cores and minutes; gpu: the papers' recipes.")] = (
        Budget.CPU
    ),
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this algorithm. Repeatable.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--settings", help="Only this setting, e.g. 5w1s. Repeatable.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="For all cells: one that would take longer than is left is left out.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Prepared data set, in place of the experiment files'.")] = None,
    out: Annotated[str, typer.Option(help="Folder of the runs and of the results table.")] = "reproduction",
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Train nothing: write the table from the runs that are there.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start every chosen cell anew, also a finished one.")] = False,
    json: console.Json = False,
) -> None:
    """Train and evaluate every algorithm's cells and write the results table, as Markdown, JSON and a picture.

    The same command goes on where it was: finished cells are kept, an unfinished one goes on from its checkpoint, a
    failed one is tried again. SIGTERM or Ctrl-C leave a checkpoint. Exit code 3: a cell failed; the table says why.
    """
    from pipeline import reproduce as reproduction
    from pipeline import reproduce_table

    plan = reproduction.load(plan_file, budget=budget.value, out=out, data=data)
    chosen = plan.select(only=only or [], settings=settings or [])

    def write() -> None:
        reproduce_table.write(plan, reproduce_table.rows(plan))

    failed = 0
    if not table_only:
        failed = reproduction.run(
            plan, chosen, watch=_watch, minutes=minutes, fresh=fresh, say=console.say, after_each=write
        )
    rows = reproduce_table.rows(plan)
    places = reproduce_table.write(plan, rows)
    console.emit(reproduce_table.to_dict(plan, rows), as_json=json, show=lambda: _show(plan, rows, places))
    if failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def _watch(experiment: Experiment) -> Iterator[Observer]:
    with Display(experiment) as display:
        yield display.observe


def _show(plan: Plan, rows: list[Row], places: list[Location]) -> None:
    columns = ("algorithm", "setting", "published", "inductive", "transductive", "minutes", "status")
    title = f"{plan.name}, {plan.budget} budget: accuracy in %, 95 % interval (i inductive, t transductive)"
    table = Table(*columns, title=title)
    for row in (row for row in rows if row.command):
        letters = {"unstated": "", "inductive": " i", "transductive": " t"}
        published = "\n".join(f"{accuracy}{letters[mode]}" for mode, accuracy in row.published.items()) or "–"
        ours = ["–" if accuracy is None else str(accuracy) for accuracy in (row.inductive, row.transductive)]
        minutes = "–" if row.training_minutes is None else f"{row.training_minutes:.1f}"
        status = escape(row.status + (f": {row.note}" if row.note else ""))
        table.add_row(row.algorithm, row.setting, published, *ours, minutes, status)
    console.out.print(table)
    console.out.print(f"table and picture: {', '.join(map(str, places))}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    console.run(console.single_command(reproduce))
