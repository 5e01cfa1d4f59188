"""The meta-gradient against the peers: is it the same, how fast is it, and what does it cost?

    pip install '.[bench]'                           # higher and TorchOpt; a peer that is missing is left out
    metapipe data prepare glyphs --out data/glyphs   # or any 28×28 data set: --data
    python -m tests.benchmarks.meta_gradient         # one CPU thread; --device cuda; --quick; --cases 'conv4-pool-5w-*'

Every contender gets the same episodes, the same network with the same parameters and the same inner steps. First all
meta-gradients are compared in float64 with the sequential loop of stock PyTorch, and a difference beyond 1e-10 ends
the benchmark; mixed precision and TF32, which have no float64, show the cosine of their gradient with the reference.
Then all take turns in float32 (A B C A B C …), a plain matrix product among them, so that every ratio is one of
neighbours in time. Peak memory and operator counts come from a fresh process per contender.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline import kernels
from pipeline.errors import UserError
from pipeline.experiment import Components, Experiment
from pipeline.training.compiled import Compiled
from pipeline.training.context import LocalContext
from pipeline.training.memory import keep_freed_memory
from pipeline.training.step import global_gradient
from pipeline.types import MetaState, Params
from tests.benchmarks import measuring, peers, report
from tests.benchmarks.measuring import Quartiles, quartiles
from tests.benchmarks.peers import Problem, Step

SAME = 1e-10  # largest relative difference of two float64 meta-gradients that are to be the same
N_QUERY = 15  # per class
REFERENCE = "loop"

Settings = dict[str, Any]
CONV4_PATHS: dict[str, Settings] = {
    "pure": {"kernel": "pure"},
    "closed": {"kernel": "closed"},
    "closed, compiled": {"kernel": "closed", "compile": True},
    "native": {"kernel": "native"},
    "native, mixed": {"kernel": "native", "precision": "mixed"},
}
CONV4_PATHS_ON_A_GPU: dict[str, Settings] = {
    "closed": {"kernel": "closed", "use_gpu": True},
    "closed, compiled": {"kernel": "closed", "use_gpu": True, "compile": True},
    "closed, TF32": {"kernel": "closed", "use_gpu": True, "tf32": True},
    "closed, mixed": {"kernel": "closed", "use_gpu": True, "precision": "mixed"},
}
MLP_PATHS: dict[str, Settings] = {"eager": {"compile": False}, "compiled": {"compile": True}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of contenders."""

    network: str  # pool, strided (conv4) or sinusoid (MLP)
    n_way: int = 1
    steps: int  # adaptation steps
    first_order: bool
    tasks: int

    @property
    def name(self) -> str:
        order = "first" if self.first_order else "second"
        if self.network == "sinusoid":
            return f"sinusoid-{self.steps}s-{order}"
        return f"conv4-{self.network}-{self.n_way}w-{self.steps}s-{order}"

    def paths(self, device: torch.device) -> dict[str, Settings]:
        """Our contenders."""
        if self.network == "sinusoid":
            return MLP_PATHS
        return CONV4_PATHS if device.type == "cpu" else CONV4_PATHS_ON_A_GPU

    def experiment(self, data: str, dtype: torch.dtype, settings: Settings) -> Experiment:
        """What a user would write to train this. Raises ConfigError: settings that do not go together."""
        task: dict[str, Any]
        model: dict[str, Any]
        if self.network == "sinusoid":
            task, model, inner_lr = {"family": "sinusoid"}, {"name": "mlp"}, 0.01
        else:
            task = {"family": "images", "data": data, "split": _class_split(data), "n_way": self.n_way}
            task |= {"n_query": N_QUERY, "eval_n_query": N_QUERY}
            model = {"name": "conv4", "downsample": "max_pool" if self.network == "pool" else "stride"}
            inner_lr = 0.1
        algorithm = {"name": "maml", "inner_lr": inner_lr, "adaptation_steps": self.steps}
        training = {"steps": 1, "meta_batch_size": self.tasks, "backend": "local", **settings}
        content = {
            "name": self.name,
            "task": task,
            "model": model,
            "algorithm": {**algorithm, "first_order": self.first_order},
            "training": {**training, "dtype": str(dtype).removeprefix("torch.")},
        }
        return experiments.from_dict(content, source="configuration")


