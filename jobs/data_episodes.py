"""Episodes of texts and tables in words, for `metapipe data show`."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs import console

COLUMNS_SHOWN = 8  # of a table


def supports(content: dict[str, Any], modality: str, part: Any, *, episodes: int, seed: int) -> list[dict[str, Any]]:
    """The support sets of some episodes: class -> its examples, texts or rows by column."""
    import torch

    from pipeline.config import validate
    from pipeline.tasks.tabular import TabularTasksConfig
    from pipeline.tasks.text import TextTasksConfig

    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    slots = torch.arange(episodes)
    if modality == "text":
        of_text = validate(TextTasksConfig, {"family": "text", **content}, source="data show").only(part).build(**how)
        batch = of_text.sample(part, 0, slots, seed=seed)
        examples: list[list[Any]] = [support for support, _ in of_text.sentences(part, 0, slots, seed=seed)]
        entries = of_text.entries(part)
    else:
        section = validate(TabularTasksConfig, {"family": "tabular", **content}, source="data show").only(part)
        of_table = section.build(**how)
        batch = of_table.sample(part, 0, slots, seed=seed)
        columns = of_table.manifest.columns
        support, _ = of_table.rows(part, 0, slots, seed=seed)
        examples = [[_row(columns, row) for row in task] for task in support.tolist()]
        entries = of_table.entries(part)
    assert batch.classes is not None
    shots = content["k_shot"]
    return [
        {entries[c].name: task[i * shots : (i + 1) * shots] for i, c in enumerate(classes)}
        for classes, task in zip(batch.classes.tolist(), examples, strict=True)
    ]


def _row(columns: Any, row: list[float]) -> dict[str, Any]:
    """By column; None where a value is missing."""
    named: dict[str, Any] = {}
    for column, value in zip(columns, row, strict=True):
        known = value if value == value else None
        named[column.name] = known if known is None or column.kind == "numeric" else column.categories[int(known)]
    return named


def show(episodes: list[dict[str, Any]]) -> None:
    for number, episode in enumerate(episodes, start=1):
        table = Table("class", "support examples", title=f"episode {number}")
        for name, examples in episode.items():
            shown = "\n".join(_short(example) for example in examples)
            table.add_row(escape(console.harmless(name)), escape(console.harmless(shown)))
        console.out.print(table)


def _short(example: Any) -> str:
    if isinstance(example, str):
        return example
    cells = [f"{name} {'–' if value is None else value}" for name, value in list(example.items())[:COLUMNS_SHOWN]]
    return ", ".join(cells) + (", …" if len(example) > COLUMNS_SHOWN else "")
