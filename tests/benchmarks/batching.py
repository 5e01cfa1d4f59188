"""How to batch tasks of an arbitrary nn.Module: a loop, or vmap? Sets the default of `model.batching`.

    python -m tests.benchmarks.batching            # CPU, one thread; on a CUDA device where there is one

Prints milliseconds per meta-gradient (second order, 1 and 5 inner steps, 8 tasks, 5-way 1-shot, 15 queries), the
median of interleaved runs, and the ratio loop / vmap.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.module import ModuleModel
from pipeline.tasks.objectives import Classification
from pipeline.types import TaskBatch

TASKS, REPEATS = 8, 7


def conv4() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1), *block(64), *block(64), *block(64), nn.Flatten(), nn.Linear(64, 5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5))


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}\n\n| network | inner steps | loop ms | vmap ms | loop / vmap |")
    print("|---|---|---|---|---|")
    for make in (conv4, mlp):
        for steps in (1, 5):
            times = _interleaved(make, steps, device)
            loop, vmap = (statistics.median(times[name]) * 1000 for name in ("loop", "vmap"))
            print(f"| {make.__name__} | {steps} | {loop:.1f} | {vmap:.1f} | {loop / vmap:.2f} |", flush=True)


def _interleaved(make: object, steps: int, device: str) -> dict[str, list[float]]:
    config = MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=steps)
    learners = {}
    for batching in ("loop", "vmap"):
        model = ModuleModel(make, dtype=torch.float32, batching=batching)  # type: ignore[arg-type]
        learners[batching] = MAML(config, model=model, objective=Classification())
    state = learners["loop"].init(0)
    state = state._replace(params={k: v.to(device) for k, v in state.params.items()})
    batch = _batch(device)
    times: dict[str, list[float]] = {name: [] for name in learners}
    for repeat in range(REPEATS + 1):
        for name, learner in learners.items():
            began = time.perf_counter()
            learner.meta_grad(state, batch, step=0)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - began)
    return times


def _batch(device: str) -> TaskBatch:
    def part(per_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(5).repeat_interleave(per_class).expand(TASKS, -1)
        return torch.rand(TASKS, 5 * per_class, 1, 28, 28).to(device), labels.to(device)

    return TaskBatch(*part(1), *part(15))


if __name__ == "__main__":
    main()
