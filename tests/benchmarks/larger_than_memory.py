"""Training from a data set many times larger than the memory it may use.

    python -m tests.benchmarks.larger_than_memory --gb 20 --memory-gb 2 --out results
    python -m tests.benchmarks.larger_than_memory --gb 2 --memory-gb 1.5 --window-classes 8   # a quicker one
    python -m tests.benchmarks.larger_than_memory --pictures --gb 20 --memory-gb 2 --window-steps 60   # JPEGs

Writes 84×84×3 images with random pixels (600 of a class, as mini-ImageNet's; they do not compress, so that nothing is
smaller on the disk than in memory), drops them from the page cache, and takes outer steps of conv4 (strided, 5-way,
5 queries) in a process of its own, with windows of classes.

With --pictures they are JPEGs of twice that size, which the readers decode and scale; decoded classes are kept on the
local disk (--decoded-mb) beside the set.

Memory: what the process may allocate (heap, anonymous pages, stacks) is limited by the kernel, RLIMIT_DATA, which
refuses more. Arrow's own allocator would reserve a gigabyte of addresses ahead, so the system's is used. Files are read
and not mapped; the page cache is the system's own, gives way to whoever needs memory, and counts for nobody. "Resident"
is VmRSS, programs and libraries included; "data" is VmData, what the limit is on.

Waits: how long the training loop waited for a step's episodes (the journal's `data_seconds`), after the first window;
and the steps some class of which was not there yet when they were drawn, one step before they are needed.

Seen on two cores beside other work (load 3.7) with 20 GB, 2 GB, `--window-classes 24 --window-steps 4 --seconds 140`:
none of 396 steps after the first window waited (0.234 s a step), at most 1.77, 1.81, 1.82 and 1.82 GB resident in the
quarters of the run. With `--pictures --window-steps 60 --seconds 420` (load 3.3): one of 340, 0.004 s (0.211 s a step);
1.56, 1.56, 1.65 and 1.69 GB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import experiment as experiments
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.experiment import Experiment
from pipeline.tasks import shards
from pipeline.tasks.images import ImageTasks
from pipeline.training import loop
from pipeline.training.context import LocalContext
from pipeline.training.memory import keep_freed_memory
from pipeline.training.step import global_gradient
from pipeline.types import SPLITS, MetaState, Split
from tests.benchmarks import report
from tests.benchmarks.measuring import quartiles

EXAMPLES, SIZE = 600, 84
CLASS_BYTES = EXAMPLES * SIZE * SIZE * 3
HELD_OUT = 16  # classes of validation, and of test
WAITED = 0.001  # seconds: less is the queue's own
SAMPLE_SECONDS = 0.25


def write_random_images(
    folder: Path, classes: int, *, held_out: int = HELD_OUT, examples: int = EXAMPLES, size: int = SIZE
) -> shards.Manifest:
    """Random pixels of every class, from few random numbers: what is measured is reading and not drawing them."""
    base = np.random.default_rng(0).integers(0, 256, (examples, size, size, 3), np.uint8)
    parts = parts_of(classes, held_out)

    def each() -> Iterator[shards.ClassExamples]:
        for number, name in enumerate(parts):
            yield shards.ClassExamples(name, "random", base ^ np.uint8(number % 255 + 1) if number else base)

    return shards.write(folder, each(), splits={"random": parts}, source={"name": "random"}, preprocessing={})


def random_pictures(examples: int, size: int) -> list[bytes]:
    """JPEGs of random pixels, twice as wide and high as they are going to be."""
    random, files = np.random.default_rng(0), []
    for _ in range(examples):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (2 * size, 2 * size, 3), np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def write_pictures(
    folder: Path, files: list[bytes], classes: int, *, held_out: int = HELD_OUT, size: int = SIZE
) -> shards.Manifest:
    """The same pictures in every class, each with a comment of its own: other files, none of which is decoded yet."""
    preprocessing = Preprocessing(kind="photo", size=size, channels=3)
    parts = parts_of(classes, held_out)

    def each() -> Iterator[shards.ClassExamples]:
        for name in parts:
            comment = b"\xff\xfe" + (2 + len(name)).to_bytes(2, "big") + name.encode()  # after the start of image
            yield shards.ClassExamples(name, "random", [file[:2] + comment + file[2:] for file in files])

    return shards.write(
        folder,
        each(),
        modality="encoded_image",
        shape=(size, size, 3),
        splits={"random": parts},
        source={"name": "random"},
        preprocessing=preprocessing.model_dump(mode="json"),
    )


def parts_of(classes: int, held_out: int) -> dict[str, Split]:
    names = [f"random/{number:05d}" for number in range(classes)]
    return {name: SPLITS[0] if i >= 2 * held_out else SPLITS[1 + i % 2] for i, name in enumerate(names)}


def write_set(folder: Path, options: argparse.Namespace) -> None:
    fewest = 2 * HELD_OUT + 2 * options.window_classes
    if options.pictures:
        files = random_pictures(EXAMPLES, SIZE)
        write_pictures(folder, files, max(round(options.gb * 1e9 / sum(map(len, files))), fewest))
    else:
        write_random_images(folder, max(round(options.gb * 1e9 / CLASS_BYTES), fewest))


def experiment_of(data: Path, options: argparse.Namespace) -> Experiment:
    content = {
        "name": "larger-than-memory",
        "task": {
            "family": "images",
            "data": str(data),
            "split": "random",
            "n_query": 5,
            "memory_limit_mb": 64,
            "cache_mb": options.cache_mb,
            "window": {"classes": options.window_classes, "steps": options.window_steps},
            "decoded_cache": str(decoded_beside(data)),
            "decoded_cache_mb": options.decoded_mb,
        },
        "model": {"name": "conv4", "downsample": "stride"},
        "algorithm": {"name": "maml", "inner_lr": 0.01},
        "training": {"steps": options.steps, "meta_batch_size": options.tasks, "backend": "local"},
    }
    return experiments.from_dict(content, source="configuration")


def decoded_beside(data: Path) -> Path:
    return data.with_name(f"{data.name}-decoded")


def in_limits(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Outer steps in this process, whose memory is limited from here on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.memory_gb:
        limit = int(options.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    experiment = experiment_of(data, options)
    parts = experiments.build(experiment, device=torch.device("cpu"))
    family = parts.family
    assert isinstance(family, ImageTasks)
    meta = parts.algorithm.init(0)
    meta = MetaState({name: value.requires_grad_() for name, value in meta.params.items()}, meta.buffers)
    state: Any = argparse.Namespace(step=0, classes=None)
    clock = loop._Clock()
    context = LocalContext()
    chunk = experiments.task_chunk(experiment, parts, context.device)
    waits, seconds, memory, not_there = [], [], [], []
    counts = family._images.cache.counts  # type: ignore[attr-defined]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory.append((time.perf_counter() - began, *memory_now()))

    began = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for batch in loop._training_batches(context, experiment, parts, state, clock):
            start = time.perf_counter()
            global_gradient(context, parts.algorithm, meta, batch, step=state.step, chunk=chunk)
            seconds.append(time.perf_counter() - start)
            waits.append(clock.data_seconds)
            not_there.append(counts.late + counts.misses)
            state.step += 1
            if time.perf_counter() - began > options.seconds:
                break
    finally:
        ended.set()
        watcher.join()
    return {
        "waits": waits,
        "compute": seconds,
        "memory": memory,
        "not_there": not_there,
        "cache": vars(counts),
        "seconds": time.perf_counter() - began,
    }


def memory_now() -> tuple[int, int]:
    """Bytes resident, and bytes that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmData"))}
    return int(kilobytes["VmRSS"]) << 10, int(kilobytes["VmData"]) << 10


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of the files."""
    for file in folder.rglob("*.parquet"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def in_a_process_of_its_own(data: Path, arguments: list[str]) -> dict[str, Any]:
    """`in_limits` by this file. Raises RuntimeError: it ended without a result, as where the memory is too little."""
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "told.json"
        command = [sys.executable, "-m", "tests.benchmarks.larger_than_memory", *arguments]
        command += ["--data", str(data), "--told", str(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        ended = subprocess.run(command, cwd=report.REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        if ended.returncode:
            raise RuntimeError(f"it ended with {ended.returncode}: {ended.stderr[-2000:]}")
        return json.loads(told.read_text())


def rows_of(result: dict[str, Any], manifest: shards.Manifest, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    warm = options.window_steps
    waits, compute = np.array(result["waits"][warm:]), result["compute"][warm:]
    size = sum(shard.bytes for shard in manifest.shards) / 1e9
    yield row("set", f"{size:.1f} GB, {len(manifest.classes)} classes; limit {options.memory_gb} GB")
    window = options.window_classes * manifest.classes[0].count * manifest.image_bytes / 1e9
    yield row("window", f"{options.window_classes} classes ({window:.2f} GB) for {options.window_steps} steps")
    yield row("first step's wait", f"{result['waits'][0]:.2f} s")
    yield row("a step", "{1:.3f} ({0:.3f}–{2:.3f}) s".format(*quartiles(compute)))
    late = waits[waits > WAITED]
    yield row(
        "steps after the first window that waited for data",
        f"{len(late)} of {len(waits)}, {late.sum():.3f} s in all of {result['seconds']:.0f} s",
    )
    missed = np.diff(result["not_there"])[warm:]
    yield row("steps after it some class of which was not there yet when they were drawn", f"{(missed > 0).sum()}")
    times = [t for t, _, _ in result["memory"]]
    quarters = np.array_split(np.array(result["memory"]), 4)
    yield row(
        "most resident, by quarters of the run", ", ".join(f"{part[:, 1].max() / 1e9:.2f} GB" for part in quarters)
    )
    yield row("most data, by quarters of the run", ", ".join(f"{part[:, 2].max() / 1e9:.2f} GB" for part in quarters))
    yield row("watched", f"{len(times)} times in {times[-1]:.0f} s")
    cache = result["cache"]
    asked = cache["hits"] + cache["late"] + cache["misses"]
    told = f"{cache['hits']} of {asked} ({100 * cache['hits'] / asked:.2f} %)"
    yield row("classes that were in memory when a step wanted them", told)
    yield row("read from the set", f"{cache['read']} classes")


def row(what: str, value: str) -> dict[str, Any]:
    return {"case": what, "value": value, "load_average": report.load_average()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20, help="size of the set")
    parser.add_argument("--memory-gb", type=float, default=2, help="that the process may allocate; 0: any")
    parser.add_argument("--window-classes", type=int, default=24)
    parser.add_argument("--window-steps", type=int, default=10)
    parser.add_argument("--pictures", action="store_true", help="JPEGs, and not pixels")
    parser.add_argument("--decoded-mb", type=int, default=20_000, help="of decoded pictures on the disk; 0: none")
    parser.add_argument("--cache-mb", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1800, help="of outer steps at most")
    parser.add_argument("--tasks", type=int, default=2, help="per outer step")
    parser.add_argument("--data", type=Path, help="where the set is, or is to be written and left; a temporary folder")
    parser.add_argument("--out", type=Path, help="folder for larger_than_memory.md and .json")
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.told:
        options.told.write_text(json.dumps(in_limits(options.data, options)))
        return
    scratch = None if options.data else Path(tempfile.mkdtemp(dir="."))
    data = options.data or scratch / "set"
    try:
        if not (data / shards.MANIFEST).exists():
            began = time.perf_counter()
            write_set(data, options)
            print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        forget(data)
        result = in_a_process_of_its_own(data, sys.argv[1:])
        columns: report.Columns = {"what": lambda r: r["case"], "": lambda r: r["value"]}
        columns |= {"load": lambda r: f"{r['load_average']:.1f}"}
        notes = [f"`{report.command('tests.benchmarks.larger_than_memory')}`", "Memory and waits: the module's head."]
        rows = list(rows_of(result, shards.read_manifest(data), options))
        report.write(
            options.out,
            "larger_than_memory",
            where=report.place(torch.device("cpu")),
            rows=rows,
            columns=columns,
            notes=notes,
        )
    finally:
        if scratch:
            shutil.rmtree(scratch)
        else:
            shutil.rmtree(decoded_beside(data), ignore_errors=True)


if __name__ == "__main__":
    main()
