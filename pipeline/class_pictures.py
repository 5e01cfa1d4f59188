"""Pictures of hard classes and groups, and of those that are taken for each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pipeline.pictures import new_figure, sheet

if TYPE_CHECKING:
    from pipeline.class_report import ClassReport

CLASSES_SHOWN = 20  # hardest ones
GROUPS_SHOWN = 30  # hardest ones
NAME_LETTERS = 40


def hard_classes(report: ClassReport, file: Path) -> None:
    """Accuracies of the hardest groups and the hardest classes, hardest on top, with 95 % intervals."""
    groups, classes = report.hardest_groups()[:GROUPS_SHOWN], report.hardest_classes()[:CLASSES_SHOWN]
    figure = new_figure(11, 1.2 + 0.22 * max(len(groups), len(classes)))
    for axis, numbers, names, shares, title in zip(
        figure.subplots(1, 2),
        (groups, classes),
        (report.groups, report.names),
        (report.of_group, report.of_class),
        (
            f"hardest {len(groups)} of {len(report.groups)} groups",
            f"hardest {len(classes)} of {len(report.names)} classes",
        ),
        strict=True,
    ):
        rows = np.arange(len(numbers))
        share, half_width = shares.share[numbers], np.nan_to_num(shares.half_width[numbers])
        inside = [np.minimum(half_width, share), np.minimum(half_width, 1 - share)]
        axis.errorbar(share, rows, xerr=inside, fmt=".", linewidth=0.8)
        axis.set_xlim(-0.02, 1.02)
        axis.set_yticks(rows, [f"{_short(names[i])} ({shares.episodes[i]})" for i in numbers], fontsize=6)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set(xlabel=f"{report.mode} accuracy, 95 % clustered by episode", title=f"{title} (episodes)")
    figure.savefig(file)


def confusions(pairs: Sequence[dict[str, Any]], images: Tensor, file: Path) -> None:
    """The most confused pairs, a row each: examples of the one class, a line, examples of the other.

    images: uint8 [2·pairs, examples, C, H, W], of the pairs' classes in order.
    """
    figure = new_figure(9, 0.6 + 0.75 * max(len(pairs), 1))
    axes = np.atleast_1d(figure.subplots(max(len(pairs), 1), 1)).ravel()
    for axis in axes:
        axis.set_axis_off()
    if not pairs:
        axes[0].set_title("no query was answered by another class", fontsize=8)
    for number, (axis, pair) in enumerate(zip(axes, pairs, strict=False)):
        one, other = (images[2 * number + i].unsqueeze(0).cpu().numpy() / 255 for i in range(2))
        picture, border = sheet(one, other)
        axis.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None, vmin=0, vmax=1)
        axis.axvline(border, color="tab:red", linewidth=1.5)
        first, second = map(_short, pair["classes"])
        taken, back = pair["confused"]
        share = f"of {pair['queries']} queries ({100 * pair['rate']:.0f} %)"
        axis.set_title(f"{first}  |  {second}: {taken} → and {back} ← {share}", fontsize=7)
    figure.savefig(file)


def group_confusions(report: ClassReport, file: Path) -> None:
    """How often a query of a row's group is answered by another class of the column's, where it could have been."""
    shown = sorted(report.hardest_groups()[:GROUPS_SHOWN])
    size = len(report.groups)
    rate = 100 * report.relation.share.reshape(size, size)[np.ix_(shown, shown)]
    figure = new_figure(3 + 0.32 * len(shown), 2.2 + 0.3 * len(shown))
    axis = figure.subplots()
    picture = axis.imshow(rate, cmap="magma_r", vmin=0)
    axis.set_facecolor("lightgray")  # groups that never met
    names = [_short(report.groups[g]) for g in shown]
    axis.set_xticks(range(len(shown)), names, rotation=90, fontsize=6)
    axis.set_yticks(range(len(shown)), names, fontsize=6)
    axis.set(xlabel="answered by a class of", ylabel="query of a class of", title=f"confusions per 100 ({report.mode})")
    if len(shown) <= 12:
        for row, column in np.argwhere(~np.isnan(rate)):
            dark = rate[row, column] > np.nanmax(rate) / 2
            text, colour = f"{rate[row, column]:.2g}", "white" if dark else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(picture, ax=axis, shrink=0.8)
    figure.savefig(file)


def _short(name: str) -> str:
    """Names come from data sets: of bounded length, and without what matplotlib reads as formulas."""
    name = name if len(name) <= NAME_LETTERS else f"…{name[1 - NAME_LETTERS :]}"
    return name.replace("$", r"\$")
