"""Everything around the meta-gradient: episodes, all-reduce, workers, and the way to the first step.

    metapipe data prepare glyphs --out data/glyphs   # or any 28×28 data set: --data
    python -m tests.benchmarks.feeding               # all of it; or some: --parts episodes mapped feeding workers start

Parts: `episodes` indices drawn and uint8 rows gathered in memory (5-way × 16 images, one core); `mapped` the same of
84×84×3 images from memory-mapped shards, written here with random pixels, and its share of a step; `feeding` the share
of a step's time that drawing its episodes takes; `workers` the all-reduce of conv4's gradient and tasks/s over 1, 2 and
4 one-thread processes at equal global batch; `start` from a command to its help or to its first outer step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline import experiment as experiments
from pipeline.experiment import Components, Experiment
from pipeline.tasks import shards
from pipeline.tasks.images import ImageTasks
from pipeline.training.collectives import all_reduce_sums
from pipeline.training.context import Context, LocalContext, run_processes
from pipeline.training.memory import keep_freed_memory
from pipeline.training.step import global_gradient, slots_of_rank
from pipeline.types import MetaState, TaskBatch
from tests.benchmarks import measuring, report
from tests.benchmarks.larger_than_memory import write_random_images
from tests.benchmarks.measuring import Quartiles, quartiles

META_BATCH, WARM_UP, STEPS = 32, 2, 5
IN_A_ROW = 32  # outer steps of one measurement of episodes a second
WORKERS = (1, 2, 4)
MAPPED_CLASSES, MAPPED_HELD_OUT = 30, 5  # 20 classes to train with, as large as mini-ImageNet's
START_LIMIT = 300.0  # seconds to wait for a first step

Result = tuple[str, Quartiles, str]  # what, how much, unit
CPU = torch.device("cpu")

IMAGES = {"family": "images", "n_way": 5, "k_shot": 1, "n_query": 15, "eval_n_query": 15}
STRIDED = {"name": "conv4", "downsample": "stride"}
MAML = {"name": "maml", "inner_lr": 0.4}


def _experiment(data: Path, *, task: dict[str, Any], model: dict[str, Any], batch: int = META_BATCH) -> Experiment:
    if task["family"] == "images":
        task = {**task, "data": str(data), "split": shards.read_manifest(str(data)).splits[0]}
    content = {
        "name": "feeding",
        "task": task,
        "model": model,
        "algorithm": MAML,
        "training": {"steps": 1, "meta_batch_size": batch, "backend": "local"},
    }
    return experiments.from_dict(content, source="configuration")


def _built(data: Path, **parts: Any) -> tuple[Experiment, Components]:
    experiment = _experiment(data, **parts)
    return experiment, experiments.build(experiment, device=CPU)


def episodes(data: Path) -> Iterator[Result]:
    _, parts = _built(data, task=IMAGES, model=STRIDED)
    family = parts.family
    assert isinstance(family, ImageTasks)
    for count in (16, META_BATCH, 128):
        slots = torch.arange(count)
        stored = _rate_of_steps(lambda step, s=slots: family.pixels("meta_train", step, s, seed=0), count)
        yield f"drawn and gathered, {count} a step", stored, "episodes/s"
        inputs = _rate_of_steps(lambda step, s=slots: family.sample("meta_train", step, s, seed=0), count)
        yield f"drawn, gathered and converted to float32, {count} a step", inputs, "episodes/s"


def _rate_of_steps(step: Callable[[int], Any], count: int) -> Quartiles:
    """How many a second, of outer steps in a row that do `count` each; a measurement spans many of them."""
    steps = itertools.count()

    def some() -> None:
        for _ in range(IN_A_ROW):
            step(next(steps))

    seconds = measuring.in_turn({"": some}, rounds=STEPS, device=CPU)[""]
    return quartiles([IN_A_ROW * count / each for each in seconds])


def mapped(data: Path) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        write_random_images(folder, MAPPED_CLASSES, held_out=MAPPED_HELD_OUT)
        task = {**IMAGES, "memory_limit_mb": 0}
        _, parts = _built(folder, task=task, model=STRIDED)
        slots = torch.arange(META_BATCH // 2)
        began = time.perf_counter()
        parts.family.sample("meta_train", 0, slots, seed=0)
        first = len(slots) / (time.perf_counter() - began)
        yield "mapped 84×84×3, the first 16, decoded and checked", Quartiles(first, first, first), "episodes/s"
        again = _rate_of_steps(lambda step: parts.family.sample("meta_train", step, slots, seed=0), len(slots))
        yield "mapped 84×84×3, afterwards, converted to float32", again, "episodes/s"
        for name, model in {"conv4 strided": STRIDED, "conv4 pool": {"name": "conv4"}}.items():
            yield from _share(f"mapped 84×84×3, {name}, 4 tasks", folder, task=task, model=model, batch=4)


def feeding(data: Path) -> Iterator[Result]:
    few = {**IMAGES, "n_query": 5}
    settings: dict[str, dict[str, Any]] = {
        "conv4 strided, 16 tasks of 5 queries": {"task": few, "model": STRIDED, "batch": 16},
        "conv4 pool, 4 tasks of 15 queries": {"task": IMAGES, "model": {"name": "conv4"}, "batch": 4},
        "sinusoid MLP, 25 tasks": {"task": {"family": "sinusoid"}, "model": {"name": "mlp"}, "batch": 25},
    }
    for name, parts in settings.items():
        yield from _share(name, data, **parts)


def _share(name: str, data: Path, **parts: Any) -> Iterator[Result]:
    """What drawing takes of a step, one after the other; training draws mapped images while a step computes."""
    draw, compute = _draw_and_compute(LocalContext(), _experiment(data, **parts))
    draws, computes = [], []
    for step in range(WARM_UP + STEPS):
        began = time.perf_counter()
        batch = draw(step)
        drawn = time.perf_counter()
        compute(batch, step)
        draws.append(drawn - began)
        computes.append(time.perf_counter() - drawn)
    share = [100 * d / (d + c) for d, c in zip(draws[WARM_UP:], computes[WARM_UP:], strict=True)]
    yield f"drawing episodes, {name}", quartiles(share), "% of the step"
    yield f"drawing episodes, {name}", quartiles([1000 * d for d in draws[WARM_UP:]]), "ms"


def _draw_and_compute(
    context: Context, experiment: Experiment
) -> tuple[Callable[[int], TaskBatch], Callable[[TaskBatch, int], Any]]:
    """This rank's episodes of a step, and their part in the global meta-gradient."""
    parts = experiments.build(experiment, device=CPU)
    meta = parts.algorithm.init(0)
    state = MetaState({name: value.requires_grad_() for name, value in meta.params.items()}, meta.buffers)
    slots = slots_of_rank(context, experiment.training.meta_batch_size)
    chunk = experiments.task_chunk(experiment, parts, CPU)
    return (
        lambda step: parts.family.sample("meta_train", step, slots, seed=0),
        lambda batch, step: global_gradient(context, parts.algorithm, state, batch, step=step, chunk=chunk),
    )


