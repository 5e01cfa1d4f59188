"""Memory of a meta-gradient against the number of inner steps: graphs kept, recomputed, and first order.

    python -m tests.benchmarks.memory              # conv4 with max-pooling, 8 tasks, 5-way 5-shot, one thread
    python -m tests.benchmarks.memory --steps 1 5 --kernels native

Peak resident memory in MB over the idle process, each in a process of its own, and the counted peak of live tensors
(what the planner goes by); then seconds per meta-gradient, the median of runs in turn, and recomputed over kept. For
every kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.kernels import Kernel
from pipeline.models.conv4 import Conv4Config
from pipeline.tasks.objectives import Classification
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import peak_bytes
from pipeline.types import TaskBatch

N_WAY, K_SHOT, N_QUERY = 5, 5, 15
REPEATS = 3
MODES = {"kept": {}, "recomputed": {"recompute_inner_steps": True}, "first order": {"first_order": True}}
KERNELS = ["closed", "native"]
MB = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10, 20], help="inner steps")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=KERNELS)
    parser.add_argument("--part", choices=["both", "memory", "time"], default="both")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process that measures itself
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    if options.one:
        print(json.dumps(_measure(options.modes[0], options.steps[0], options.tasks, options.kernels[0])))
        return
    print(f"torch {torch.__version__}, conv4 max_pool, {options.tasks} tasks, {N_WAY}-way {K_SHOT}-shot\n")
    if options.part != "time":
        _show_memory(options)
    if options.part != "memory":
        _show_times(options)


def _show_memory(options: argparse.Namespace) -> None:
    columns = " | ".join(f"{steps} steps" for steps in options.steps)
    print(f"| peak MB, resident (counted) | {columns} | last/first |\n" + "|---" * (len(options.steps) + 2) + "|")
    for kernel in options.kernels:
        for mode in options.modes:
            found = [_in_a_process(mode, steps, kernel, options.tasks) for steps in options.steps]
            cells = [f"{one['resident'] / MB:.0f} ({one['counted'] / MB:.0f})" for one in found]
            ratio = found[-1]["resident"] / found[0]["resident"]
            print(f"| {kernel}, {mode} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    print()


def _in_a_process(mode: str, steps: int, kernel: str, tasks: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--one", "--modes", mode, "--steps", str(steps)]
    command += ["--tasks", str(tasks), "--kernels", kernel]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def _measure(mode: str, steps: int, tasks: int, kernel: Kernel) -> dict[str, int]:
    maml, batch = _case(mode, steps, tasks, kernel)
    state = maml.init(0)
    warm_up, small = _case(mode, 1, 1, kernel)  # code that is loaded or generated at first use is no part of a step
    warm_up.meta_grad(state, small, step=0)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the step would be at home in what the warm-up has freed
    idle = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    maml.meta_grad(state, batch, step=0)
    resident = _status("VmHWM") - idle
    counted = peak_bytes(lambda: maml.meta_grad(state, batch, step=0), torch.device("cpu"))
    return {"resident": resident, "counted": counted}


def _status(field: str) -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _show_times(options: argparse.Namespace) -> None:
    modes = [mode for mode in options.modes if mode != "first order"]
    heads = " | ".join(f"{mode}: s" for mode in modes)
    print(f"| kernel, inner steps | {heads} | last/first |\n" + "|---" * (len(modes) + 2) + "|")
    for kernel in options.kernels:
        for steps in options.steps:
            cases = {mode: _case(mode, steps, options.tasks, kernel) for mode in modes}
            times: dict[str, list[float]] = {mode: [] for mode in modes}
            for counted in [False, *[True] * REPEATS]:
                for mode, (maml, batch) in cases.items():
                    state = maml.init(0)
                    began = time.perf_counter()
                    maml.meta_grad(state, batch, step=0)
                    if counted:
                        times[mode].append(time.perf_counter() - began)
            medians = [statistics.median(times[mode]) for mode in modes]
            cells = " | ".join(f"{seconds:.2f}" for seconds in medians)
            print(f"| {kernel}, {steps} | {cells} | {medians[-1] / medians[0]:.2f} |", flush=True)


def _case(mode: str, steps: int, tasks: int, kernel: Kernel) -> tuple[MAML, TaskBatch]:
    shape = (1, 28, 28)
    model = Conv4Config(name="conv4").build(input_shape=shape, num_outputs=N_WAY, dtype=torch.float32, kernel=kernel)
    config = MAMLConfig(name="maml", inner_lr=0.1, adaptation_steps=steps, **MODES[mode])
    generator = torch.Generator().manual_seed(0)

    def part(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(tasks, N_WAY * per_class, *shape, generator=generator)
        return x, torch.arange(N_WAY).repeat_interleave(per_class).expand(tasks, -1)

    maml = MAML(config, model=model, objective=Classification())
    return maml, TaskBatch(*part(K_SHOT), *part(N_QUERY))


if __name__ == "__main__":
    main()
