"""Pictures for people: episodes as rows of images, training curves, accuracy by adaptation step, what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.movement import Movement
from pipeline.training.evaluate import MODES, Estimate, Evaluation
from pipeline.training.journal import CLOCK_METRICS
from pipeline.types import TaskBatch

DPI = 120
MOST_IN_A_LEGEND = 12
COMMON_METRICS = {
    "step",
    "time",
    "outer_lr",
    "meta_loss",
    "meta_grad_norm",
    "skipped_steps",
    "task_chunk",
    *CLOCK_METRICS,
}


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global pyplot state
    return figure


def episodes(batch: TaskBatch, file: Path, *, max_queries: int = 5) -> None:
    """Each episode as a block: a row per class, support images left of the line, queries right of it.

    Classes may differ in shots; there are as many columns as the largest number of them.
    """
    tasks = len(batch.support_x)
    n_way = batch.num_classes
    assert n_way is not None
    k_shot = int((batch.support_y.unsqueeze(-1) == torch.arange(n_way, device=batch.support_y.device)).sum(1).max())
    n_query = min(batch.query_x.shape[1] // n_way, max_queries)
    columns = min(tasks, 2)
    figure = new_figure(columns * (0.55 * (k_shot + n_query) + 0.6), -(-tasks // columns) * (0.55 * n_way + 0.4))
    axes = np.atleast_1d(figure.subplots(-(-tasks // columns), columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for task, axis in enumerate(axes[:tasks]):
        support = batch.support_x.new_zeros(n_way, k_shot, *batch.support_x.shape[2:])
        for label in range(n_way):
            own = batch.support_x[task][batch.support_y[task] == label]
            support[label, : len(own)] = own
        query = batch.query_x[task].unflatten(0, (n_way, -1))[:, :n_query]
        picture, border = sheet(support.cpu().numpy(), query.cpu().numpy())
        axis.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None, vmin=0, vmax=1)
        axis.axvline(border, color="tab:red", linewidth=1.5)
        axis.set_title(f"episode {task}: {k_shot}-shot support | query", fontsize=7)
    figure.savefig(file)


def sheet(support: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, float]:
    """[W, K, C, H, W'] and [W, Q, C, H, W'] -> one picture, and where the line between them goes."""
    images = np.concatenate([support, query], axis=1).transpose(0, 1, 3, 4, 2)
    rows, columns, height, width, channels = images.shape
    framed = np.ones((rows, columns, height + 2, width + 2, channels), dtype=images.dtype) * 0.5
    framed[:, :, 1:-1, 1:-1] = images
    picture = framed.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 2), columns * (width + 2), channels)
    return (picture[..., 0] if channels == 1 else picture), support.shape[1] * (width + 2) - 0.5


def training_curves(records: Sequence[dict[str, Any]], score_name: str, file: Path) -> None:
    """Meta-loss by outer step, and the validation scores with their 95 % bands."""
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    training = [r for r in records if "meta_loss" in r]
    left.plot([r["step"] for r in training], [r["meta_loss"] for r in training], linewidth=0.6)
    left.set(xlabel="outer step", ylabel="meta-loss (query loss after adaptation)")
    for mode in MODES:
        key = f"val_{score_name}_{mode}"
        points = [r for r in records if key in r]
        steps = [r["step"] for r in points]
        mean = np.array([r[key] for r in points])
        band = np.array([r[f"{key}_ci95"] for r in points])
        right.plot(steps, mean, marker=".", label=mode)
        right.fill_between(steps, mean - band, mean + band, alpha=0.2)
    right.set(xlabel="outer step", ylabel=f"validation {score_name}")
    right.legend()
    figure.savefig(file)


def adaptation_curve(evaluation: Evaluation, file: Path) -> None:
    """The score after 0…k adaptation steps with 95 % intervals, both modes."""
    figure = new_figure(4.5, 3.4)
    axis = figure.subplots()
    steps = range(evaluation.adaptation_steps + 1)
    for mode in MODES:
        estimates = [evaluation.score(mode, k) for k in steps]
        axis.errorbar(steps, [e.mean for e in estimates], [e.half_width for e in estimates], marker=".", label=mode)
    axis.set(
        xlabel="adaptation steps",
        ylabel=f"{evaluation.split} {evaluation.score_name}",
        title=f"{evaluation.curve_episodes or evaluation.episodes} episodes, 95 % interval",
    )
    axis.legend()
    figure.savefig(file)


def movement(moved: Movement, file: Path) -> None:
    """How far each layer moves: the mean by step, and every task's after the last step."""
    steps, layers, tasks = moved.relative.shape
    mean, spread = moved.relative[1:].mean(-1).T.numpy(), moved.relative[1:].std(-1).T.numpy()
    figure = new_figure(9, 1.4 + 0.28 * layers)
    left, right = figure.subplots(1, 2, sharey=True)
    shown = left.imshow(np.nan_to_num(mean, nan=0.0, posinf=0.0), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(shown, ax=left)
    if steps <= 6:
        for (layer, step), value in np.ndenumerate(mean):
            text = f"{value:.2g} ± {spread[layer, step]:.1g}" if np.isfinite(value) else "starts at zero"
            box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
            left.text(step, layer, text, ha="center", va="center", fontsize=6, bbox=box)
    left.set(
        xlabel="adaptation steps",
        xticks=range(steps - 1),
        xticklabels=range(1, steps),
        title="mean ± standard deviation over tasks",
    )
    left.set_yticks(range(layers), moved.layers, fontsize=7)
    last = moved.relative[-1].numpy()
    right.boxplot(
        [row[np.isfinite(row)] for row in last], positions=range(layers), orientation="horizontal", flierprops={"ms": 2}
    )
    right.set(xlabel="‖θ′ − θ‖ / ‖θ‖ after the last step", title=f"{tasks} validation tasks")
    right.set_yticks(range(layers), moved.layers, fontsize=7)
    figure.savefig(file)


def rate_table(described: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray] | None:
    """Of what an algorithm describes, "rate/NAME" and "rate/NAME/stepK": names, steps and rates [names, steps].

    The one column of rates that are the same at every step has the step "". None where there are no rates.
    """
    rates = {}
    for key, value in described.items():
        kind, _, name = key.partition("/")
        if kind == "rate":
            layer, _, step = name.partition("/")
            rates[layer, step] = value
    layers, steps = (list(dict.fromkeys(key[i] for key in rates)) for i in (0, 1))
    if not rates:
        return None
    return layers, steps, np.array([[rates.get((layer, step), np.nan) for step in steps] for layer in layers])


def learned_rates(described: Mapping[str, float], file: Path) -> None:
    """The inner rates that were learned, by parameter and step. Writes nothing where there are none."""
    table = rate_table(described)
    if table is None:
        return
    layers, steps, rates = table
    figure = new_figure(4.5 + 0.5 * len(steps), 1.4 + 0.24 * len(layers))
    axis = figure.subplots()
    bound = max(float(np.nanmax(np.abs(rates))), 1e-12)
    shown = axis.imshow(rates, aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound)
    figure.colorbar(shown, ax=axis)
    if len(steps) <= 10:
        for (layer, step), value in np.ndenumerate(rates):
            dark = abs(value) > 0.6 * bound
            axis.text(step, layer, f"{value:.3g}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    axis.set_yticks(range(len(layers)), layers, fontsize=7)
    names = [step.removeprefix("step") for step in steps]
    axis.set_xticks(range(len(steps)), [name or "every" for name in names])
    axis.set(xlabel="adaptation step", title="learned rates")
    figure.savefig(file)


def own_quantities(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What only this algorithm tells of its training: panel -> line -> (outer step, value).

    A panel is a metric of every step ("cg_residual", one line) or a kind of what is learned besides the network, with a
    line for each of its members ("rate": by parameter, "lambda").
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for key, value in record.items():
            name = key.removeprefix("learned/")
            kind, _, member = name.partition("/")
            if key == name and (key in COMMON_METRICS or key.startswith(("val_", "train_"))):
                continue
            panels.setdefault(kind, {}).setdefault(member, []).append((record["step"], value))
    return panels


def over_training(records: Sequence[dict[str, Any]], file: Path) -> None:
    """The algorithm's own quantities by outer step, a panel each. Writes nothing where there are none."""
    panels = own_quantities(records)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns, 3.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (kind, lines), axis in zip(panels.items(), axes, strict=False):
        for member, points in lines.items():
            few = len(points) < 50
            axis.plot(*zip(*points, strict=True), marker="." if few else None, linewidth=0.8, label=member)
        axis.set(xlabel="outer step", title=kind.replace("_", " "))
        if 1 < len(lines) <= MOST_IN_A_LEGEND:
            axis.legend(fontsize=6)
    for axis in axes:  # that are left
        axis.set_visible(False)
    figure.savefig(file)


def curve(name: str, estimates: Sequence[Estimate], file: Path) -> None:
    """Something over 1, 2, … with 95 % intervals; `name` says both, "accuracy_by_instance"."""
    figure = new_figure(4.5, 3.4)
    axis = figure.subplots()
    points = range(1, len(estimates) + 1)
    axis.errorbar(points, [e.mean for e in estimates], [e.half_width for e in estimates], marker=".")
    of, _, by = name.replace("_", " ").partition(" by ")
    axis.set(xlabel=by, ylabel=of, title="test episodes, 95 % interval")
    figure.savefig(file)
