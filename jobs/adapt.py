"""`metapipe adapt`: adapt a registered model to your own classes and label your pictures, texts or rows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs import console
from jobs.evaluate import Model

if TYPE_CHECKING:
    import numpy as np


BEST = 3  # classes shown beside a query where there are more than MOST_COLUMNS
MOST_COLUMNS = 8


class Normalization(StrEnum):
    inductive = "inductive"
    transductive = "transductive"


def adapt(
    model: Model,
    support: Annotated[
        Path, typer.Option(help="Pictures: a folder per class with a few each. Texts or rows: a CSV file with labels.")
    ],
    query: Annotated[
        Path, typer.Option(help="Pictures: a folder (subfolders too), or one. Rows: a CSV file. Texts: that, or lines.")
    ],
    label: Annotated[str, typer.Option(help="Column of the labels in a CSV file.")] = "label",
    text: Annotated[str, typer.Option(help="Column of the texts in a CSV file, for a model of texts.")] = "text",
    adaptation_steps: Annotated[int | None, typer.Option(min=0, help="Default: as in evaluation.")] = None,
    normalization: Annotated[
        Normalization,
        typer.Option(help="inductive: no answer depends on the other queries; transductive: they share statistics."),
    ] = Normalization.inductive,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: console.Json = False,
) -> None:
    """Show a model a few examples of your own classes; it labels your pictures, texts or rows with probabilities."""
    import json as json_format

    from pipeline import serving
    from pipeline.datasets.preprocessing import pictures_below
    from pipeline.errors import DataError
    from pipeline.shown_files import read_queries, read_support
    from pipeline.tasks.tables import TableEncoding
    from pipeline.tasks.tokens import Tokens

    files: list[Path] = []
    if query.suffix.lower() not in (".csv", ".txt"):
        files = pictures_below(query)  # before a model is fetched
    learner = serving.load(model)
    preprocessing = learner.card.preprocessing
    if preprocessing is None:
        raise DataError(
            f"{model}: takes arrays {learner.card.input_shape} as they are, since its data sets say nothing of "
            "pictures, texts or rows, or differ in how they were made of them. Adapt it in Python: "
            "pipeline.serving.load(MODEL).adapt(support_x, support_y)."
        )
    if isinstance(preprocessing, Tokens | TableEncoding):
        column = text if isinstance(preprocessing, Tokens) else None
        examples = read_queries(query, text=column)
        shown = read_support(support, label=label, text=column)
        adapted = learner.adapt(shown.examples, shown.labels, adaptation_steps=adaptation_steps)
        probabilities = adapted.predict(examples, normalization=normalization.value)
        kind = "text" if column else "row"
        names: list[dict[str, object]] = [
            {kind: example if column else number} for number, example in enumerate(examples, start=1)
        ]
    else:
        files = files or pictures_below(query)
        adapted = learner.adapt_folder(support, adaptation_steps=adaptation_steps)
        probabilities = adapted.predict_pictures(files, normalization=normalization.value)
        kind = "picture"
        names = [{"file": str(file)} for file in files]
    predictions = [
        {
            **name,
            "label": adapted.labels[row.argmax()],
            "probability": round(float(row.max()), 6),
            "probabilities": {label: round(float(p), 6) for label, p in zip(adapted.labels, row, strict=True)},
        }
        for name, row in zip(names, probabilities, strict=True)
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
        shown_as = [str(next(iter(name.values()))) for name in names]
        console.out.print(_table(f"{model}, {normalization.value}", kind, shown_as, adapted.labels, probabilities))

    console.emit(result, as_json=json, show=show)


def _table(title: str, kind: str, names: list[str], labels: list[Any], probabilities: np.ndarray) -> Table:
    """Each query's label and probabilities: a column per class, or of many classes the most probable ones."""
    words = [escape(str(label)) for label in labels]  # a folder's name may look like markup
    many = len(labels) > MOST_COLUMNS
    columns = [f"{place}." for place in range(2, BEST + 1)] if many else words
    table = Table(kind, "label", *(["probability"] if many else []), *columns, title=escape(title))
    for name, row in zip(names, probabilities, strict=True):
        first, *others = (-row).argsort(kind="stable")[:BEST]
        cells = [f"{p:.3f}" for p in row]
        if many:
            cells = [cells[first], *(f"{words[other]} {cells[other]}" for other in others)]
        table.add_row(escape(name), f"[bold]{words[first]}[/]", *cells)
    return table


if __name__ == "__main__":
    console.run(console.single_command(adapt))
