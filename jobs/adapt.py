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


TABLES = (".csv", ".tsv")
BEST = 3  # classes shown beside a query where there are more than MOST_COLUMNS
MOST_COLUMNS = 8


class Normalization(StrEnum):
    inductive = "inductive"
    transductive = "transductive"


class Decimal(StrEnum):
    point = "."
    comma = ","


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
    delimiter: Annotated[str, typer.Option(help="Between the cells of a CSV file: one character, or tab.")] = ",",
    decimal: Annotated[Decimal, typer.Option(help="The sign in the numbers of a CSV file.")] = Decimal.point,
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

    from pipeline.datasets.preprocessing import Preprocessing, pictures_below
    from pipeline.datasets.tables.csv_blocks import delimiter_of
    from pipeline.errors import DataError
    from pipeline.shown_files import Rows, read_lines, read_rows, read_support

    delimiter = delimiter_of(delimiter)
    files: list[Path] = []
    shown = read_support(support, label=label, delimiter=delimiter) if _is_text(support) or _is_text(query) else None
    asked: Rows | list[str] = []
    if not _is_text(query):
        files = pictures_below(query)
    elif query.suffix.lower() in TABLES:
        asked = read_rows(query, delimiter=delimiter)
    else:
        asked = read_lines(query)

    from pipeline import serving  # what is wrong with the files was told before a model is fetched
    from pipeline.shown import table_rows
    from pipeline.tasks.tokens import Tokens

    learner = serving.load(model)
    preprocessing = learner.card.preprocessing
    support_x: Any
    query_x: Any
    names: list[dict[str, object]]
    if preprocessing is None:
        raise DataError(
            f"{model}: takes arrays {learner.card.input_shape} as they are, since its data sets say nothing of "
            "pictures, texts or rows, or differ in how they were made of them. Adapt it in Python: "
            "pipeline.serving.load(MODEL).adapt(support_x, support_y)."
        )
    if isinstance(preprocessing, Preprocessing):
        if shown is not None:
            raise DataError(
                f"{model}: takes pictures. Give --support a folder that holds a folder of pictures per class, and "
                "--query a picture or a folder of them."
            )
        adapted = learner.adapt_folder(support, adaptation_steps=adaptation_steps)
        query_x = learner.pictures(files)
        kind, names = "picture", [{"file": str(file)} for file in files]
    else:
        shown = shown or read_support(support, label=label, delimiter=delimiter)
        if isinstance(preprocessing, Tokens):
            support_x = shown.rows.cells(text, option="--text")
            query_x = asked.cells(text, option="--text") if isinstance(asked, Rows) else asked or read_lines(query)
            kind, names = "text", [{"text": each} for each in query_x]
        else:
            rows = asked if isinstance(asked, Rows) else read_rows(query, delimiter=delimiter)
            numeric = {column.name for column in preprocessing.columns if column.kind == "numeric"}
            support_x, query_x = (
                table_rows(
                    each.with_points(numeric, decimal.value),
                    preprocessing,
                    learner.dtype,
                    str(each.file),
                    place=each.place,
                )
                for each in (shown.rows, rows)
            )
            kind, names = "row", [{"row": number} for number in range(1, len(query_x) + 1)]
        adapted = learner.adapt(support_x, shown.labels, adaptation_steps=adaptation_steps)
    probabilities = adapted.predict(query_x, normalization=normalization.value)
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


def _is_text(file: Path) -> bool:
    return file.suffix.lower() in (*TABLES, ".txt")


def _table(title: str, kind: str, names: list[str], labels: list[Any], probabilities: np.ndarray) -> Table:
    """Each query's label and probabilities: a column per class, or of many classes the most probable ones."""
    words = [escape(console.harmless(str(label))) for label in labels]  # a folder's name may look like markup
    many = len(labels) > MOST_COLUMNS
    columns = [f"{place}." for place in range(2, BEST + 1)] if many else words
    table = Table(kind, "label", *(["probability"] if many else []), *columns, title=escape(title))
    for name, row in zip(names, probabilities, strict=True):
        first, *others = (-row).argsort(kind="stable")[:BEST]
        cells = [f"{p:.3f}" for p in row]
        if many:
            cells = [cells[first], *(f"{words[other]} {cells[other]}" for other in others)]
        table.add_row(escape(console.harmless(name)), f"[bold]{words[first]}[/]", *cells)
    return table


if __name__ == "__main__":
    console.run(console.single_command(adapt))
