"""`metapipe evaluate`: a registered model on fixed episodes of unseen classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from jobs import console
from jobs.data import part_of_split
from jobs.train import show_evaluation

if TYPE_CHECKING:
    from pipeline.workflow import ModelEvaluation

Model = Annotated[str, typer.Argument(help="models:/NAME@champion, models:/NAME/VERSION, or a model's folder.")]


def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Prepared data set; default: the one it was trained on.")] = None,
    class_split: Annotated[str | None, typer.Option(help="Class split of the data set; default: training's.")] = None,
    part: Annotated[str, typer.Option(help="meta_test, meta_val or meta_train.")] = "meta_test",
    episodes: Annotated[int, typer.Option(min=2)] = 1000,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the episodes; default: the fixed test episodes.")] = None,
    adaptation_steps: Annotated[int | None, typer.Option(min=0, help="Default: as configured.")] = None,
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
    """Mean and 95 % interval over episodes, inductive and transductive, after 0…k adaptation steps."""
    from pipeline import results, serving, workflow
    from pipeline.storage import absolute
    from pipeline.training.evaluate import TEST_SEED

    result = workflow.evaluate_model(
        serving.load(model),
        data=absolute(data) if data else None,
        class_split=class_split,
        part=part_of_split(part),
        episodes=episodes,
        seed=TEST_SEED if seed is None else seed,
        steps=adaptation_steps,
        k_shot=k_shot,
        n_query=n_query,
        baselines=baselines,
        report=report,
    )
    if out:
        results.write(result.evaluation, out)
    console.emit(_result(model, result), as_json=json, show=lambda: _show(model, result, out, report))


def _result(model: str, result: ModelEvaluation) -> dict[str, Any]:
    return {
        "model": model,
        "trained_on_this_data": result.trained_on_this_data,
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


if __name__ == "__main__":
    console.run(console.single_command(evaluate))
