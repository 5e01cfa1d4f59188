"""Outer steps on this machine, measured: the real training loop on the `processes` backend, and the all-reduce alone.

Every round goes through all settings once, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline import experiment as experiments
from pipeline import runs
from pipeline.experiment import Experiment
from pipeline.training import journal
from pipeline.training.context import Context, run_processes
from pipeline.training.loop import train_worker

WORKERS = (1, 2, 4)
META_BATCH_SIZES = (4, 32)
STEPS, WARM_UP = 18, 4
VALIDATION_EPISODES = 8
MESSAGE_NUMBERS = (1, 10_000, 1_000_000)  # float32, besides the gradient's own


def recipe(data: Path, folder: Path, *, workers: int, meta_batch_size: int) -> Experiment:
    """configs/omniglot_5w1s_maml_cpu.yaml's network, algorithm and episodes, on glyphs, which everybody has."""
    content = {
        "name": "scaling",
        "task": {
            "family": "images",
            "data": str(data.absolute()),
            "split": "script",
            "n_query": 5,
            "eval_n_query": 15,
            "rotations": "per_class",
        },
        "model": {"name": "conv4", "hidden": 64, "downsample": "stride"},
        "algorithm": {"name": "maml", "inner_lr": 0.4, "eval_adaptation_steps": 3},
        "training": {
            "steps": STEPS,
            "meta_batch_size": meta_batch_size,
            "validate_every": STEPS // 2,
            "num_workers": workers,
            "backend": "processes",
        },
        "evaluation": {"validation_episodes": VALIDATION_EPISODES},
        "tracking": {"runs": str(folder)},
    }
    return experiments.from_dict(content, source="the scaling recipe")


def one_round(data: Path) -> dict[str, Any]:
    """Every setting once. Seconds everywhere; steps after WARM_UP, the validated ones left out."""
    began, load = time.time(), os.getloadavg()
    steps = [_train(data, workers, size) for size in META_BATCH_SIZES for workers in WORKERS]
    messages = [_messages(data, workers) for workers in WORKERS if workers > 1]
    return {
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        "seconds": round(time.time() - began, 1),
        "load_before": [round(value, 2) for value in load],  # runnable processes over 1, 5 and 15 minutes
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "steps": steps,
        "all_reduce": [line for lines in messages for line in lines],
    }


def machine() -> dict[str, Any]:
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in about if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "avx512": any("avx512f" in line for line in about),
    }


def gradient_numbers(data: Path) -> int:
    """How many float32 the recipe's all-reduce carries: meta-gradient, metrics and the count."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = experiments.build(recipe(data, Path(scratch), workers=1, meta_batch_size=4), device=torch.device("cpu"))
    return sum(value.numel() for value in parts.algorithm.init(0).params.values())


def _train(data: Path, workers: int, meta_batch_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        exp = recipe(data, Path(scratch), workers=workers, meta_batch_size=meta_batch_size)
        run, _ = runs.open_run(exp, data_digest="measured")
        run_processes(train_worker, exp.to_dict(), str(run.path), num_workers=workers)
        records = journal.read(run.journal)
    seconds = {record["step"]: meta_batch_size / record["tasks_per_second"] for record in records}
    at = {record["step"]: record["time"] / 1000 for record in records}  # when the record was written
    first = STEPS // 2  # validated, then checkpointed
    plain = [seconds[step] for step in range(WARM_UP + 1, STEPS) if step != first]
    return {
        "workers": workers,
        "meta_batch_size": meta_batch_size,
        "step_seconds": [round(value, 5) for value in plain],
        "validation_seconds": round(at[first] - at[first - 1] - seconds[first], 4),
        "checkpoint_seconds": round(max(0.0, at[first + 1] - at[first] - seconds[first + 1]), 4),
    }


def _messages(data: Path, workers: int) -> list[dict[str, Any]]:
    numbers = sorted({*MESSAGE_NUMBERS, gradient_numbers(data)})
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "times.pt"
        run_processes(_time_all_reduce, numbers, str(file), num_workers=workers)
        times = torch.load(file, weights_only=True)
    return [
        {"workers": workers, "numbers": n, "seconds": round(statistics.median(taken), 7)} for n, taken in times.items()
    ]


def _time_all_reduce(context: Context, numbers: list[int], file: str) -> None:
    torch.set_num_threads(1)
    times: dict[int, list[float]] = {}
    for count in numbers:
        flat = torch.zeros(count)
        for repeat in range(25):
            context.all_reduce(torch.zeros(1))  # everybody is here
            began = time.perf_counter()
            context.all_reduce(flat)
            if repeat >= 5:
                times.setdefault(count, []).append(time.perf_counter() - began)
    if context.rank == 0:
        torch.save(times, file)
