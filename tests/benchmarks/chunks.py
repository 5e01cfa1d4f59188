"""How many tasks of conv4 to adapt at once on a CPU. Sets `Conv4.cpu_task_chunk`.

    python -m tests.benchmarks.chunks              # one thread

Prints milliseconds per meta-gradient (16 tasks, 5-way 1-shot, second order, one inner step), the median of runs in
turn, for chunks of 1 to 16 tasks and each of conv4's kernels.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.conv4 import Conv4Config
from pipeline.tasks.objectives import Classification
from pipeline.training.memory import keep_freed_memory
from pipeline.training.step import split_tasks
from pipeline.types import TaskBatch

TASKS, REPEATS, CHUNKS = 16, 5, (1, 2, 4, 8, 16)


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    heads = ["conv4", "kernel", "queries", *(f"chunk {c}: ms" for c in CHUNKS)]
    print(f"torch {torch.__version__}\n\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for downsample in ("stride", "max_pool"):
        for kernel, precision in (("closed", "float32"), ("native", "float32"), ("native", "mixed")):
            for queries in (5, 15):
                times = _in_turn(downsample, kernel, precision, queries)
                medians = [f"{1000 * statistics.median(t):.0f}" for t in times]
                print(
                    "| " + " | ".join([downsample, f"{kernel} {precision}", str(queries), *medians]) + " |", flush=True
                )


def _in_turn(downsample: str, kernel: Any, precision: Any, queries: int) -> list[list[float]]:
    config = Conv4Config(name="conv4", downsample=downsample)  # type: ignore[arg-type]
    model = config.build(
        input_shape=(1, 28, 28), num_outputs=5, dtype=torch.float32, kernel=kernel, precision=precision
    )
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.4), model=model, objective=Classification())
    state = maml.init(0)
    labels = torch.arange(5).expand(TASKS, -1)
    query_labels = torch.arange(5).repeat_interleave(queries).expand(TASKS, -1)
    support, query = torch.rand(TASKS, 5, 1, 28, 28), torch.rand(TASKS, 5 * queries, 1, 28, 28)
    batch = TaskBatch(support, labels, query, query_labels)
    times: list[list[float]] = [[] for _ in CHUNKS]
    for repeat in range(REPEATS + 1):
        for collected, chunk in zip(times, CHUNKS, strict=True):
            began = time.perf_counter()
            for piece in split_tasks(batch, chunk):
                maml.meta_grad(state, piece, step=0)
            if repeat:  # the first is a warm-up
                collected.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
