"""`metapipe train`: train, evaluate and register what a configuration file describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jobs import console

if TYPE_CHECKING:
    from pipeline.experiment import Experiment
    from pipeline.training.evaluate import Evaluation
    from pipeline.workflow import Outcome, Registration


def train(
    config: Annotated[Path, typer.Argument(help="Experiment file, e.g. configs/demo.yaml.")],
    overrides: console.Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Leave an unfinished run as it is and start anew.")] = False,
    address: console.Address = None,
    json: console.Json = False,
) -> None:
    """Train a meta-initialization, evaluate it on unseen classes, register it in MLflow.

    An unfinished run goes on from its last checkpoint when the same command is run again; a finished one starts
    a new run.
    """
    from pipeline import experiment as experiments
    from pipeline import workflow

    console.use_cluster(address)
    experiment = experiments.load(config, overrides or [])
    with Display(experiment) as display:
        outcome = workflow.train(experiment, fresh=fresh, observe=display.observe, say=display.say)
    console.emit(_result(outcome), as_json=json, show=lambda: _show(outcome))


class Display:
    """The live line: step, meta-loss, validation score with its interval, tasks/s, time left."""

    def __init__(self, experiment: Experiment) -> None:
        self._total = experiment.training.steps
        self._mode = experiment.evaluation.selection_mode
        self._validation = ""
        self._progress = Progress(
            TextColumn("[bold]outer step[/]"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[status]}"),
            console=console.err,
        )
        self._task = self._progress.add_task("training", total=self._total, status="starting the workers")
        self._interactive = console.err.is_terminal

    def __enter__(self) -> Display:
        if self._interactive:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._interactive:
            self._progress.stop()

    def say(self, line: str) -> None:
        console.say(line)

    def observe(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            validation = _validation(record, self._mode)
            if validation:
                self._validation = validation
                if not self._interactive:
                    self.say(f"outer step {record['step']}/{self._total}: {_status(record)}  {validation}")
        if records:
            status = f"{_status(records[-1])}  {self._validation}"
            self._progress.update(self._task, completed=records[-1]["step"], status=status)


def _status(record: dict[str, Any]) -> str:
    loss = f"meta-loss {record['meta_loss']:.3f}" if "meta_loss" in record else "step skipped: not finite"
    return f"{loss}  {record['tasks_per_second']:.0f} tasks/s"


def _validation(record: dict[str, Any], mode: str) -> str:
    for name in ("accuracy", "mse"):
        key = f"val_{name}_{mode}"
        if key in record:
            return f"validation {name} {console.percent(record[key], record[f'{key}_ci95'], name)} ({mode})"
    return ""


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": str(outcome.run.path),
        "resumed": outcome.resumed,
        "mlflow_run_id": outcome.mlflow_run_id,
        "test": outcome.test.to_dict(),
        "registered": registration_result(outcome.registration) if outcome.registration else None,
        "look": outcome.hint,
    }


def registration_result(registration: Registration) -> dict[str, Any]:
    return {
        "model": f"models:/{registration.name}/{registration.version}",
        "version": registration.version,
        "champion": registration.decision.promote,
        "reason": registration.decision.reason,
    }


def _show(outcome: Outcome) -> None:
    show_evaluation(outcome.test)
    if outcome.registration:
        show_registration(outcome.registration)
    console.out.print(f"run folder: {outcome.run.path}", markup=False, soft_wrap=True)
    console.out.print(f"look at it: {outcome.hint}", markup=False, soft_wrap=True)


def show_registration(registration: Registration) -> None:
    alias = "champion" if registration.decision.promote else "candidate"
    console.out.print(
        f"registered models:/{registration.name}/{registration.version} as [bold]{alias}[/]: "
        f"{registration.decision.reason}",
        soft_wrap=True,
    )


def show_evaluation(evaluation: Evaluation) -> None:
    """The score by mode and adaptation step."""
    title = f"{evaluation.score_name} on {evaluation.episodes} {evaluation.split} episodes, 95 % interval over episodes"
    table = Table("adaptation steps", "inductive", "transductive", title=title)
    for step in range(evaluation.adaptation_steps + 1):
        inductive, transductive = (evaluation.score(mode, step) for mode in ("inductive", "transductive"))
        cells = (console.percent(e.mean, e.half_width, evaluation.score_name) for e in (inductive, transductive))
        table.add_row(str(step), *cells)
    for name, of_set in evaluation.of_sets().items():
        estimates = (of_set.score(mode) for mode in ("inductive", "transductive"))
        cells = (console.percent(e.mean, e.half_width, evaluation.score_name) for e in estimates)
        table.add_row(f"{name}, after the last", *cells)
    console.out.print(table)


if __name__ == "__main__":
    console.run(console.single_command(train))
