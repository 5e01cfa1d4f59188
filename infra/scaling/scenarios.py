"""Clusters of GPUs that nobody here has measured: everything in this file is an assumption.

The rates are given as a range because they decide most; `python infra/scaling predict --rate N` replaces them.
"""

from __future__ import annotations

from typing import NamedTuple

from cost_model import Compute, Feed, Network, Occasional, Setting

GPUS_PER_NODE = 8
NVLINK = Network(bandwidth=300e9, latency=5e-6)  # bytes/s one way, of the 450e9 on paper; seconds per round with NCCL
ETHERNET = Network(bandwidth=12.5e9, latency=20e-6)  # 100 Gb/s a node, all of it the ring's: it leaves a node once
NODE_READS = 12.5e9 / 2  # bytes/s from the object store: half of the same network card
STORE = 40e9  # bytes/s, of the whole store
NOISE = 0.05  # of a GPU's step; a shared or throttled one has more
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Scenario(NamedTuple):
    title: str
    gradient_numbers: int  # float32
    rates: tuple[float, float, float]  # tasks/s of one GPU that is kept busy: low, middle, high
    overhead: float  # seconds per step: kernel launches, outer update, metrics
    meta_batch_size: int  # of the fixed regime
    tasks_per_gpu: int  # of the growing regime
    feed: Feed
    validation_tasks: int = 200
    validation_steps: int = 3  # adaptation steps, against one in training, and more queries: cost per task ×
    validate_every: int = 250

    def setting(self, gpus: int, *, rate: float, growing: bool) -> Setting:
        """On `gpus` GPUs: with the fixed meta-batch, or one that grows with them."""
        return Setting(
            workers=gpus,
            meta_batch_size=self.tasks_per_gpu * gpus if growing else self.meta_batch_size,
            gradient_bytes=4 * self.gradient_numbers,
            compute=Compute(1 / rate, self.overhead, NOISE),
            network=NVLINK if gpus <= GPUS_PER_NODE else ETHERNET,
            feed=self.feed,
            occasional=Occasional(self.validate_every, self.validation_tasks, self.validation_steps / rate, 0.1),
        )


def row_groups_touched(row_groups: int, examples: int) -> float:
    """Of a class's row groups, those that hold at least one of `examples` drawn from it, expected."""
    return row_groups * (1 - (1 - 1 / row_groups) ** examples)


def _feed(bytes_per_task: float, set_bytes: float) -> Feed:
    return Feed(bytes_per_task, NODE_READS, STORE, GPUS_PER_NODE, set_bytes)


# A class of 1281 pictures of 84×84×3 lies in 7 row groups of 4 MiB; a row group is read whole.
TIERED_TASK = 5 * row_groups_touched(7, 1 + 15) * (4 << 20)

SCENARIOS = {
    "conv4": Scenario(
        "conv4 on Omniglot, 5-way 1-shot (the set is in memory)",
        gradient_numbers=112_005,
        rates=(1_000, 4_000, 16_000),
        overhead=5e-3,
        meta_batch_size=1024,
        tasks_per_gpu=32,
        feed=_feed(0.0, 1623 * 20 * 784),
    ),
    "resnet12": Scenario(
        "ResNet-12 at 84×84×3, 5-way 1-shot (a set like mini-ImageNet, in memory)",
        gradient_numbers=12_400_000,
        rates=(30, 100, 300),
        overhead=20e-3,
        meta_batch_size=1024,
        tasks_per_gpu=4,
        feed=_feed(0.0, 60_000 * 84 * 84 * 3),
    ),
    "streamed": Scenario(
        "the same network, a set like tieredImageNet (16 GB) read from the object store in every step",
        gradient_numbers=12_400_000,
        rates=(30, 100, 300),
        overhead=20e-3,
        meta_batch_size=1024,
        tasks_per_gpu=4,
        feed=_feed(TIERED_TASK, 0.0),
    ),
}
