"""Other ways to a meta-gradient: higher, TorchOpt, learn2learn, and PyTorch's own `torch.func`.

Each is used as its documentation shows, task after task (`vmap`: side by side), on plain `nn.Module`s whose
parameters have the names of ours, so that they start from the same numbers. Every contender returns the mean
meta-gradient over the tasks by parameter name.

Shapes: T tasks · S support examples · Q query examples · N either of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pipeline.types import Params, TaskBatch

VMAP_CHUNK = 4  # tasks side by side on a CPU; more only cost memory there


class Problem(NamedTuple):
    """What every contender is given."""

    batch: TaskBatch
    params: Params  # the meta-parameters to start from, on the batch's device and of its dtype
    network: Callable[[], nn.Module]  # a new one, of any parameters
    loss: Callable[[Tensor, Tensor], Tensor]  # outputs and targets of one task -> its mean loss
    inner_lr: float
    steps: int  # adaptation steps
    first_order: bool

    def start(self) -> nn.Module:
        """The network with the meta-parameters in it."""
        network = self.network().to(self.batch.support_x)
        network.load_state_dict(self.params)
        return network

    def tasks(self) -> Iterator[TaskBatch]:
        """Each task without its axis."""
        return (TaskBatch(*parts) for parts in zip(*self.episodes(), strict=True))

    def episodes(self) -> tuple[Tensor, ...]:
        """Support and query sets; the plain networks draw nothing at random, so they need no keys."""
        batch = self.batch
        return batch.support_x, batch.support_y, batch.query_x, batch.query_y


Step = Callable[[], Params]


class PlainConv4(nn.Sequential):
    """Conv4 of stock layers: convolution without bias, batch statistics, ReLU, and max-pooling or a stride of two."""

    def __init__(self, n_way: int, *, pool: bool, hidden: int = 64) -> None:
        super().__init__()
        for number, channels in enumerate((1, hidden, hidden, hidden), start=1):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(channels, hidden, 3, 1 if pool else 2, padding=1, bias=False))
            block.add_module("norm", nn.BatchNorm2d(hidden, track_running_stats=False))
            block.add_module("relu", nn.ReLU())
            if pool:
                block.add_module("pool", nn.MaxPool2d(2))
            self.add_module(f"block{number}", block)
        self.add_module("mean", nn.Flatten() if pool else _SpatialMean())
        self.add_module("head", nn.Linear(hidden, n_way))


class _SpatialMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class PlainMLP(nn.Sequential):
    """Two hidden layers of ReLU units."""

    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.add_module("layer1", nn.Linear(1, hidden))
        self.add_module("relu1", nn.ReLU())
        self.add_module("layer2", nn.Linear(hidden, hidden))
        self.add_module("relu2", nn.ReLU())
        self.add_module("head", nn.Linear(hidden, 1))


def _mean_grads(network: nn.Module, tasks: int) -> Params:
    return {name: value.grad / tasks for name, value in network.named_parameters() if value.grad is not None}


def higher_step(problem: Problem) -> Step:
    """Grefenstette et al. 2019, `higher.innerloop_ctx`. First order: the gradient at the adapted parameters."""
    import higher

    network = problem.start()
    optimizer = torch.optim.SGD(network.parameters(), lr=problem.inner_lr)

    def step() -> Params:
        network.zero_grad()
        for task in problem.tasks():
            with higher.innerloop_ctx(
                network, optimizer, copy_initial_weights=False, track_higher_grads=not problem.first_order
            ) as (adapted, inner):
                for _ in range(problem.steps):
                    inner.step(problem.loss(adapted(task.support_x), task.support_y))
                loss = problem.loss(adapted(task.query_x), task.query_y)
                if problem.first_order:
                    _accumulate(network, torch.autograd.grad(loss, list(adapted.parameters())))
                else:
                    loss.backward()
        return _mean_grads(network, len(problem.batch.support_x))

    return step


def _accumulate(network: nn.Module, grads: tuple[Tensor, ...]) -> None:
    for parameter, value in zip(network.parameters(), grads, strict=True):
        parameter.grad = value if parameter.grad is None else parameter.grad + value


def torchopt_step(problem: Problem) -> Step:
    """Ren et al. 2022: `MetaSGD`; first order, which that does not have, by the functional `torchopt.sgd`."""
    import torchopt

    network = problem.start()
    if problem.first_order:
        return _torchopt_first_order(problem, network)
    inner = torchopt.MetaSGD(network, lr=problem.inner_lr)
    fresh_network = torchopt.extract_state_dict(network, by="reference")
    fresh_optimizer = torchopt.extract_state_dict(inner, by="reference")

    def step() -> Params:
        network.zero_grad()
        for task in problem.tasks():
            for _ in range(problem.steps):
                inner.step(problem.loss(network(task.support_x), task.support_y))
            problem.loss(network(task.query_x), task.query_y).backward()
            torchopt.recover_state_dict(network, fresh_network)
            torchopt.recover_state_dict(inner, fresh_optimizer)
        return _mean_grads(network, len(problem.batch.support_x))

    return step


def _torchopt_first_order(problem: Problem, network: nn.Module) -> Step:
    import torchopt

    optimizer = torchopt.sgd(lr=problem.inner_lr)
    names = [name for name, _ in network.named_parameters()]

    def loss_of(params: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(network, dict(zip(names, params, strict=True)), (x,)), y)

    def step() -> Params:
        network.zero_grad()
        for task in problem.tasks():
            params = tuple(network.parameters())
            state = optimizer.init(params)
            for _ in range(problem.steps):
                grads = torch.autograd.grad(loss_of(params, task.support_x, task.support_y), params)
                updates, state = optimizer.update(grads, state, inplace=False)
                moved = torchopt.apply_updates(params, updates, inplace=False)
                params = tuple(value.detach().requires_grad_() for value in moved)
            _accumulate(network, torch.autograd.grad(loss_of(params, task.query_x, task.query_y), params))
        return _mean_grads(network, len(problem.batch.support_x))

    return step


def learn2learn_step(problem: Problem) -> Step:
    """Arnold et al. 2020, `learn2learn.algorithms.MAML`."""
    import learn2learn

    network = problem.start()
    maml = learn2learn.algorithms.MAML(network, lr=problem.inner_lr, first_order=problem.first_order)

    def step() -> Params:
        network.zero_grad()
        for task in problem.tasks():
            learner = maml.clone()
            for _ in range(problem.steps):
                learner.adapt(problem.loss(learner(task.support_x), task.support_y))
            problem.loss(learner(task.query_x), task.query_y).backward()
        return _mean_grads(network, len(problem.batch.support_x))

    return step


def loop_step(problem: Problem) -> Step:
    """A loop over tasks by `functional_call`: the reference that all others are compared with."""
    network = problem.start()

    def step() -> Params:
        network.zero_grad()
        for task in problem.tasks():
            params: Params = dict(network.named_parameters())
            for _ in range(problem.steps):
                loss = problem.loss(functional_call(network, params, (task.support_x,)), task.support_y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=not problem.first_order)
                params = {k: v - problem.inner_lr * g for (k, v), g in zip(params.items(), grads, strict=True)}
            problem.loss(functional_call(network, params, (task.query_x,)), task.query_y).backward()
        return _mean_grads(network, len(problem.batch.support_x))

    return step


def vmap_step(problem: Problem) -> Step:
    """`vmap(grad(task))`: tasks side by side, all derivatives inside."""
    network = problem.start()
    meta_params = {name: value.detach() for name, value in network.named_parameters()}
    chunk = None if problem.batch.support_x.is_cuda else VMAP_CHUNK

    def loss_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(network, params, (x,)), y)

    def task_loss(params: Params, *task: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = task
        for _ in range(problem.steps):
            grads = grad(loss_of)(params, support_x, support_y)
            if problem.first_order:
                grads = {name: value.detach() for name, value in grads.items()}
            params = {name: value - problem.inner_lr * grads[name] for name, value in params.items()}
        return loss_of(params, query_x, query_y)

    of_tasks: Any = vmap(grad(task_loss), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk)

    def step() -> Params:
        return {name: value.mean(dim=0) for name, value in of_tasks(meta_params, *problem.episodes()).items()}

    return step


def classification_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def regression_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


LIBRARIES: dict[str, Callable[[Problem], Step]] = {
    "higher": higher_step,
    "torchopt": torchopt_step,
    "learn2learn": learn2learn_step,
}
PYTORCH: dict[str, Callable[[Problem], Step]] = {"loop": loop_step, "vmap": vmap_step}
