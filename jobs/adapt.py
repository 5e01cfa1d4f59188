"""`metapipe adapt`: adapt a registered model to your own classes and label your pictures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs import console
from jobs.evaluate import Model


class Normalization(StrEnum):
    inductive = "inductive"
    transductive = "transductive"


def adapt(
    model: Model,
    support: Annotated[Path, typer.Option(help="A folder per class with a few pictures each (PNG, JPEG, any size).")],
    query: Annotated[Path, typer.Option(help="A folder of pictures to label (subfolders too), or one picture.")],
    adaptation_steps: Annotated[int | None, typer.Option(min=0, help="Default: as in evaluation.")] = None,
    normalization: Annotated[
        Normalization,
        typer.Option(help="inductive: no answer depends on the other queries; transductive: they share statistics."),
    ] = Normalization.inductive,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: console.Json = False,
) -> None:
    """Show a model a few examples of your own classes; it labels your pictures with probabilities."""
    import json as json_format

    from pipeline import serving
    from pipeline.datasets.preprocessing import pictures_below

    files = pictures_below(query)
    learner = serving.load(model)
    adapted = learner.adapt_folder(support, adaptation_steps=adaptation_steps)
    probabilities = adapted.predict_pictures(files, normalization=normalization.value)
    predictions = [
        {
            "file": str(file),
            "label": adapted.labels[row.argmax()],
            "probability": round(float(row.max()), 6),
            "probabilities": {label: round(float(p), 6) for label, p in zip(adapted.labels, row, strict=True)},
        }
        for file, row in zip(files, probabilities, strict=True)
    ]
    result = {
        "model": model,
        "labels": adapted.labels,
        "normalization": normalization.value,
        "predictions": predictions,
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_format.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def show() -> None:
        labels = [escape(str(label)) for label in adapted.labels]  # a folder's name may look like markup
        table = Table("picture", "label", *labels, title=f"{escape(model)}, {normalization.value}")
        for prediction, row in zip(predictions, probabilities, strict=True):
            cells = (f"{p:.3f}" for p in row)
            table.add_row(escape(str(prediction["file"])), f"[bold]{escape(prediction['label'])}[/]", *cells)
        console.out.print(table)

    console.emit(result, as_json=json, show=show)


if __name__ == "__main__":
    console.run(console.single_command(adapt))
