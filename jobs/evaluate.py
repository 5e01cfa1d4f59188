"""`metapipe evaluate`: a registered model on fixed episodes of unseen classes, of its own data set or of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs import console
from jobs.train import show_evaluation

if TYPE_CHECKING:
    from pipeline.workflow import ModelEvaluation

Model = Annotated[str, typer.Argument(help="models:/NAME@champion, models:/NAME/VERSION, or a model's folder.")]


def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Prepared data set; default: the one it was trained on. Repeatable: one table of all."),
    ] = None,
    class_split: Annotated[
        str | None, typer.Option(help="Class split of the data set; default: training's, or the only one there is.")
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="meta_test|meta_val|meta_train|all",
            help="Of the class split. all: every class of data that was never trained on, whatever its splits.",
        ),
    ] = "meta_test",
    episodes: Annotated[int, typer.Option(min=2)] = 1000,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the episodes; default: the fixed test episodes.")] = None,
    adaptation_steps: Annotated[int | None, typer.Option(min=0, help="Default: as configured.")] = None,
    n_way: Annotated[int | None, typer.Option(min=2, help="Classes of an episode; default: training's.")] = None,
    k_shot: Annotated[int | None, typer.Option(min=1, help="Support examples per class; default: training's.")] = None,
    n_query: Annotated[int | None, typer.Option(min=1, help="Query examples per class.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also the untrained network and nearest neighbour, same episodes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write per-episode results to this Parquet file.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write to this folder which classes are hard and which are confused.")
    ] = None,
    json: console.Json = False,
) -> None:
    """Mean and 95 % interval over episodes, inductive and transductive, after 0…k adaptation steps.

    Train on one data set, test on others:
    metapipe evaluate models:/A@champion --data data/b --data data/c --part all
    """
    from pipeline import results, serving, workflow
    from pipeline.errors import ConfigError
    from pipeline.storage import absolute
    from pipeline.training.evaluate import TEST_SEED
    from pipeline.types import SPLITS

    if part not in (*SPLITS, "all"):
        raise ConfigError(f"--part {part}: choose one of {', '.join(SPLITS)}, all.")
    several = len(data or []) > 1
    if several and (out or report):
        raise ConfigError("--out and --report are of one data set: give one --data, or evaluate them one by one.")
    found = workflow.evaluate_model_on(
        serving.load(model),
        [absolute(folder) for folder in data] if data else [None],
        class_split=class_split,
        part=part,  # type: ignore[arg-type]
        episodes=episodes,
        seed=TEST_SEED if seed is None else seed,
        steps=adaptation_steps,
        n_way=n_way,
        k_shot=k_shot,
        n_query=n_query,
        baselines=baselines,
        report=report,
    )
    for note in dict.fromkeys(note for result in found for note in result.notes):
        console.say(note)
    if several:
        content = {"model": model, "data_sets": [_result(model, result) for result in found]}
        console.emit(content, as_json=json, show=lambda: _show_all(model, found))
        return
    (result,) = found
    if out:
        results.write(result.evaluation, out)
    console.emit(_result(model, result), as_json=json, show=lambda: _show(model, result, out, report))


def _result(model: str, result: ModelEvaluation) -> dict[str, Any]:
    return {
        "model": model,
        "data": result.data,
        "trained_on_this_data": result.trained_on_this_data,
        "notes": result.notes,
        **result.evaluation.to_dict(),
        "baselines": [
            {
                "name": c.name,
                "mean": c.score.mean,
                "ci95": c.score.half_width,
                "advantage": c.advantage.mean,
                "advantage_ci95": c.advantage.half_width,
                "mode": result.mode,
            }
            for c in result.comparisons
        ],
    }


def _show(model: str, result: ModelEvaluation, out: Path | None, report: Path | None) -> None:
    evaluation = result.evaluation
    console.out.print(
        f"[bold]{escape(model)}[/] on data {evaluation.data_digest[:12]}…, episode seed {evaluation.seed}",
        soft_wrap=True,
    )
    if not result.trained_on_this_data:
        console.out.print("This is another data set than the model was trained on.")
    show_evaluation(evaluation)
    for c in result.comparisons:
        console.out.print(
            f"{c.name}: {console.percent(c.score.mean, c.score.half_width, evaluation.score_name)}; the model is "
            f"better by {console.percent(c.advantage.mean, c.advantage.half_width, evaluation.score_name)} "
            f"({result.mode}, paired by episode)",
            highlight=False,
            soft_wrap=True,
        )
    if out:
        console.out.print(f"per-episode results: {out}", soft_wrap=True)
    if report:
        console.out.print(f"hard classes and confusions: {report}", soft_wrap=True)


def _show_all(model: str, found: list[ModelEvaluation]) -> None:
    """A row for each data set, after the last adaptation step."""
    first = found[0].evaluation
    names = [c.name for c in found[0].comparisons]
    table = Table(
        *("data set", "classes of", "task", "inductive", "transductive", *names),
        title=f"{escape(model)}: {first.score_name} on {first.episodes} episodes each, 95 % interval over episodes",
    )
    for result in found:
        evaluation = result.evaluation
        task = evaluation.task
        split = task.get("class_split")
        estimates = [evaluation.score(mode) for mode in ("inductive", "transductive")]
        estimates += [comparison.score for comparison in result.comparisons]
        table.add_row(
            f"{escape(result.data or 'its own')}{' (trained on)' if result.trained_on_this_data else ''}",
            escape(f"{evaluation.split}, {split}" if split != "every class" else "all"),
            f"{task.get('n_way')}-way {task.get('k_shot')}-shot",
            *(console.percent(e.mean, e.half_width, evaluation.score_name) for e in estimates),
        )
    console.out.print(table)
    if names:
        console.out.print(f"{' and '.join(names)}: {found[0].mode}, on the same episodes")


if __name__ == "__main__":
    console.run(console.single_command(evaluate))
