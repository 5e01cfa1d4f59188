"""Episodes whose shape varies. Shapes: T slots · W n_way · S support · Q queries of a class · C classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.tasks.images import ImagesConfig
from pipeline.tasks.sampler import sample_indices
from pipeline.tasks.shapes import Shape, VariableConfig, deal_shots, key_of_step, most_of_a_class, sample_unequal

seeds = st.integers(0, 1 << 40)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `sample_unequal` that fit together: classes of very unequal size, a shape that the key draws."""
    n_query = draw(st.integers(1, 4))
    n_way = draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(n_query + 1, n_query + 60), min_size=n_way, max_size=10))
    config = VariableConfig(
        least_n_way=draw(st.integers(2, n_way)),
        most_shots=draw(st.integers(1, 30)),
        most_support=draw(st.integers(n_way, 80)),
        imbalance=draw(st.booleans()),
    )
    key = keys.make(draw(seeds)) if draw(st.booleans()) else None
    shape = config.shape(n_way=n_way, n_query=n_query, smallest=min(counts), key=key)
    return {
        "seed": draw(seeds),
        "split": "meta_train",
        "step": draw(seeds),
        "class_counts": torch.tensor(counts),
        "smallest": min(counts),
        "largest": max(counts),
        "shape": shape,
        "imbalance": config.imbalance,
        "turn_classes": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(problem=problems(), slots=st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True))
def test_episodes_are_well_formed(problem: dict[str, Any], slots: list[int]) -> None:
    episodes = sample_unequal(**problem, slots=torch.tensor(slots))
    n_way, support, n_query = problem["shape"]
    for t in range(len(slots)):
        classes = episodes.classes[t].tolist()
        assert len(set(classes)) == n_way
        labels, examples = episodes.labels[t].tolist(), episodes.examples[t].tolist()
        assert len(labels) == support + n_way * n_query
        assert labels[support:] == sorted(labels[support:])
        for label, c in enumerate(classes):
            shots = labels[:support].count(label)
            drawn = [example for example, of in zip(examples, labels, strict=True) if of == label]
            assert shots >= 1
            assert problem["imbalance"] or shots == support // n_way
            assert len(drawn) == shots + n_query
            assert len(set(drawn)) == len(drawn), "support and query share an example, or one is drawn twice"
            assert all(0 <= example < int(problem["class_counts"][c]) for example in drawn)
    assert set(episodes.turns.flatten().tolist()) <= (set(range(4)) if problem["turn_classes"] else {0})


@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_a_slot_depends_on_no_other_and_has_the_classes_of_fixed_shapes(problem: dict[str, Any]) -> None:
    slots = torch.tensor([3, 0, 7])
    whole = sample_unequal(**problem, slots=slots)
    for row, slot in enumerate(slots):
        alone = sample_unequal(**problem, slots=slot.view(1))
        assert all(part[row].equal(one[0]) for part, one in zip(whole[:5], alone[:5], strict=True))
    n_way, _, n_query = problem["shape"]
    names = ("seed", "split", "step", "class_counts", "turn_classes")
    fixed = sample_indices(
        **{name: problem[name] for name in names}, slots=slots, n_way=n_way, k_shot=1, n_query=n_query
    )
    for ours, theirs in zip((whole.classes, whole.turns, whole.keys), (fixed.classes, *fixed[3:]), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_draw_the_classes_that_they_draw_for_fixed_shapes() -> None:
    weights = torch.tensor([1.0, 5.0, 1.0, 20.0, 3.0, 1.0], dtype=torch.float64)
    address: dict[str, Any] = {"seed": 3, "split": "meta_train", "step": 9, "slots": torch.arange(50)}
    address |= {"class_counts": torch.full((6,), 12), "class_weights": weights}
    ours = sample_unequal(**address, smallest=12, largest=12, shape=Shape(3, 10, 2))
    assert torch.equal(ours.classes, sample_indices(**address, n_way=3, k_shot=1, n_query=2).classes)


@settings(max_examples=200, deadline=None)
@given(
    rooms=st.lists(st.integers(0, 40), min_size=2, max_size=8),
    part=st.floats(0, 1),
    seed=seeds,
)
def test_shots_add_up_and_follow_the_weights(rooms: list[int], part: float, seed: int) -> None:
    """By an independent search for λ: a class that is not full has its share of what is left, but for rounding."""
    counts = torch.tensor(rooms).unsqueeze(0) + 3  # two queries
    u = keys.uniform(keys.make(seed), len(rooms)).unsqueeze(0)
    support = len(rooms) + int(part * sum(rooms))
    shots = deal_shots(u, counts, 2, support)[0]
    assert int(shots.sum()) == support
    assert bool((shots >= 1).all())
    assert bool((shots <= counts[0] - 2).all())
    shape = Shape(len(rooms), support, 2)
    assert int(shots.max()) <= most_of_a_class(shape, smallest=min(rooms) + 3, largest=max(rooms) + 3)
    weights = [math.exp(math.log(0.5) + math.log(4) * float(x)) * int(c) for x, c in zip(u[0], counts[0], strict=True)]
    low, high = 0.0, 1e6
    for _ in range(200):
        level = (low + high) / 2
        total = sum(min(level * w, room) for w, room in zip(weights, rooms, strict=True))
        low, high = (level, high) if total < support - len(rooms) else (low, level)
    for k, w, room in zip(shots.tolist(), weights, rooms, strict=True):
        assert abs(k - 1 - min(high * w, room)) < 1 + 1e-4


def test_shots_are_imbalanced_as_the_papers_weights_say() -> None:
    """Classes of one size, room for all: the share of a class is exp(α) / Σ exp(α), so ratios lie within 1 : 4."""
    u = keys.uniform(keys.fold(keys.make(1), torch.arange(2000)), 5)
    shots = deal_shots(u, torch.full((2000, 5), 10_000), 10, 1000).double() - 1
    weights = (math.log(0.5) + math.log(4) * u).exp()
    expected = 995 * weights / weights.sum(1, keepdim=True)
    assert float((shots - expected).abs().max()) < 1
    assert float(shots.std(1).mean()) > 50


def test_shapes_of_steps_are_spread_over_their_ranges() -> None:
    config = VariableConfig(least_n_way=5, most_shots=20, most_support=100)
    shapes = [
        config.shape(n_way=20, n_query=10, smallest=20, key=key_of_step(3, "meta_train", step)) for step in range(2000)
    ]
    ways = np.array([shape.n_way for shape in shapes])
    assert set(ways.tolist()) == set(range(5, 21))
    support = np.array([shape.support for shape in shapes])
    assert support.min() == 5
    assert support.max() == 100
    assert bool((support >= ways).all())
    of_few_classes = support[ways == 5] / 5  # which never reach 100: β is uniform, so shots are uniform in 1 … 10
    assert np.unique(of_few_classes).tolist() == list(range(1, 11))
    assert 4.5 < of_few_classes.mean() < 6.5
    assert config.shape(n_way=20, n_query=10, smallest=20, key=None) == Shape(20, 100, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_way": 4, "variable": {}}, r"least_n_way \(5\) is more than n_way, the most"),
        ({"n_way": 20, "variable": {"most_support": 19}}, r"most_support \(19\)"),
        ({"n_way": 20, "eval_n_way": 3, "variable": {"evaluation": True}}, "least_n_way"),
        ({"n_way": 5, "variable": {"shots": 3}}, r"task\.variable\.shots: unknown key|variable\.shots: unknown key"),
    ],
)
def test_bounds_that_leave_no_episode_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ImagesConfig, {"family": "images", "data": "x", **options}, source="test")
