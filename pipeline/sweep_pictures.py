"""One picture of a sweep: two keys against the score, every key of every trial, learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.pictures import new_figure
from pipeline.sweep import SHORT_NAMES, Params

TrialData = tuple[Params, float | None, str, list[dict[str, Any]]]  # params, best score, status, journal
COLOURS = "viridis"


def sweep(trials: Sequence[TrialData], *, metric: str, higher_is_better: bool, file: Path) -> None:
    """trials: the best first. Those that never came to a validation are crosses, without a colour."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scores = [score for _, score, _, _ in trials if score is not None and math.isfinite(score)]
    norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1e-9)
    colours = colormaps[COLOURS if higher_is_better else f"{COLOURS}_r"]
    keys = _two_keys(trials)
    figure = new_figure(13.5, 4.2)
    rates, parallel, curves = figure.subplots(1, 3)
    _rates(rates, trials, keys, norm, colours)
    _parallel(parallel, trials, norm, colours)
    _curves(curves, trials, metric, norm, colours)
    label = metric.removeprefix("val_").replace("_", ", ", 1)
    figure.colorbar(ScalarMappable(norm, colours), ax=[rates, parallel, curves], label=f"best validation {label}")
    figure.savefig(file)


def _two_keys(trials: Sequence[TrialData]) -> list[str]:
    """The inner and outer learning rate where both vary, else the first two keys."""
    keys = list(trials[0][0])
    both = [key for key in SHORT_NAMES.values() if key in keys]
    return both if len(both) == 2 else keys[:2]


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _rates(axis: Any, trials: Sequence[TrialData], keys: list[str], norm: Any, colours: Any) -> None:
    """A heat map where the trials fill a grid, points where they were drawn."""
    if len(keys) < 2 or not all(_is_number(params.get(key)) for params, *_ in trials for key in keys):
        keys = keys[:1]
    first = [_number(params[keys[0]], i) for i, (params, *_) in enumerate(trials)]
    second = [float(params[keys[1]]) if len(keys) > 1 else score or norm.vmin for params, score, *_ in trials]
    xs, ys = sorted(set(first)), sorted(set(second))
    if len(keys) > 1 and 1 < len(xs) * len(ys) == len({*zip(first, second, strict=True)}) and len(xs) > 1 < len(ys):
        cells = np.full((len(ys), len(xs)), np.nan)
        for x, y, (_, score, *_) in zip(first, second, trials, strict=True):
            cells[ys.index(y), xs.index(x)] = math.nan if score is None else score
        axis.imshow(cells, origin="lower", norm=norm, cmap=colours, aspect="auto")
        axis.set_xticks(range(len(xs)), [f"{x:.3g}" for x in xs])
        axis.set_yticks(range(len(ys)), [f"{y:.3g}" for y in ys])
    else:
        for x, y, (_, score, *_) in zip(first, second, trials, strict=True):
            if score is None:
                axis.plot(x, y, "x", color="tab:gray")
            else:
                axis.plot(x, y, "o", color=colours(norm(score)), markersize=9, markeredgecolor="black", zorder=3)
        for scale, values in ((axis.set_xscale, first), (axis.set_yscale, second if len(keys) > 1 else [0.0])):
            if min(values) > 0 and max(values) > 8 * min(values):
                scale("log")
        axis.grid(alpha=0.3, which="both")
    axis.set_xlabel(_short(keys[0]))
    axis.set_ylabel(_short(keys[1]) if len(keys) > 1 else "score")
    axis.set_title("trials by learning rates" if set(keys) == set(SHORT_NAMES.values()) else "trials", fontsize=10)


def _parallel(axis: Any, trials: Sequence[TrialData], norm: Any, colours: Any) -> None:
    """A line for each trial over its keys, each axis from its lowest to its highest value."""
    keys = list(trials[0][0])
    scaled: dict[str, list[float]] = {}
    for key in keys:
        values = [_number(params[key], _rank(key, params[key], trials)) for params, *_ in trials]
        if min(values) > 0 and max(values) > 8 * min(values):
            values = [math.log(v) for v in values]
        span = (max(values) - min(values)) or 1.0
        scaled[key] = [(v - min(values)) / span for v in values]
    finite = [s for _, s, *_ in trials if s is not None]
    span = (max(finite) - min(finite)) or 1.0
    for i, (_, score, *_) in reversed(list(enumerate(trials))):
        line = [scaled[key][i] for key in keys] + ([(score - min(finite)) / span] if score is not None else [])
        style = {"color": colours(norm(score))} if score is not None else {"color": "tab:gray", "linestyle": ":"}
        axis.plot(range(len(line)), line, linewidth=2.4 if i == 0 else 1.2, **style)
    axis.set_xticks(range(len(keys) + 1), [*map(_short, keys), "score"], rotation=20)
    axis.set_yticks([0, 1], ["lowest", "highest"])
    axis.set_title("parallel coordinates", fontsize=10)
    for x in range(len(keys) + 1):
        axis.axvline(x, color="tab:gray", linewidth=0.6)


def _curves(axis: Any, trials: Sequence[TrialData], metric: str, norm: Any, colours: Any) -> None:
    for i, (_, score, status, records) in reversed(list(enumerate(trials))):
        points = [(r["step"], r[metric]) for r in records if metric in r and math.isfinite(r[metric])]
        if not points or score is None:
            continue
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, "-", color=colours(norm(score)), linewidth=2.4 if i == 0 else 1.2)
        if status == "stopped":
            axis.plot(steps[-1], values[-1], "|", color=colours(norm(score)), markersize=12, markeredgewidth=2)
    axis.set_xlabel("outer step")
    axis.set_ylabel(metric.removeprefix("val_").replace("_", ", ", 1))
    axis.set_title("validation (bar: stopped early)", fontsize=10)
    axis.grid(alpha=0.3)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, instead: int) -> float:
    return float(value) if _is_number(value) else float(instead)


def _rank(key: str, value: Any, trials: Sequence[TrialData]) -> int:
    return sorted({str(params[key]) for params, *_ in trials}).index(str(value))
