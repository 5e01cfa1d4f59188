"""An algorithm whose meta-gradient is one compiled program: inner steps, their derivatives and the sums over tasks.

A meta-gradient of a small network is hundreds of small ops, each of which takes longer to launch than to compute.
`make_fx` traces the whole of it once, inner gradients included, into a graph of plain tensor ops; inductor makes loops
of C++ (CPU) or Triton kernels (CUDA) of it. What is computed stays the same but for the order of roundings.

Tracing runs on fake tensors, which have shapes and no numbers. So whatever a trace cannot hold is found out and not
frozen into the program: a branch on a tensor's value, a tensor from outside, code that reads a tensor's memory. The
outer step is passed as a `_WatchedStep`, which notes that it is read: a program would hold that one step for ever, so
an algorithm that anneals by `step` is left as it is. So is whatever cannot be traced or compiled; that is said once.

A program is for exact shapes, layouts, dtypes and one device. There are few of those in a run (the task chunk, a
smaller last one); after MAX_PROGRAMS the rest goes uncompiled, so that odd shapes never mean compiling all the time.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pipeline.types import Adapted, Algorithm, MetaGradient, MetaState, Normalization, Statistics, TaskBatch

MAX_PROGRAMS = 4
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # inductor's own
log = logging.getLogger(__name__)

Signature = tuple[Any, ...]


class _Program(NamedTuple):
    run: Callable[..., Any]  # flat inputs -> flat outputs
    names: tuple[tuple[str, ...], ...]  # of the outputs: a tuple for each field of MetaGradient
    buffers: Signature | None  # that it reads; None: it reads none, and any will do


class Compiled:
    """Algorithm: another one, with `meta_grad` compiled where that can be done, else unchanged."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self.train_steps = algorithm.train_steps
        self.eval_steps = algorithm.eval_steps
        self.any_way = algorithm.any_way
        self._programs: dict[Signature, _Program] = {}
        self._compiled = 0
        self._eager_because: str | None = None

    @property
    def programs(self) -> int:
        """Programs in use; 0 where everything is eager."""
        return len(self._programs)

    def init(self, seed: int) -> MetaState:
        return self._algorithm.init(seed)

    def describe(self, state: MetaState) -> dict[str, float]:
        return self._algorithm.describe(state)

    def curves(self, state: MetaState, batch: TaskBatch) -> dict[str, Tensor]:
        return self._algorithm.curves(state, batch)

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        return self._algorithm.adaptation_path(
            state, support_x, support_y, steps=steps, inductive=inductive, num_classes=num_classes, last_only=last_only
        )

    def predict(self, adapted: Adapted, query_x: Tensor, normalization: Normalization) -> Tensor:
        return self._algorithm.predict(adapted, query_x, normalization)

    def update_buffers(self, buffers: Statistics, observed: Statistics) -> Statistics:
        return self._algorithm.update_buffers(buffers, observed)

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        program = self._program_for(state, batch)
        if program is None:
            return self._algorithm.meta_grad(state, batch, step=step)
        buffers = state.buffers.values() if program.buffers is not None else ()
        with torch.no_grad():
            values = iter(program.run(*(v.detach() for v in (*state.params.values(), *buffers, *_given(batch)))))
        return MetaGradient(*({name: next(values) for name in names} for names in program.names))

    def _program_for(self, state: MetaState, batch: TaskBatch) -> _Program | None:
        signature = (*_signature(state.params), *(_layout(part) for part in _given(batch)))
        program = self._programs.get(signature)
        if program is not None and program.buffers in (None, _signature(state.buffers)):
            return program
        if self._eager_because is not None:
            return None
        if self._compiled == MAX_PROGRAMS:
            self._give_up(f"there are more than {MAX_PROGRAMS} shapes of meta-batch")
            return None
        self._compiled += 1
        try:
            self._programs[signature] = program = _compile(self._algorithm, state, batch)
        except _CannotCompile as reason:
            self._give_up(str(reason))
            return None
        return program

    def _give_up(self, reason: str) -> None:
        self._eager_because = reason
        log.warning("training.compile: %s; going on without for these.", reason)


def _given(batch: TaskBatch) -> list[Tensor]:
    """Its parts, without those that are missing (keys, classes)."""
    return [part for part in batch if part is not None]


def _signature(tensors: dict[str, Tensor]) -> Signature:
    return tuple((name, _layout(value)) for name, value in tensors.items())


