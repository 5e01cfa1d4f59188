"""Loop or vmap for an arbitrary nn.Module, and how many tasks at once? What `pipeline/training/batching.py` measures.

    python -m tests.benchmarks.batching            # CPU, one thread; on a CUDA device where there is one

Prints milliseconds a task of a second-order meta-gradient (8 tasks, 5-way 1-shot, 15 queries, 28×28; 1 and 5 inner
steps; the best of three) by loop and by vmap with more and more tasks at once, as far as a run would try, and their
ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.models.module import ModuleModel
from pipeline.tasks.objectives import Classification
from pipeline.training import batching
from pipeline.training.memory import keep_freed_memory
from pipeline.types import MetaState, TaskBatch

TASKS, WAY, QUERIES, SIZE = 8, 5, 15, 28


def conv4() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1), *block(64), *block(64), *block(64), nn.Flatten(), nn.Linear(64, WAY))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE**2, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, WAY)
    )


class Transformer(nn.Module):
    """An image's rows are its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(SIZE, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, WAY)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(images.squeeze(1))).mean(dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"conv4": conv4, "mlp": mlp, "transformer": Transformer}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"torch {torch.__version__}, {device}\n\n"
        "| network | inner steps | loop ms | vmap ms (tasks at once) | loop / vmap |"
    )
    print("|---|---|---|---|---|")
    for name, make in NETWORKS.items():
        for steps in (1, 5):
            times = _measured(make, steps, device)
            loop = next(t for (way, _), t in times.items() if way == "loop")
            by_vmap = {chunk or TASKS: t for (way, chunk), t in times.items() if way == "vmap"}
            shown = ", ".join(f"{1000 * t:.2f} ({chunk})" for chunk, t in by_vmap.items())
            ratio = loop / min(by_vmap.values())
            print(f"| {name} | {steps} | {1000 * loop:.2f} | {shown} | {ratio:.2f} |", flush=True)


def _measured(make: Callable[[], nn.Module], steps: int, device: str) -> dict[tuple[str, int | None], float]:
    model = ModuleModel(make, dtype=torch.float32)
    maml = MAML(MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=steps), model=model, objective=Classification())
    state = MetaState({k: v.to(device) for k, v in maml.init(0).params.items()}, {})
    return batching.measure(maml, model, state, _batch(device), step=0, chunk=None)


def _batch(device: str) -> TaskBatch:
    def part(per_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(WAY).repeat_interleave(per_class).expand(TASKS, -1)
        return torch.rand(TASKS, WAY * per_class, 1, SIZE, SIZE).to(device), labels.to(device)

    return TaskBatch(*part(1), *part(QUERIES))


if __name__ == "__main__":
    main()