def cases(tasks: int) -> Iterator[Case]:
    for first_order in (False, True):
        for network in ("pool", "strided"):
            for n_way in (5, 20):
                for steps in (1, 5):
                    yield Case(network=network, n_way=n_way, steps=steps, first_order=first_order, tasks=tasks)
        for steps in (1, 5, 10):
            yield Case(network="sinusoid", steps=steps, first_order=first_order, tasks=25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One case on one machine; travels to the processes that measure memory."""

    case: Case
    data: str
    device: torch.device
    threads: int

    @property
    def paths(self) -> dict[str, Settings]:
        return self.case.paths(self.device)

    def contenders(self) -> dict[str, Callable[[torch.dtype], Step]]:
        """Name -> what makes its step in a dtype. All may raise where a contender is not to be had here."""
        of_others = {**peers.PYTORCH, **peers.LIBRARIES}
        return {
            **{name: partial(self._peer, make) for name, make in of_others.items()},
            **{name: partial(self._ours, settings) for name, settings in self.paths.items()},
        }

    def _peer(self, make: Callable[[Problem], Step], dtype: torch.dtype) -> Step:
        return self._in_turn(make(self.problem(dtype)), tf32=False)

    def _in_turn(self, step: Step, *, tf32: bool) -> Step:
        """TF32 is the whole process's, and contenders take turns."""
        if self.device.type == "cpu":
            return step

        def with_own_tf32() -> Params:
            kernels.allow_tf32(tf32)
            return step()

        return with_own_tf32

    def problem(self, dtype: torch.dtype) -> Problem:
        experiment = self.case.experiment(self.data, dtype, {})
        parts = experiments.build(experiment, device=self.device)
        sinusoid = self.case.network == "sinusoid"
        return Problem(
            batch=parts.family.sample("meta_train", 0, torch.arange(self.case.tasks), seed=0),
            params=self._params(parts),
            network=peers.PlainMLP if sinusoid else self._plain_conv4,
            loss=peers.regression_loss if sinusoid else peers.classification_loss,
            inner_lr=experiment.algorithm.inner_lr,
            steps=self.case.steps,
            first_order=self.case.first_order,
        )

    def _plain_conv4(self) -> peers.PlainConv4:
        return peers.PlainConv4(self.case.n_way, pool=self.case.network == "pool")

    def _params(self, parts: Components) -> Params:
        return {name: value.to(self.device) for name, value in parts.algorithm.init(0).params.items()}

    def _ours(self, settings: Settings, dtype: torch.dtype) -> Step:
        experiment = self.case.experiment(self.data, dtype, settings)
        parts = experiments.build(experiment, device=self.device)
        for key in ("kernel", "precision"):
            if key in settings and getattr(parts.model, key) != settings[key]:
                raise NotImplementedError(f"this machine computes with {getattr(parts.model, key)} instead")
        batch = parts.family.sample("meta_train", 0, torch.arange(self.case.tasks), seed=0)
        state = MetaState({name: value.requires_grad_() for name, value in self._params(parts).items()}, {})
        context = LocalContext(self.device)
        chunk = experiments.task_chunk(experiment, parts, self.device)
        algorithm = Compiled(parts.algorithm) if experiment.training.compile else parts.algorithm

        def step() -> Params:
            return global_gradient(context, algorithm, state, batch, step=0, chunk=chunk).grads

        return self._in_turn(step, tf32=experiment.training.tf32)


def _class_split(data: str) -> str:
    from pipeline.tasks.shards import read_manifest

    return read_manifest(data).splits[0]


def compare(bench: Bench, notes: list[str]) -> dict[str, str]:
    """Contender -> how its meta-gradient agrees with the reference's; those that do not run here are left out.

    Raises SystemExit: one that should be the same is not.
    """
    makers = bench.contenders()
    expected = _flat(makers[REFERENCE](torch.float64)())
    agreement = {}
    for name, make in makers.items():
        settings = bench.paths.get(name, {})
        rounded = settings.get("precision") == "mixed" or settings.get("tf32", False)  # neither exists in float64
        try:
            found = _flat(make(torch.float32 if rounded else torch.float64)())
        except (UserError, ImportError, RuntimeError, NotImplementedError) as error:
            notes.append(f"{name} is left out: {' '.join(str(error).split())[:160]}")
            continue
        if rounded:
            agreement[name] = f"cosine {torch.cosine_similarity(found, expected, dim=0):.5f}"
            continue
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= SAME:
            raise SystemExit(f"{bench.case.name}: {name} differs from {REFERENCE} by {difference:.1e} in float64")
        agreement[name] = f"{difference:.0e}"
    return agreement


def _flat(grads: Params) -> Tensor:
    return torch.cat([grads[name].detach().double().flatten() for name in sorted(grads)])


def run(bench: Bench, *, rounds: int, probe: bool, notes: list[str]) -> list[report.Row]:
    """Compare, then time in turn; a row for each contender."""
    agreement = compare(bench, notes)
    makers = bench.contenders()
    steps = {name: makers[name](torch.float32) for name in agreement}
    gemm, gemm_flops = measuring.gemm(bench.device)
    seconds = measuring.in_turn({**steps, "gemm": gemm}, rounds=rounds, device=bench.device)
    per_second = gemm_flops / median(seconds.pop("gemm"))
    needed = measuring.flops(steps[REFERENCE])
    library = _fastest(seconds, peers.LIBRARIES)
    peer = _fastest(seconds, [*peers.LIBRARIES, *peers.PYTORCH])
    rows = []
    for name in steps:
        time = quartiles(seconds[name])
        row = {
            "case": bench.case.name,
            "contender": name,
            "ours": name in bench.paths,
            "seconds": time._asdict(),
            "tasks_per_second": bench.case.tasks / time.median,
            "best_library": library,
            "times_best_library": _times(seconds, library, name),
            "best_peer": peer,
            "times_best_peer": _times(seconds, peer, name),
            "gemm_flops_per_second": per_second,
            "share_of_gemm_peak": needed / time.median / per_second,
            "float64_difference": agreement[name],
            "load_average": report.load_average(),
        }
        if probe:
            row |= _probe(bench, name, notes)
        rows.append(row)
        print(f"{bench.case.name}: {name} {1000 * time.median:.1f} ms", file=sys.stderr, flush=True)
    return rows


def _fastest(seconds: dict[str, list[float]], names: Any) -> str | None:
    there = [name for name in names if name in seconds]
    return min(there, key=lambda name: median(seconds[name]), default=None)


def _times(seconds: dict[str, list[float]], other: str | None, name: str) -> dict[str, float] | None:
    """How many times faster than another, round by round."""
    if other is None:
        return None
    return quartiles([theirs / own for theirs, own in zip(seconds[other], seconds[name], strict=True)])._asdict()


def _probe(bench: Bench, name: str, notes: list[str]) -> dict[str, int | None]:
    try:
        return measuring.in_fresh_process(measure_costs, bench, name)
    except RuntimeError as error:
        notes.append(f"{bench.case.name}, {name}: no memory and operator count: {str(error)[:200]}")
        return {}


def measure_costs(bench: Bench, name: str) -> dict[str, int | None]:
    """Peak memory over idle and operators (CUDA: kernels) of one step. Runs in a process of its own."""
    torch.set_num_threads(bench.threads)
    keep_freed_memory()
    step = bench.contenders()[name](torch.float32)
    return {
        "peak_bytes": measuring.peak_memory(step, bench.device),
        "launches": measuring.launches(step, bench.device),
    }


def _interval(values: dict[str, float] | None, digits: int, factor: float = 1.0) -> str:
    if values is None:
        return "–"
    low, middle, high = (f"{factor * value:.{digits}f}" for value in Quartiles(**values))
    return f"{middle} ({low}–{high})"


COLUMNS: report.Columns = {
    "case": lambda row: row["case"],
    "contender": lambda row: f"**{row['contender']}**" if row["ours"] else row["contender"],
    "ms a step": lambda row: _interval(row["seconds"], 1, 1000),
    "tasks/s": lambda row: f"{row['tasks_per_second']:.0f}",
    "× best library": lambda row: _interval(row["times_best_library"], 2),
    "× best peer": lambda row: _interval(row["times_best_peer"], 2),
    "of GEMM peak": lambda row: f"{row['share_of_gemm_peak']:.0%}",
    "launches a step": lambda row: str(row.get("launches") or "–"),
    "peak MB over idle": lambda row: f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else "–",
    "float64 difference": lambda row: row["float64_difference"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of case names, e.g. 'conv4-pool-*-second'")
    parser.add_argument("--quick", action="store_true", help="2 tasks, 3 rounds, no memory and operator counts")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--tasks", type=int, help="of conv4; default 4 on a CPU, 32 on a GPU; sinusoids have 25")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="data/glyphs", help="prepared data set of 28×28 images")
    parser.add_argument("--out", type=Path, help="folder for meta_gradient.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    tasks = options.tasks or (2 if options.quick else 32 if device.type == "cuda" else 4)
    chosen = [case for case in cases(tasks) if any(fnmatch(case.name, pattern) for pattern in options.cases)]
    if not chosen:
        parser.error("no case has such a name; they are: " + ", ".join(case.name for case in cases(tasks)))
    notes = [
        f"`{report.command('tests.benchmarks.meta_gradient')}`",
        "Times are medians (quartiles) over rounds in turn; ratios are taken within each round. Best library: the "
        "fastest of higher, TorchOpt, learn2learn; best peer: of these and PyTorch's own loop and vmap.",
        "GEMM peak: float32 matrix product in the same rounds. Launches: CUDA kernels, on a CPU dispatched operators.",
    ]
    where = {**report.place(device), "conv4_tasks": tasks}
    rows = []
    for case in chosen:
        bench = Bench(case=case, data=options.data, device=device, threads=options.threads)
        rounds = options.rounds or (3 if options.quick else 7)
        rows += run(bench, rounds=rounds, probe=not options.quick, notes=notes)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.write(
        options.out, "meta_gradient", where=where, rows=rows, columns=COLUMNS, notes=list(dict.fromkeys(notes))
    )


if __name__ == "__main__":
    main()
