"""The cost model's parameters for the machine that was measured, and how well the model gives its numbers back."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cost_model import Compute, Network, Setting, expected_slowest, ring
from scipy.optimize import nnls
from scipy.stats import binom

MEASUREMENTS = Path(__file__).with_name("measurements.json")
BYTES = 4  # of a float32


class Measured(NamedTuple):
    """Of all rounds together the median with its distribution-free 95 % interval (order statistics), and the quietest
    round: other work on the machine only ever makes a step longer."""

    median: float
    low: float
    high: float
    quiet: float  # the lowest median of a round
    cv: float  # that round's 1.4826 · median absolute deviation / median: deaf to the odd interrupted step

    @classmethod
    def of(cls, rounds: list[list[float]]) -> Measured:
        ordered = np.sort(np.concatenate(rounds))
        rank = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
        quietest = np.array(min(rounds, key=np.median))
        quiet = float(np.median(quietest))
        deviation = 1.4826 * float(np.median(np.abs(quietest - quiet)))
        low, high = float(ordered[rank]), float(ordered[-1 - rank])
        return cls(float(np.median(ordered)), low, high, quiet, deviation / quiet)


class Fit(NamedTuple):
    """Of one machine with `cores` cores and one thread a worker."""

    alone: Compute  # one busy worker
    together: Compute  # several: they share caches and memory, and have to be woken for each other's messages
    network: Network  # gloo over loopback
    cores: int
    gradient_bytes: float

    def setting(self, workers: int, meta_batch_size: int) -> Setting:
        return Setting(
            workers=workers,
            meta_batch_size=meta_batch_size,
            gradient_bytes=self.gradient_bytes,
            compute=self.alone if workers == 1 else self.together,
            network=self.network,
            sharing=max(1.0, workers / self.cores),
        )


def read(path: Path = MEASUREMENTS) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def steps_of(content: dict[str, Any]) -> dict[tuple[int, int], Measured]:
    """(workers, meta-batch size) -> seconds per outer step."""
    rounds: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    for measured in content["rounds"]:
        for line in measured["steps"]:
            rounds[line["workers"], line["meta_batch_size"]].append(line["step_seconds"])
    return {key: Measured.of(values) for key, values in sorted(rounds.items())}


def all_reduce_of(content: dict[str, Any]) -> dict[tuple[int, int], float]:
    """(workers, numbers) -> seconds of one all-reduce: the median of the quietest round."""
    medians: dict[tuple[int, int], list[float]] = defaultdict(list)
    for measured in content["rounds"]:
        for line in measured["all_reduce"]:
            medians[line["workers"], line["numbers"]].append(line["seconds"])
    return {key: min(values) for key, values in sorted(medians.items())}


def fit(content: dict[str, Any], *, workers: tuple[int, ...] = (1, 2, 4)) -> Fit:
    """Least squares of relative errors over the quietest rounds of the settings with these numbers of workers.

    A step's seconds are linear in time per task and overhead, alone and together, once the noise, taken from the
    single worker's steps, says by how much the slowest worker exceeds the mean.
    """
    steps = {key: value for key, value in steps_of(content).items() if key[0] in workers}
    cores, gradient_bytes = content["machine"]["cores"], content["gradient_numbers"] * BYTES
    network = _network({key: value for key, value in all_reduce_of(content).items() if key[0] in workers})
    cv = float(np.median([value.cv for (count, _), value in steps.items() if count == 1]))
    rows, targets = [], []
    for (count, meta_batch_size), measured in steps.items():
        setting = Setting(count, meta_batch_size, gradient_bytes, Compute(1.0, 0.0, cv), network)
        slowest = expected_slowest(setting) * max(1.0, count / cores)  # tasks of the slowest worker, noise included
        overhead = slowest / (meta_batch_size / count)
        row = [slowest, overhead, 0.0, 0.0] if count == 1 else [0.0, 0.0, slowest, overhead]
        rows.append(np.array(row) / measured.quiet)
        targets.append(1.0 - sum(ring(count, gradient_bytes, network)) / measured.quiet)
    found, _ = nnls(np.array(rows), np.array(targets))
    task, overhead, task_together, overhead_together = found.tolist()
    alone, together = Compute(task, overhead, cv), Compute(task_together, overhead_together, cv)
    return Fit(alone, together, network, cores, gradient_bytes)


def _network(measured: dict[tuple[int, int], float]) -> Network:
    """Latency and bandwidth of the ring's formula, by least squares of relative errors."""
    rows = [[2 * (w - 1) / t, 2 * (w - 1) / w * n * BYTES / t] for (w, n), t in measured.items()]
    latency, per_byte = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0].tolist()
    return Network(bandwidth=1 / per_byte, latency=latency)
