"""One picture of a reproduction: published and own accuracies with their intervals, a panel for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.pictures import new_figure

if TYPE_CHECKING:
    from pipeline.reproduce_table import Row

MARKS = {"published": ("D", "tab:gray"), "inductive": ("o", "tab:blue"), "transductive": ("s", "tab:orange")}
OFFSETS = {"published": -0.22, "inductive": 0.0, "transductive": 0.22}


def accuracies(rows: Sequence[Row], titles: dict[str, str], settings: Sequence[str], file: Path) -> None:
    """A line for each algorithm; what was not run says so."""
    algorithms = list(dict.fromkeys(row.algorithm for row in rows))
    figure = new_figure(1.6 + 3.4 * len(settings), 1.2 + 0.42 * len(algorithms))
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for row in rows:
            if row.setting == setting:
                _draw(panel, row, algorithms.index(row.algorithm))
        panel.set_title(setting)
        panel.set_xlabel("accuracy in %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(algorithms)), [titles.get(algorithm, algorithm) for algorithm in algorithms])
    panels[0].set_ylim(len(algorithms) - 0.5, -0.5)
    labels = ("published (hollow: inductive)", "ours, inductive", "ours, transductive")
    for label, (marker, colour) in zip(labels, MARKS.values(), strict=True):
        panels[0].plot([], [], marker, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)


def _draw(panel: Any, row: Row, line: int) -> None:
    for mode, accuracy in row.published.items():
        _point(panel, "published", accuracy, line, hollow=mode == "inductive")
    for kind, own in (("inductive", row.inductive), ("transductive", row.transductive)):
        if own is not None:
            _point(panel, kind, own, line)
    if row.status != "finished":
        place = panel.get_yaxis_transform()  # x from 0 to 1 over the panel
        panel.text(0.02, line + 0.11, row.status, transform=place, fontsize=6, color="tab:gray", va="center")


def _point(panel: Any, kind: str, accuracy: Any, line: int, *, hollow: bool = False) -> None:
    marker, colour = MARKS[kind]
    panel.errorbar(
        100 * accuracy.mean,
        line + OFFSETS[kind],
        xerr=None if accuracy.ci95 is None else 100 * accuracy.ci95,
        fmt=marker,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markersize=4.5,
        capsize=2,
    )