def workers(data: Path) -> Iterator[Result]:
    one: float | None = None
    for count in WORKERS:
        with tempfile.TemporaryDirectory() as scratch:
            told = Path(scratch) / "rank0.json"
            run_processes(_worker, str(data), str(told), num_workers=count)
            found = json.loads(told.read_text())
        rate = quartiles([META_BATCH / seconds for seconds in found["steps"]])
        one = one or rate.median
        yield f"conv4 strided, {count} workers, {META_BATCH} tasks a step", rate, "tasks/s"
        if count > 1:
            yield f"conv4 strided, {count} workers", Quartiles(*(value / one for value in rate)), "× one worker"
            reduce = quartiles([1000 * seconds for seconds in found["all_reduce"]])
            yield f"all-reduce of its gradient, {count} workers", reduce, "ms"


def _worker(context: Context, data: str, told: str) -> None:
    """Some outer steps' meta-gradients, and all-reduces by themselves; rank 0 writes down their seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    experiment = _experiment(Path(data), task=IMAGES, model=STRIDED)
    draw, compute = _draw_and_compute(context, experiment)
    steps = []
    for step in range(WARM_UP + STEPS):
        began = time.perf_counter()
        compute(draw(step), step)
        steps.append(time.perf_counter() - began)
    gradient = {name: value.detach().clone() for name, value in compute(draw(0), 0).grads.items()}
    reduces = []
    for _ in range(10 * STEPS):
        context.all_reduce(torch.zeros(1))  # all ranks begin together
        began = time.perf_counter()
        all_reduce_sums(context, gradient)
        reduces.append(time.perf_counter() - began)
    if context.rank == 0:
        Path(told).write_text(json.dumps({"steps": steps[WARM_UP:], "all_reduce": reduces[STEPS:]}))


def start(data: Path) -> Iterator[Result]:
    yield "metapipe --help", quartiles([_help_seconds() for _ in range(7)]), "s"
    for backend in ("local", "processes", "ray"):
        with tempfile.TemporaryDirectory() as scratch:  # the first run creates MLflow's store, the second finds it
            for which in ("a first", "a further"):
                seconds = _first_step_seconds(data, Path(scratch), backend)
                yield (
                    f"metapipe train ({backend}) to the first step of {which} run",
                    Quartiles(seconds, seconds, seconds),
                    "s",
                )


def _help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _first_step_seconds(data: Path, folder: Path, backend: str) -> float:
    """From the command until its journal has the first outer step (and a validation of two episodes, which flushes it).

    Raises RuntimeError: no first step within START_LIMIT.
    """
    runs = folder / f"runs-{time.monotonic_ns()}"
    settings = {
        "task.data": data.resolve(),
        "task.split": shards.read_manifest(str(data)).splits[0],
        "training.backend": backend,
        "training.steps": 1,
        "training.validate_every": 1,
        "evaluation.validation_episodes": 2,
        "tracking.runs": runs,
        "tracking.register_model": "false",
    }
    command = [sys.executable, "-m", "jobs.cli", "train", str(report.REPOSITORY / "configs" / "smoke.yaml")]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PYTHONPATH": str(report.REPOSITORY)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds = None
    while seconds is None and process.poll() is None and time.perf_counter() - began < START_LIMIT:
        if any(journal.stat().st_size for journal in runs.glob("*/*/metrics.jsonl")):
            seconds = time.perf_counter() - began
        time.sleep(0.01)
    if seconds is None:
        process.terminate()
    message = process.communicate()[1]
    if seconds is None:
        raise RuntimeError(f"metapipe train with backend {backend} reached no step: {message[-500:]}")
    return seconds


PARTS: dict[str, Callable[[Path], Iterator[Result]]] = {
    "episodes": episodes,
    "mapped": mapped,
    "feeding": feeding,
    "workers": workers,
    "start": start,
}
COLUMNS: report.Columns = {
    "part": lambda row: row["case"],
    "what": lambda row: row["what"],
    "median (quartiles)": lambda row: _shown(Quartiles(**row["value"])),
    "unit": lambda row: row["unit"],
    "load": lambda row: f"{row['load_average']:.1f}",
}


def _shown(value: Quartiles) -> str:
    low, median, high = (f"{each:.0f}" if each >= 100 else f"{each:.3g}" for each in value)
    return median if low == high else f"{median} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, default=Path("data/glyphs"), help="prepared data set of 28×28 images")
    parser.add_argument("--out", type=Path, help="folder for feeding.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for part in options.parts:
        for what, value, unit in PARTS[part](options.data):
            row = {"case": part, "what": what, "value": value._asdict(), "unit": unit}
            rows.append({**row, "load_average": report.load_average()})
            print(f"{part}: {what} {_shown(value)} {unit}", file=sys.stderr, flush=True)
    notes = [f"`{report.command('tests.benchmarks.feeding')}`", "One core; load: processes that wanted one meanwhile."]
    report.write(options.out, "feeding", where=report.place(CPU), rows=rows, columns=COLUMNS, notes=notes)


if __name__ == "__main__":
    main()
