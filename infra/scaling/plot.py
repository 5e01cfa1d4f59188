"""The predictions as one picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from cost_model import cost
from matplotlib.figure import Figure
from PIL import Image
from scenarios import GPUS, SCENARIOS

PARTS = {
    "compute": "computing",
    "waiting": "waiting for the slowest",
    "feed": "waiting for data",
    "bandwidth": "all-reduce: bytes",
    "latency": "all-reduce: latency",
    "occasional": "validation, checkpoints",
}
COLORS = 64  # a palette makes the file a quarter as large


def predictions(file: Path) -> None:
    """A row per scenario: tasks/s over GPUs for the assumed range of rates, and where the step's time goes."""
    figure = Figure(figsize=(13, 3.8 * len(SCENARIOS)), layout="constrained")
    axes = figure.subplots(len(SCENARIOS), 3)
    for row, scenario in zip(axes, SCENARIOS.values(), strict=True):
        low, middle, high = scenario.rates
        for growing, color, label in (
            (False, "tab:blue", f"meta-batch {scenario.meta_batch_size}"),
            (True, "tab:orange", f"{scenario.tasks_per_gpu} tasks per GPU"),
        ):
            rates = {
                rate: [cost(scenario.setting(gpus, rate=rate, growing=growing)).tasks_per_second for gpus in GPUS]
                for rate in scenario.rates
            }
            row[0].plot(GPUS, rates[middle], color=color, marker="o", ms=3, label=label)
            row[0].fill_between(GPUS, rates[low], rates[high], color=color, alpha=0.15)
        row[0].plot(GPUS, [gpus * middle for gpus in GPUS], color="grey", lw=0.8, ls="--", label="GPUs × middle rate")
        row[0].set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tasks/s", title=scenario.title.partition(" (")[0])
        row[0].title.set_fontsize(9)
        row[0].legend(fontsize=7)
        for axis, growing in ((row[1], False), (row[2], True)):
            costs = [cost(scenario.setting(gpus, rate=middle, growing=growing)) for gpus in GPUS]
            shares = np.array([[getattr(found, part) / found.step for found in costs] for part in PARTS])
            bottom = np.zeros(len(GPUS))
            for share, label in zip(shares, PARTS.values(), strict=True):
                axis.bar(range(len(GPUS)), share, bottom=bottom, label=label)
                bottom += share
            axis.set_xticks(range(len(GPUS)), [str(gpus) for gpus in GPUS])
            batch = f"{scenario.tasks_per_gpu} tasks per GPU" if growing else f"meta-batch {scenario.meta_batch_size}"
            axis.set(xlabel="GPUs", ylabel="share of a step", ylim=(0, 1))
            axis.set_title(f"{batch}, {middle:g} tasks/s per GPU", fontsize=9)
    axes[0][1].legend(fontsize=7, loc="lower left")
    figure.suptitle("Predicted from assumptions, not measured; bands: the assumed range of one GPU's rate")
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(file, optimize=True)
