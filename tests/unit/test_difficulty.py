"""Classes drawn by recent loss: the sampler's laws, the running averages, and a training loop that resumes bit for bit.

Shapes: T slots · W n_way · C classes.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pipeline import experiment as experiments
from pipeline.algorithms.maml import MAML
from pipeline.config import validate
from pipeline.errors import ConfigError, StopRequested
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.tasks.difficulty import ClassDifficulty, DifficultyConfig
from pipeline.tasks.images import ImagesConfig
from pipeline.tasks.sampler import EpisodeIndices, sample_indices
from pipeline.training import loop
from pipeline.training.context import LocalContext
from pipeline.types import TaskBatch
from tests.faults import assert_same_end, experiment, open_run

pytestmark = pytest.mark.usefixtures("one_thread")

weight_lists = st.lists(st.floats(1e-9, 1.0), min_size=6, max_size=12)
addresses = st.fixed_dictionaries(
    {
        "seed": st.integers(0, (1 << 63) - 1),
        "step": st.integers(0, 1 << 40),
        "n_way": st.integers(2, 6),
        "k_shot": st.just(1),
        "n_query": st.just(2),
        "split": st.just("meta_train"),
    }
)


def draw(weights: list[float] | Tensor | None, slots: Tensor, *, classes: int = 0, **address: Any) -> EpisodeIndices:
    weights = torch.tensor(weights, dtype=torch.float64) if isinstance(weights, list) else weights
    number = classes if weights is None else len(weights)
    return sample_indices(**address, slots=slots, class_counts=torch.full((number,), 20), class_weights=weights)


def same(a: EpisodeIndices, b: EpisodeIndices) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


# --- the draws


@settings(max_examples=50, deadline=None)
@given(weights=weight_lists, address=addresses)
def test_the_classes_of_an_episode_are_distinct(weights: list[float], address: dict[str, Any]) -> None:
    drawn = draw(weights, torch.arange(20), **address).classes
    assert drawn.shape == (20, address["n_way"])
    assert all(len(set(row)) == len(row) and set(row) <= set(range(len(weights))) for row in drawn.tolist())


@settings(max_examples=30, deadline=None)
@given(weights=weight_lists, address=addresses, workers=st.integers(1, 5), order=st.permutations(range(10)))
def test_an_episode_depends_on_its_address_and_the_weights_only(
    weights: list[float], address: dict[str, Any], workers: int, order: list[int]
) -> None:
    """Any workers, in any order, at any time, one step or several at once, see the same global batch."""
    slots, state = torch.arange(10), torch.get_rng_state()
    whole = draw(weights, slots, **address)
    torch.manual_seed(address["step"])
    for part in (torch.tensor(order), *(slots[rank::workers] for rank in range(workers))):
        assert same(draw(weights, part, **address), EpisodeIndices(*(p[part] for p in whole)))
    several = draw(weights, slots, **{**address, "step": address["step"] + torch.tensor([[0], [1]])})
    assert same(EpisodeIndices(*(p[0] for p in several)), whole)
    scaled = draw([4 * w for w in weights], slots, **address)  # a power of two: exact
    assert same(scaled, whole)
    torch.set_rng_state(state)


@settings(max_examples=20, deadline=None)
@given(address=addresses, changed=st.sampled_from(["seed", "step"]))
def test_seed_and_step_and_slot_change_the_episode(address: dict[str, Any], changed: str) -> None:
    weights = [1.0 + c % 7 for c in range(500)]
    one = draw(weights, torch.tensor([3]), **address).classes
    assert not one.equal(draw(weights, torch.tensor([4]), **address).classes)
    assert not one.equal(draw(weights, torch.tensor([3]), **{**address, changed: address[changed] - 1}).classes)


@pytest.mark.parametrize("weights", [[1.0] * 6, [8.0, 4.0, 2.0, 1.0, 1.0, 0.5]], ids=["equal", "unequal"])
def test_pairs_come_as_often_as_drawing_one_after_the_other_gives_them(weights: list[float]) -> None:
    """Closed form: w_a/Σ · w_b/(Σ − w_a), in either order; and which of the two is label 0 does not tell its weight."""
    count, total = 40_000, sum(weights)
    drawn = draw(weights, torch.arange(count), seed=1, split="meta_train", step=2, n_way=2, k_shot=1, n_query=1)
    pairs = np.bincount((drawn.classes[:, 0] * 6 + drawn.classes[:, 1]).numpy(), minlength=36).reshape(6, 6)
    expected = np.zeros((6, 6))
    for a, b in itertools.permutations(range(6), 2):
        one = weights[a] / total * weights[b] / (total - weights[a])
        other = weights[b] / total * weights[a] / (total - weights[b])
        expected[a, b] = count * (one + other) / 2
    off = ~np.eye(6, dtype=bool)
    assert stats.chisquare(pairs[off], expected[off]).pvalue > 1e-4


def test_examples_and_turns_are_those_of_unweighted_episodes() -> None:
    address: dict[str, Any] = {"seed": 1, "split": "meta_train", "step": 2, "n_way": 4, "k_shot": 2, "n_query": 3}
    slots = torch.arange(50)
    plain = draw(None, slots, classes=9, **address, turn_classes=True)
    weighted = draw([float(1 + c) for c in range(9)], slots, **address, turn_classes=True)
    assert not plain.classes.equal(weighted.classes)
    assert same(plain._replace(classes=weighted.classes), weighted)  # all classes have as many examples


# --- the running averages


@settings(max_examples=30, deadline=None)
@given(
    strength=st.floats(0, 4),
    momentum=st.floats(0, 0.99),
    uniform=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
def test_shares_follow_the_running_averages(strength: float, momentum: float, uniform: float, seed: int) -> None:
    """Against plain floats: a class's average decays when it is met; one that was never met has that of all."""
    config = DifficultyConfig(strength=strength, momentum=momentum, uniform_share=uniform, warmup_steps=0)
    difficulty, generator = ClassDifficulty(config, classes=5, device=torch.device("cpu")), np.random.default_rng(seed)
    state, sums, counts, shares = difficulty.start(), [0.0] * 5, [0.0] * 5, [[0.2] * 5] * 2
    for step in range(6):
        for ahead in (0, 1):
            weights = difficulty.weights(state, step + ahead, completed=step)
            assert weights is not None
            assert weights.tolist() == pytest.approx(shares[step + ahead], rel=1e-9)
        met = generator.choice(4, size=2, replace=False).tolist()  # the last class is never met
        finite = step != 3
        observed = {"loss": torch.zeros(5), "count": torch.zeros(5)}
        for c in met:
            observed["loss"][c], observed["count"][c] = float(generator.uniform(0, 3)), 2.0
            if finite:
                sums[c] = momentum * sums[c] + float(observed["loss"][c])
                counts[c] = momentum * counts[c] + 2.0
        if not finite:
            observed["loss"] += math.nan
        state = difficulty.after_step(state, observed, torch.tensor(finite))
        mean = sum(sums) / sum(counts)
        hard = [(sums[c] / counts[c] if counts[c] else mean) ** strength for c in range(5)]
        shares = [*shares, [(1 - uniform) * h / sum(hard) + uniform / 5 for h in hard]]


