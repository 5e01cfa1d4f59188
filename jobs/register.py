"""`metapipe register`: register a finished run's best checkpoint again."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import console
from jobs.train import registration_result, show_registration


def register(
    run: Annotated[str, typer.Argument(help="Folder of a finished run: runs/NAME/001, or runs/NAME for the last.")],
    json: console.Json = False,
) -> None:
    """Register a run's best checkpoint as candidate; it becomes champion if it beats the present one.

    `metapipe train` does this by itself; this is for runs trained with tracking.register_model=false, or for
    another MLflow server (set MLFLOW_TRACKING_URI).
    """
    from pipeline import workflow

    registration = workflow.register(run)
    console.emit(registration_result(registration), as_json=json, show=lambda: show_registration(registration))


if __name__ == "__main__":
    console.run(console.single_command(register))
