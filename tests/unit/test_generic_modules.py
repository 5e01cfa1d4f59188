"""Any nn.Module: exact meta-gradients by loop and by vmap, keyed dropout, and a choice that is verified and measured.

The reference is written for one task at a time with plain PyTorch, in float64: the module itself in a loop over tasks,
BatchNorm in training mode, masks by hooks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import experiment as experiments
from pipeline import keys, launch, runs
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment
from pipeline.models.episode_layers import EpisodeAttention, EpisodeDropout
from pipeline.models.module import Batching, ModuleConfig, ModuleModel
from pipeline.runs import RunFolder
from pipeline.tasks.objectives import Classification
from pipeline.training import batching
from pipeline.training.plan import Plan
from pipeline.training.step import split_tasks
from pipeline.types import MetaGradient, MetaState, Params, TaskBatch

TASKS, SUPPORT, QUERY, CLASSES, RATE, STEPS = 3, 6, 9, 3, 0.3, 2
WORDS, LENGTH, WIDTH = 11, 5, 8


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.recurrent = kind(WIDTH, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(words))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0, **options: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(words)).mean(dim=1))


class OwnTransformer(nn.Module):
    """Written by hand: pre-normalized attention in its functional form."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(dropout)  # one layer in two places
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        q, k, v = self.projection(self.before(self.dropout(x))).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.dropout(self.after(x + attended)).mean(dim=1))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.embedding = nn.Embedding(WORDS, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(dim=1)
        return self.head(x if x.sum() > 0 else x + 1)


class Cube(torch.autograd.Function):
    """As functions were written before torch.func: without a rule for vmap."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * v


class WithOwnFunction(DataDependent):
    def forward(self, words: Tensor) -> Tensor:
        return self.head(Cube.apply(self.embedding(words).mean(dim=1)))


class RunningNorm(nn.Module):
    """A batch normalization that counts in a buffer of its own, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(dim=1)
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
        return self.head(x - x.mean(dim=0))


def conv_net(norm: nn.Module | None = None, dropout: nn.Module | None = None) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, padding=1), norm or nn.BatchNorm2d(4), nn.Tanh(), dropout or nn.Identity()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, CLASSES))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def words_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES))


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES, weights=None)


VMAPPED: dict[str, Callable[[], nn.Module]] = {
    "batch norm, convolutions": conv_net,
    "group norm, convolutions": lambda: conv_net(nn.GroupNorm(2, 4)),
    "layer norm": mlp,
    "embedding": words_net,
    "transformer": Transformer,
    "transformer, norm first": lambda: Transformer(norm_first=True),
    "own transformer": OwnTransformer,
}
LOOPED: dict[str, Callable[[], nn.Module]] = {"lstm": lambda: Recurrent(nn.LSTM), "gru": lambda: Recurrent(nn.GRU)}
DROPPED: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: conv_net(dropout=nn.Dropout(0.4)),
    "dropout of channels": lambda: conv_net(nn.GroupNorm(2, 4), nn.Dropout2d(0.4)),
    "transformer": lambda: Transformer(0.3),
    "transformer, norm first": lambda: Transformer(0.3, norm_first=True),
    "own transformer": lambda: OwnTransformer(0.3),
}
WORDS_NETS = ("embedding", "transformer", "transformer, norm first", "own transformer", "lstm", "gru")