def test_weights_are_finite_whatever_the_losses() -> None:
    difficulty = ClassDifficulty(DifficultyConfig(strength=10), classes=3, device=torch.device("cpu"))
    state = difficulty.start()
    for loss in ([0.0, 0.0, 0.0], [1e30, 0.0, 1e-30], [0.0, 0.0, 0.0]):
        observed = {"loss": torch.tensor(loss), "count": torch.ones(3)}
        state = difficulty.after_step(state, observed, torch.tensor(True))
        assert float(state["next"].sum()) == pytest.approx(1)
        assert float(state["next"].min()) >= 0.2 / 3 * (1 - 1e-12)


# --- what algorithms tell


def with_difficulty(exp: Experiment, **options: Any) -> Experiment:
    content = exp.to_dict()
    content["task"]["difficulty"] = {"strength": 3, "momentum": 0.5, "uniform_share": 0.1, "warmup_steps": 4, **options}
    return experiments.from_dict(content, source="test")


def test_class_losses_are_the_mean_query_losses_of_each_class(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(with_difficulty(experiment(tmp_path, tiny_data)), device=torch.device("cpu"))
    plain = experiments.build(experiment(tmp_path, tiny_data), device=torch.device("cpu"))
    batch, state = parts.family.sample("meta_train", 0, torch.arange(7), seed=0), parts.algorithm.init(0)
    told = parts.algorithm.meta_grad(state, batch, step=0)
    silent = plain.algorithm.meta_grad(state, batch, step=0)
    assert silent.classes == {}
    assert all(torch.equal(told.grads[k], v) for k, v in silent.grads.items())
    assert all(torch.equal(told.metrics[k], v) for k, v in silent.metrics.items())

    sums, counts = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    assert isinstance(parts.algorithm, MAML)
    answered: list[Tensor] = []
    answer = parts.algorithm._answer
    parts.algorithm._answer = lambda *a, **k: (answered.append((r := answer(*a, **k))[0].detach()), r)[1]  # type: ignore
    parts.algorithm.meta_grad(state, batch, step=0)
    assert batch.classes is not None
    for t, q in itertools.product(range(7), range(batch.query_y.shape[1])):
        label = int(batch.query_y[t, q])
        loss = -torch.log_softmax(answered[0][t, q], dim=0)[label]
        sums[batch.classes[t, label]] += loss / 2  # n_query
    for c in batch.classes.flatten().tolist():
        counts[c] += 1
    torch.testing.assert_close(told.classes["loss"], sums)
    torch.testing.assert_close(told.classes["count"], counts)


def test_an_algorithm_that_does_not_tell_them_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = with_difficulty(experiment(tmp_path, tiny_data))
    monkeypatch.setattr(MAML, "meta_grad", lambda *_, **__: None)  # a way of its own to its meta-gradient
    with pytest.raises(ConfigError, match=r"task\.difficulty: .* maml does not tell"):
        experiments.build(exp, device=torch.device("cpu"))


@pytest.mark.parametrize("wrong", [{"uniform_share": 0}, {"strength": -1}, {"momentum": 1}, {"warmup": 3}])
def test_wrong_keys_are_named(wrong: dict[str, Any]) -> None:
    content = {"family": "images", "data": "x", "difficulty": wrong}
    with pytest.raises(ConfigError, match=rf"test: difficulty\.{next(iter(wrong))}"):
        validate(ImagesConfig, content, source="test")


# --- the loop


class Recorded(LocalContext):
    """Notes which classes are drawn; asks to stop at an outer step, or dies there."""

    def __init__(self, *, stop_at: int = 1000, die_at: int = 1000) -> None:
        super().__init__()
        self.stop_at, self.die_at, self.asked = stop_at, die_at, 0

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked > self.stop_at

    def observe(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == self.die_at:
            raise KeyboardInterrupt


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The classes of each step's episodes, as they are trained on."""
    classes: list[Tensor] = []
    queue = loop._queue_outer_step

    def noted(context: Any, exp: Any, parts: Any, state: Any, batch: TaskBatch, *rest: Any, **how: Any) -> Any:
        assert batch.classes is not None
        classes.append(batch.classes)
        return queue(context, exp, parts, state, batch, *rest, **how)

    monkeypatch.setattr(loop, "_queue_outer_step", noted)
    return classes


def train(exp: Experiment, **context: int) -> RunFolder:
    run = open_run(exp)
    loop.train(Recorded(**context), exp, run)
    return run


def assert_same_classes(ours: RunFolder, theirs: RunFolder) -> None:
    ours_state, theirs_state = ours.checkpoints.load(20)["classes"], theirs.checkpoints.load(20)["classes"]
    assert ours_state.keys() == theirs_state.keys() == {"loss", "count", "weights", "next"}
    assert all(torch.equal(ours_state[name], value) for name, value in theirs_state.items())


def test_a_resumed_run_equals_a_whole_one(
    tiny_data: Path, tmp_path: Path, drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, and killed with steps lost since the last checkpoint; also where episodes are drawn a step ahead."""

    def exp(name: str, memory_limit_mb: int = 2048) -> Experiment:
        content = experiment(tmp_path / name, tiny_data, backend="local", dtype="float32").to_dict()
        content["task"]["memory_limit_mb"] = memory_limit_mb
        return with_difficulty(experiments.from_dict(content, source="test"))

    whole = train(exp("whole"))
    plain = [classes.clone() for classes in drawn]
    late = "whole, drawn ahead, numbers read late"
    for name, memory_limit_mb in (("resumed", 2048), ("resumed, drawn ahead", 0), (late, 0)):
        drawn.clear()
        again = exp(name, memory_limit_mb)
        if name == late:
            monkeypatch.setattr(loop, "_steps_late", lambda device: 1)
        else:
            with pytest.raises(StopRequested):
                train(again, stop_at=6)
            with pytest.raises(KeyboardInterrupt):
                train(again, die_at=14)
            assert open_run(again).checkpoints.latest() == 10
            drawn[:] = drawn[:10]  # of the four steps after it nothing is left
        run = train(again)
        assert_same_end(run, whole)
        assert_same_classes(run, whole)
        assert len(drawn) == 20
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, plain, strict=True)), name


def test_hard_classes_are_drawn_more_often_and_the_metrics_tell(
    tiny_data: Path, tmp_path: Path, drawn: list[Tensor]
) -> None:
    exp = with_difficulty(experiment(tmp_path / "w", tiny_data, backend="local"), strength=10, uniform_share=0.05)
    state = train(exp).checkpoints.load(20)["classes"]
    weighted = torch.stack(drawn)  # [steps, T, W]
    drawn.clear()
    train(experiment(tmp_path / "u", tiny_data, backend="local"))
    uniform = torch.stack(drawn)
    assert weighted[:4].equal(uniform[:4])  # warm-up
    assert not weighted[4:].equal(uniform[4:])
    assert float(state["weights"].max()) > 0.2 > 1 / 6 > float(state["weights"].min())
    from pipeline.training import journal

    last = journal.read(RunFolder(tmp_path / "w" / "images" / "001").journal)[-1]
    assert last["difficulty_largest_share"] == pytest.approx(float(state["weights"].max()))
    assert 1 <= last["difficulty_effective_classes"] < 6
