"""`metapipe tune`: search an experiment's learning rates, or anything else in it, with Ray Tune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jobs import console
from jobs.train import registration_result, show_evaluation, show_registration

if TYPE_CHECKING:
    from pipeline.sweep_workflow import Outcome


def tune(
    config: Annotated[Path, typer.Argument(help="Sweep file, e.g. configs/tune/smoke.yaml.")],
    overrides: console.Set = None,
    budget: Annotated[
        str | None, typer.Option(help="In place of the file's: a number of trials (12), or minutes (30m).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Leave an unfinished sweep as it is and start anew.")] = False,
    address: console.Address = None,
    json: console.Json = False,
) -> None:
    """Search the keys of an experiment; re-evaluate the best trial on fresh episodes; register it in MLflow.

    Every trial is a child run of the sweep's MLflow run. An unfinished sweep goes on when the same command is run
    again: trials that ended are kept, the others go on from their checkpoints. --set changes the experiment.
    """
    from pipeline import sweep as sweeps
    from pipeline import sweep_workflow

    console.use_cluster(address)
    sweep = sweeps.load(config, overrides or [], _changes(budget))
    outcome = sweep_workflow.tune(sweep, fresh=fresh, say=console.say)
    console.emit(_result(outcome), as_json=json, show=lambda: _show(outcome))


def _changes(budget: str | None) -> dict[str, Any]:
    """What --budget changes in the sweep file. Raises ConfigError."""
    from pipeline.errors import ConfigError

    if budget is None:
        return {}
    number = budget.removesuffix("m")
    try:
        if budget.endswith("m"):
            return {"budget_minutes": float(number)}
        return {"trials": int(number), "max_trials": int(number)}
    except ValueError:
        raise ConfigError(f"--budget {budget}: write a number of trials (12), or minutes (30m).") from None


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "sweep": str(outcome.folder),
        "resumed": outcome.resumed,
        "mlflow_run_id": outcome.mlflow_run_id,
        "trials": [trial.to_dict() for trial in outcome.trials],
        "best": {
            "trial": outcome.best.name,
            "params": outcome.best.params,
            "selection_score": outcome.best.score,
            "fresh_score": outcome.fresh.mean,
            "fresh_score_ci95": outcome.fresh.half_width,
        },
        "test": outcome.test.to_dict(),
        "registered": registration_result(outcome.registration) if outcome.registration else None,
        "look": outcome.hint,
    }


def _show(outcome: Outcome) -> None:
    keys = list(outcome.best.params)
    table = Table("trial", *(key.rsplit(".", 1)[-1] for key in keys), "status", "steps", "validation", title="trials")
    for trial in outcome.trials:
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params.get(key) for key in keys)]
        score = "–" if trial.score is None else _plain(trial.score, outcome.score_name)
        table.add_row(trial.name, *values, trial.status, str(trial.step), score)
    console.out.print(table)
    assert outcome.best.score is not None
    fresh = console.percent(outcome.fresh.mean, outcome.fresh.half_width, outcome.score_name)
    console.out.print(
        f"best: trial {outcome.best.name}, {_plain(outcome.best.score, outcome.score_name)} on the episodes that chose "
        f"it, [bold]{fresh}[/] on fresh ones",
        soft_wrap=True,
    )
    show_evaluation(outcome.test)
    if outcome.registration:
        show_registration(outcome.registration)
    picture = os.path.join(str(outcome.folder), "evaluation", "sweep.png")
    console.out.print(f"picture and table: {picture}", markup=False, soft_wrap=True)
    console.out.print(f"look at it: {outcome.hint}", markup=False, soft_wrap=True)


def _plain(score: float, score_name: str) -> str:
    return f"{100 * score:.2f} %" if score_name == "accuracy" else f"{score:.4f}"


if __name__ == "__main__":
    console.run(console.single_command(tune))
