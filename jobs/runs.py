"""`metapipe runs`: the latest runs of an MLflow experiment."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs import console

COLUMNS = ("test_accuracy_inductive", "test_accuracy_transductive", "test_mse_inductive")


def runs(
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "metapipe",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    json: console.Json = False,
) -> None:
    """List runs with their results, newest first."""
    from pipeline.tracking import Tracker

    tracker = Tracker()
    rows = [_row(run) for run in tracker.runs(experiment, limit)]

    def show() -> None:
        if not rows:
            console.out.print(f"no runs in the experiment {experiment} of {tracker.uri}", soft_wrap=True)
            return
        table = Table("run", "status", "started", "test score", "run id")
        for row in rows:
            scores = [
                f"{name.removeprefix('test_')} {console.percent(row[name], row[f'{name}_ci95'], name.split('_')[1])}"
                for name in COLUMNS
                if name in row
            ]
            table.add_row(row["run"], row["status"], row["started"], "\n".join(scores), row["run_id"])
        console.out.print(table)

    console.emit({"experiment": experiment, "runs": rows}, as_json=json, show=show)


def _row(run: Any) -> dict[str, Any]:
    started = datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "seconds")
    metrics = {k: v for k, v in run.data.metrics.items() if k.startswith("test_")}
    return {
        "run": run.info.run_name,
        "run_id": run.info.run_id,
        "status": run.info.status,
        "started": started,
        **metrics,
    }


if __name__ == "__main__":
    console.run(console.single_command(runs))