def make_batch(name: str, *, tasks: int = TASKS, shape: tuple[int, ...] = (1, 6, 6)) -> TaskBatch:
    generator = torch.Generator().manual_seed(7)

    def part(examples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(CLASSES).repeat_interleave(examples // CLASSES).expand(tasks, -1)
        if name in WORDS_NETS:
            return torch.randint(WORDS, (tasks, examples, LENGTH), generator=generator), y
        return torch.rand(tasks, examples, *shape, generator=generator, dtype=torch.float64), y

    return TaskBatch(*part(SUPPORT), *part(QUERY), keys.fold(keys.make(3), torch.arange(tasks)))


def learner(
    make: Callable[[], nn.Module],
    how: Batching = "loop",
    *,
    kind: type[MAML] = MAML,
    dropout: bool = False,
    dtype: torch.dtype = torch.float64,
    **config: object,
) -> MAML:
    model = ModuleModel(make, dtype=dtype, batching=how, dropout=dropout)
    options = {"inner_lr": RATE, "adaptation_steps": STEPS, **config}
    return kind(MAMLConfig(name="maml", **options), model=model, objective=Classification())  # type: ignore[arg-type]


def meta_grad(maml: MAML, batch: TaskBatch, chunk: int | None = None) -> Params:
    pieces = [maml.meta_grad(maml.init(0), piece, step=0).grads for piece in split_tasks(batch, chunk)]
    return {name: torch.stack([piece[name] for piece in pieces]).sum(dim=0) for name in pieces[0]}


def reference(
    make: Callable[[], nn.Module],
    params: Params,
    batch: TaskBatch,
    masks: Callable | None = None,
    *,
    rate: float = RATE,
    steps: int = STEPS,
) -> Params:
    """The second-order meta-gradient, a task at a time. masks(network, task, pass number): hooks that drop."""
    network = make().double().eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    total = torch.zeros((), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        for task in range(len(batch.support_x)):
            support_x, support_y, query_x, query_y = (part[task] for part in batch[:4])  # type: ignore[index]

            def outputs(adapted: Params, x: Tensor, number: int, task: int = task) -> Tensor:
                hooks = masks(network, task, number) if masks else []
                try:
                    return functional_call(network, adapted, (x,))
                finally:
                    for hook in hooks:
                        hook.remove()

            adapted = leaves
            for step in range(steps):
                loss = F.cross_entropy(outputs(adapted, support_x, step), support_y)
                grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
                adapted = {k: v - rate * g for (k, v), g in zip(adapted.items(), grads, strict=True)}
            total = total + F.cross_entropy(outputs(adapted, query_x, steps + 1), query_y)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize(
    ("name", "how"), [*((n, h) for n in VMAPPED for h in ("loop", "vmap")), *((n, "loop") for n in LOOPED)]
)
def test_the_meta_gradient_is_the_sequential_one(name: str, how: Batching) -> None:
    """With every derivative outside vmap: ≤ 1e-10 relative, second order, normalization affines adapt."""
    make = (VMAPPED | LOOPED)[name]
    batch = make_batch(name)
    maml = learner(make, how)
    expected = reference(make, maml.init(0).params, batch)
    assert batching.disagreement(meta_grad(maml, batch), expected) <= 1e-10


# ---- dropout


def masks_by_hooks(keys_of_tasks: Tensor) -> Callable:
    """What the documented derivation gives: a pass's key, a layer's key, a uniform for each number that may drop."""
    passes = keys.pass_keys(keys_of_tasks, STEPS + 2)

    def hooks(network: nn.Module, task: int, number: int) -> list:
        layers = [m for m in network.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
        layer_keys = keys.bits(passes[number][task], len(layers))

        def drop(layer: nn.Module, key: Tensor) -> Callable:
            def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
                shape = output.shape if isinstance(layer, nn.Dropout) else (*output.shape[:2], 1, 1)
                mask = keys.uniform(key, math.prod(shape)).view(shape) >= layer.p  # type: ignore[operator]
                return output * mask / (1 - layer.p)  # type: ignore[operator]

            return hook

        return [layer.register_forward_hook(drop(layer, key)) for layer, key in zip(layers, layer_keys, strict=True)]

    return hooks


@pytest.mark.parametrize("how", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["dropout", "dropout of channels"])
def test_with_dropout_the_meta_gradient_is_the_sequential_one_with_the_same_masks(name: str, how: Batching) -> None:
    make, batch = DROPPED[name], make_batch(name)
    maml = learner(make, how, dropout=True)
    assert batch.keys is not None
    params = maml.init(0).params
    ours = meta_grad(maml, batch)
    assert batching.disagreement(ours, reference(make, params, batch, masks_by_hooks(batch.keys))) <= 1e-10
    assert batching.disagreement(ours, reference(make, params, batch)) > 1e-3


@pytest.mark.parametrize("name", DROPPED)
def test_masks_do_not_depend_on_loop_vmap_chunks_or_the_global_generator(name: str) -> None:
    make, batch = DROPPED[name], make_batch(name, tasks=5)
    expected = meta_grad(learner(make, dropout=True), batch)
    before = torch.get_rng_state()
    for how, chunk in (("loop", 2), ("vmap", None), ("vmap", 2), ("vmap", 1)):
        torch.manual_seed(chunk or 0)
        state = torch.get_rng_state()
        ours = meta_grad(learner(make, how, dropout=True), batch, chunk)  # type: ignore[arg-type]
        assert batching.disagreement(ours, expected) <= 1e-10, (how, chunk)
        assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    other = meta_grad(learner(make, dropout=True), batch._replace(keys=batch.keys + 1))  # type: ignore[operator]
    assert batching.disagreement(other, expected) > 1e-3


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_is_off_where_it_is_not_asked_for_and_in_evaluation(name: str) -> None:
    make, batch = DROPPED[name], make_batch(name)
    plain, dropping = learner(make), learner(make, dropout=True)
    assert (plain.model.stochastic, dropping.model.stochastic) == (False, True)
    without_keys = batch._replace(keys=None)
    assert batching.disagreement(meta_grad(dropping, without_keys), meta_grad(plain, batch)) <= 1e-12
    answers = []
    for maml in (plain, dropping):
        path = maml.adaptation_path(maml.init(0), batch.support_x, batch.support_y, steps=1, inductive=True)
        *_, adapted = path
        answers.append(maml.predict(adapted, batch.query_x, "inductive").detach())
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean_and_drops_its_part() -> None:
    for p, channels in ((0.25, False), (0.25, True), (0.0, False), (1.0, False)):
        layer = EpisodeDropout(p, channels=channels)
        layer.start(keys.make(1))
        x = torch.ones(40, 50, 4, dtype=torch.float64)
        first, second = layer(x), layer(x)
        assert abs(float((first == 0).double().mean()) - p) < 0.03
        assert abs(float(first.mean()) - (p < 1)) < 0.04
        assert torch.equal(first, second) == (p in (0.0, 1.0))  # called again in one pass, it draws anew
        assert not channels or torch.equal(first, first[..., :1].expand_as(first))
        layer.start(None)
        assert layer(x) is x


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_attention_weights_are_dropped_as_pytorch_does(batch_first: bool, sizes: dict[str, int]) -> None:
    """Without a key, nn.MultiheadAttention; with one, its own formula with the layer's mask."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=batch_first, **sizes).double().eval()
    ours = EpisodeAttention(original, name="attention")
    query = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    key, value = (torch.randn(4, 3, sizes.get(k, WIDTH), dtype=torch.float64) for k in ("kdim", "vdim"))
    forbidden = torch.rand(3, 3) < 0.3 if batch_first else torch.rand(4, 4) < 0.3
    forbidden.fill_diagonal_(False)
    expected = original(query, key, value, attn_mask=forbidden)
    for got, want in zip(ours(query, key, value, attn_mask=forbidden), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert ours(query, key, value, need_weights=False)[1] is None

    ours.weight_dropout.start(keys.make(5))
    output, weights = ours(query, key, value, attn_mask=forbidden, average_attn_weights=False)
    _, full = original(query, key, value, attn_mask=forbidden, average_attn_weights=False)
    mask = keys.uniform(keys.make(5), full.numel()).view_as(full) >= 0.5
    torch.testing.assert_close(weights, full * mask * 2, rtol=1e-12, atol=1e-12)
    original.dropout = 0.0
    uniform = torch.zeros_like(query)  # where every weight is equal and none is dropped, values are averaged
    ours.weight_dropout.p = 0.0
    torch.testing.assert_close(ours(uniform, key, value)[0], original(uniform, key, value)[0], rtol=1e-12, atol=1e-12)
    assert output.shape == query.shape


def test_dropout_that_cannot_come_from_keys_is_refused() -> None:
    def build(factory: str, shape: tuple[int, ...] = (LENGTH, WIDTH), **options: object) -> ModuleModel:
        config = ModuleConfig(name="module", factory=f"{__name__}:{factory}", **options)  # type: ignore[arg-type]
        return config.build(input_shape=shape, num_outputs=CLASSES, dtype=torch.float64)

    for factory, message in (
        ("drops_by_function", "other means than nn.Dropout"),
        ("drops_between_recurrent_layers", r"LSTM that drops between its layers"),
        ("attends_to_zero", "nn.MultiheadAttention with add_bias_kv or add_zero_attn"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(factory, dropout=True)
        build(factory)  # where dropout is off, nothing is wrong with it
    build("drops_by_module", dropout=True)


class DropsByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.5, self.training).mean(dim=1))


class TakesFirst(nn.Module):
    def forward(self, results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0].flatten(1)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


def drops_by_function() -> nn.Module:
    return DropsByFunction()


def drops_by_module() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(LENGTH * WIDTH, CLASSES))


def drops_between_recurrent_layers() -> nn.Module:
    lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)
    return nn.Sequential(lstm, TakesFirst(), nn.Linear(LENGTH * WIDTH, CLASSES))


def attends_to_zero() -> nn.Module:
    attention = SelfAttention(WIDTH, 2, dropout=0.5, add_zero_attn=True, batch_first=True)
    return nn.Sequential(attention, nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES))


# ---- the choice


def one_task(params: Params, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """The query loss of `conv_net` after adaptation, by torch.func: to be differentiated, and batched."""

    def outputs(params: Params, x: Tensor) -> Tensor:
        x = F.conv2d(x, params["0.weight"], params["0.bias"], padding=1)
        x = F.batch_norm(x, None, None, params["1.weight"], params["1.bias"], training=True)
        return F.linear(x.tanh().flatten(1), params["5.weight"], params["5.bias"])

    for _ in range(STEPS):
        grads = grad(lambda params: F.cross_entropy(outputs(params, support_x), support_y))(params)
        params = {k: v - RATE * grads[k] for k, v in params.items()}
    return F.cross_entropy(outputs(params, query_x), query_y)


OVER_TASKS = (None, 0, 0, 0, 0)


class InnerGradientInsideVmap(MAML):
    """By vmap the wrong way: the inner gradient inside, the outer derivative outside."""

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        if self.model.batching == "loop":  # type: ignore[attr-defined]
            return super().meta_grad(state, batch, step=step)
        params = {k: v.detach() for k, v in state.params.items()}
        grads = grad(lambda params: vmap(one_task, in_dims=OVER_TASKS)(params, *batch[:4]).sum())(params)
        return MetaGradient(grads, {}, {})


def test_the_check_detects_an_inner_gradient_inside_vmap() -> None:
    """What reference/prototype/vmap_wrong_gradient.py shows, seen by the check that guards every run."""
    batch = make_batch("batch norm, convolutions")
    maml = learner(conv_net, "auto", kind=InnerGradientInsideVmap)
    params = maml.init(0).params
    exact = reference(conv_net, params, batch)
    all_inside = vmap(grad(one_task), in_dims=OVER_TASKS)(params, *batch[:4])
    assert batching.disagreement({k: v.sum(dim=0) for k, v in all_inside.items()}, exact) <= 1e-10
    maml.model.batching = "vmap"  # type: ignore[attr-defined]
    if batching.disagreement(meta_grad(maml, batch), exact) <= 1e-10:
        pytest.skip(f"torch {torch.__version__} differentiates rightly through a gradient inside vmap")
    maml.model.batching = "loop"  # type: ignore[attr-defined]
    choice = batching.choose(maml, maml.model, maml.init(0), batch, step=0, chunk=None)  # type: ignore[arg-type]
    assert choice.batching == "loop"
    assert "vmap's meta-gradient would be wrong by" in choice.line
    assert batching.disagreement(meta_grad(maml, batch), exact) <= 1e-10


def choose(make: Callable[[], nn.Module], name: str, *, how: Batching = "auto", **options: object) -> batching.Choice:
    maml = learner(make, how, dtype=torch.float32, **options)  # type: ignore[arg-type]
    batch = make_batch(name, tasks=5)
    if batch.support_x.is_floating_point():
        batch = batch._replace(support_x=batch.support_x.float(), query_x=batch.query_x.float())
    network = maml.model._module  # type: ignore[attr-defined]
    dtypes = {name: buffer.dtype for name, buffer in network.named_buffers()}
    choice = batching.choose(maml, maml.model, maml.init(0), batch, step=0, chunk=None)  # type: ignore[arg-type]
    assert {name: buffer.dtype for name, buffer in network.named_buffers()} == dtypes
    return choice


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Recurrent(nn.LSTM), r"cannot batch this network \(Batching rule not implemented for aten::lstm"),
        (DataDependent, r"cannot batch this network \(.*data-dependent"),
        (WithOwnFunction, r"cannot batch this network \(.*autograd.Function"),
        (RunningNorm, r"cannot batch this network \(output with shape"),
    ],
)
def test_what_vmap_cannot_batch_goes_on_in_a_loop_and_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    for how in ("auto", "vmap"):
        choice = choose(make, "embedding", how=how)  # type: ignore[arg-type]
        assert choice.batching == "loop"
        assert re.search(reason, choice.line), choice.line


@pytest.mark.parametrize("name", [*VMAPPED, "dropout"])
def test_what_vmap_batches_rightly_is_measured(name: str) -> None:
    make = (VMAPPED | DROPPED)[name]
    choice = choose(make, name, dropout=name == "dropout")
    assert re.search(r"ms a task, .* (by vmap|in a loop)$", choice.line), choice.line
    assert choice.chunk is not None  # on a CPU
    assert choose(make, name, how="loop") == batching.Choice(
        "loop", 1, "tasks go through the network in a loop: as configured"
    )
    assert choose(make, name, how="vmap").batching == "vmap"


def test_the_faster_one_is_taken_with_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which the loop takes 10 a task and vmap 30 a chunk up to four tasks at once, 60 above."""
    now = 0.0

    def meta_grad(self: MAML, state: MetaState, batch: TaskBatch, *, step: int) -> None:
        nonlocal now
        tasks = len(batch.support_x)
        loop = self.model.batching == "loop"  # type: ignore[attr-defined]
        now += 1e-3 * (10 * tasks if loop else 30 if tasks <= 4 else 90)

    monkeypatch.setattr(MAML, "meta_grad", meta_grad)
    maml = learner(mlp, "auto")
    measured = batching.measure(
        maml,
        maml.model,  # type: ignore[arg-type]
        maml.init(0),
        make_batch("layer norm", tasks=32),
        step=0,
        chunk=None,
        clock=lambda: now,
        wall=lambda: now,
    )
    assert {way: round(1e3 * seconds, 3) for way, seconds in measured.items()} == {
        ("loop", 1): 10,
        ("vmap", 2): 15,
        ("vmap", 4): 7.5,
        ("vmap", 8): 11.25,
    }
    monkeypatch.setattr(batching, "measure", lambda *_, **__: dict(measured))
    monkeypatch.setattr(batching, "why_not_vmap", lambda *_, **__: "")
    choice = batching.choose(maml, maml.model, maml.init(0), make_batch("layer norm"), step=0, chunk=None)  # type: ignore[arg-type]
    assert choice == batching.Choice(
        "vmap", 4, "tasks go through the network by vmap, 4 at once: 7.5 ms a task, 10 in a loop"
    )


def test_measuring_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with twenty seconds a meta-gradient: the loop twice, and vmap not at all."""
    now, calls = 0.0, 0

    def meta_grad(self: MAML, state: MetaState, batch: TaskBatch, *, step: int) -> None:
        nonlocal now, calls
        now += 20
        calls += 1

    monkeypatch.setattr(MAML, "meta_grad", meta_grad)
    maml = learner(mlp, "auto")
    batch = make_batch("layer norm")
    batching.measure(maml, maml.model, maml.init(0), batch, step=0, chunk=None, clock=lambda: now, wall=lambda: now)  # type: ignore[arg-type]
    assert calls == 2


# ---- whole runs


NETS = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(100, 5))
"""


@pytest.fixture
def run_of(tmp_path: Path, tiny_data: Path) -> Callable[..., tuple[Experiment, RunFolder]]:
    """Short runs with a network of one's own; keyword arguments replace keys of `training`."""
    (tmp_path / "nets_of_this_test.py").write_text(NETS)

    def make(name: str, **training: object) -> tuple[Experiment, RunFolder]:
        content = {
            "name": name,
            "task": {"family": "images", "data": str(tiny_data), "split": "random", "n_query": 2, "eval_n_query": 2},
            "model": {
                "name": "module",
                "factory": "nets_of_this_test:net",
                "folder": str(tmp_path),
                "dropout": True,
            },
            "algorithm": {"name": "maml", "inner_lr": 0.1},
            "training": {
                "steps": 4,
                "meta_batch_size": 5,
                "backend": "local",
                "dtype": "float64",
                "validate_every": 2,
                **training,
            },
            "evaluation": {"validation_episodes": 4},
            "tracking": {"runs": str(tmp_path / "runs")},
        }
        experiment = experiments.from_dict(content, source="test")
        return experiment, runs.open_run(experiment, data_digest=experiments.check_fits(experiment))[0]

    return make


def final(run: RunFolder) -> dict:
    latest = run.checkpoints.latest()
    assert latest is not None
    return run.checkpoints.load(latest)


@pytest.mark.distributed
def test_workers_and_chunks_do_not_change_a_run_with_dropout(run_of: Callable) -> None:
    """Each number of workers makes a choice of its own, which all its ranks share."""
    results = []
    for name, training in (
        ("alone", {}),
        ("chunks", {"task_chunk": 2}),
        ("two", {"backend": "processes", "num_workers": 2}),
    ):
        experiment, run = run_of(name, **training)
        launch.run_workers(experiment, run)
        results.append(final(run))
        assert results[-1]["plan"] == run.read()["plan"]
    for other in results[1:]:
        assert batching.disagreement(other["params"], results[0]["params"]) <= 1e-10


def test_a_run_that_is_gone_on_with_keeps_its_choice(run_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its checkpoint; before there is one, from its folder."""
    chosen = batching.Choice("vmap", 2, "as was measured")
    plan = Plan("pure", "float32", *chosen)
    used = []

    def meta_grad(self: MAML, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        used.append((self.model.batching, len(batch.support_x)))  # type: ignore[attr-defined]
        return original(self, state, batch, step=step)

    original = MAML.meta_grad
    monkeypatch.setattr(MAML, "meta_grad", meta_grad)
    monkeypatch.setattr(batching, "choose", lambda *_, **__: chosen)
    experiment, run = run_of("new", steps=2)
    launch.run_workers(experiment, run)
    assert run.read()["plan"] == final(run)["plan"] == plan._asdict()
    assert used == [("vmap", 2), ("vmap", 2), ("vmap", 1)] * 2

    def never(*_: object, **__: object) -> batching.Choice:
        raise AssertionError("chosen again")

    monkeypatch.setattr(batching, "choose", never)
    longer, _ = run_of("longer")
    run.update(plan=None)
    launch.run_workers(longer, run)  # the same run's checkpoint, four steps in all
    assert final(run)["step"] == 4
    assert used[-1] == ("vmap", 1)

    _, started = run_of("started")
    started.update(plan=plan._replace(chunk=5)._asdict())
    launch.run_workers(longer, started)
    assert used[-1] == ("vmap", 5)


def test_a_network_of_torchvision_as_it_is() -> None:
    """resnet18, 3×H×W: built by the configuration, and exact by loop and by vmap."""
    config = ModuleConfig(
        name="module", factory="torchvision.models:resnet18", arguments={"num_classes": CLASSES, "weights": None}
    )
    shape = (3, 20, 16)
    model = config.build(input_shape=shape, num_outputs=CLASSES, dtype=torch.float64)
    assert config.code_path() is None  # it is a dependency: registered models take no copy of it along
    assert model.init(0).keys() == dict(resnet().named_parameters()).keys()
    batch = make_batch("images", tasks=2, shape=shape)
    state = learner(resnet).init(0)
    expected = reference(resnet, state.params, batch, rate=0.01, steps=1)
    for how in ("loop", "vmap"):
        maml = learner(resnet, how, inner_lr=0.01, adaptation_steps=1)  # type: ignore[arg-type]
        assert batching.disagreement(maml.meta_grad(state, batch, step=0).grads, expected) <= 1e-10, how


class Branched(nn.Module):
    """As GoogLeNet has it: a branch that training alone goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.BatchNorm2d(1)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, stride=3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.side(x) if self.training else x)


class Square(nn.Module):
    """As a vision transformer has it: an input of one size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-1] == 224, "Wrong image width! Expected 224")
        return x.flatten(1)[:, :CLASSES]


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_a_layer_that_no_pass_goes_through_has_no_statistics(how: Batching) -> None:
    maml = learner(Branched, how, adaptation_steps=1, inductive_statistics="running")
    gradient = maml.meta_grad(maml.init(0), make_batch("images", tasks=2), step=0)
    assert {name.split(".")[0] for name in gradient.statistics} == {"body"}
    assert all(bool(value.isfinite().all()) for value in gradient.grads.values())


def test_an_assertion_of_the_network_is_told() -> None:
    model = ModuleModel(Square, dtype=torch.float64, batching="loop", dropout=False)
    with pytest.raises(ConfigError, match=r"cannot take inputs.*Wrong image width! Expected 224"):
        model.check((1, 6, 6), CLASSES, name="Square")