def _layout(value: Tensor) -> Signature:
    return (value.shape, value.stride(), value.dtype, value.device)


class _CannotCompile(Exception):
    pass


class _WatchedStep:
    """Stands for the outer step in a trace. It is no number: whatever reads it learns that it cannot be read."""

    def __init__(self) -> None:
        self.read = False

    def _refuse(self, *_: Any) -> NoReturn:
        self.read = True
        raise _CannotCompile("the algorithm anneals by the outer step, which a program would freeze")

    __bool__ = __int__ = __float__ = __index__ = __hash__ = __eq__ = __ne__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __abs__ = __round__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __str__ = __repr__ = _refuse


def _compile(algorithm: Algorithm, state: MetaState, batch: TaskBatch) -> _Program:
    """Raises _CannotCompile, with the reason in one line."""
    with _cache():
        graph, names = _trace(algorithm, state, batch)
        inputs: list[Any] = [v.detach() for v in (*state.params.values(), *state.buffers.values(), *_given(batch))]
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        buffers = slice(len(state.params), len(state.params) + len(state.buffers))
        reads_buffers = any(node.users for node in placeholders[buffers])
        if not reads_buffers:
            for node in placeholders[buffers]:
                graph.graph.erase_node(node)
            del inputs[buffers]
            graph.recompile()
        try:
            from torch import _inductor as inductor

            run = inductor.compile(graph, inputs, options=_options())
            run(*inputs)  # compiles what is left for the first call
        except torch.OutOfMemoryError:  # fewer tasks at once may fit
            raise
        except Exception as error:  # the compiler's own errors, a missing or failing C++ compiler, a full disk …
            raise _CannotCompile(f"the meta-gradient cannot be compiled here ({_in_one_line(error)})") from error
    return _Program(run, names, _signature(state.buffers) if reads_buffers else None)


def _trace(
    algorithm: Algorithm, state: MetaState, batch: TaskBatch
) -> tuple[torch.fx.GraphModule, tuple[tuple[str, ...], ...]]:
    """The graph of (parameters, buffers, batch) -> (grads, metrics, statistics), all flat, and the outputs' names."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    names: tuple[tuple[str, ...], ...] = ()
    step = _WatchedStep()

    def flat(*inputs: Tensor) -> list[Tensor]:
        nonlocal names
        rest = iter(inputs)
        params = {name: next(rest) for name in state.params}
        buffers = {name: next(rest) for name in state.buffers}
        traced = TaskBatch(*(None if part is None else next(rest) for part in batch))  # type: ignore[arg-type]
        gradient = algorithm.meta_grad(MetaState(params, buffers), traced, step=step)  # type: ignore[arg-type]
        names = tuple(tuple(part) for part in gradient)
        return [value for part in gradient for value in part.values()]

    inputs = [v.detach() for v in (*state.params.values(), *state.buffers.values(), *_given(batch))]
    try:
        graph = make_fx(flat, tracing_mode="fake")(*inputs)
    except _CannotCompile:
        raise
    except Exception as error:  # whatever an algorithm or a model does that a trace cannot hold
        raise _CannotCompile(f"the meta-gradient cannot be traced ({_in_one_line(error)})") from error
    if step.read:
        step._refuse()
    graph.graph.eliminate_dead_code()
    drawing = torch.Tag.nondeterministic_seeded
    random = [str(node.target) for node in graph.graph.nodes if drawing in getattr(node.target, "tags", ())]
    if random:
        raise _CannotCompile(f"the meta-gradient draws global random numbers ({random[0]})")
    return graph, names


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _options() -> dict[str, Any]:
    return {
        "deterministic": True,  # no choice by timing: two runs of an experiment make the same kernels
        "compile_threads": 1,  # in this process: workers are one to a core, and compile one after another
        "cpp.threads": torch.get_num_threads(),  # part of the cache's key, as the order of sums follows it
    }


@contextmanager
def _cache() -> Iterator[None]:
    """Inductor's cache in a folder of the user's, one process at a time: those that start together find its work."""
    if CACHE_VARIABLE not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        os.environ[CACHE_VARIABLE] = str(Path(base) / "metapipe" / "inductor")
    folder = Path(os.environ[CACHE_VARIABLE])
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "metapipe.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise _CannotCompile(f"{folder} cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when its holder dies
        yield
    finally:
        os.close(lock)
