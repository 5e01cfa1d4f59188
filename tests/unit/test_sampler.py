"""Episodes are a pure function of (seed, split, step, slot), and uniform.

Shapes: T slots · W n_way · K k_shot · Q n_query · C classes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pipeline import keys
from pipeline.tasks.sampler import EpisodeIndices, draw_without_replacement, sample_indices
from pipeline.types import SPLITS

steps = st.integers(0, 1 << 40)
slot_lists = st.lists(st.integers(0, 10_000), min_size=1, max_size=8, unique=True)


@st.composite
def episode_shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `sample_indices` that fit together: unequal class counts, some only just large enough."""
    n_way, k_shot, n_query = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    needed = k_shot + n_query
    counts = draw(st.lists(st.integers(needed, needed + 20), min_size=n_way, max_size=12))
    return {
        "seed": draw(st.integers(0, (1 << 63) - 1)),
        "split": draw(st.sampled_from(SPLITS)),
        "step": draw(steps),
        "class_counts": torch.tensor(counts),
        "n_way": n_way,
        "k_shot": k_shot,
        "n_query": n_query,
        "turn_classes": draw(st.booleans()),
    }


def assert_same(a: EpisodeIndices, b: EpisodeIndices) -> None:
    for name, x, y in zip(EpisodeIndices._fields, a, b, strict=True):
        assert x.equal(y), name


def rows(episodes: EpisodeIndices, chosen: Tensor) -> EpisodeIndices:
    return EpisodeIndices(*(part[chosen] for part in episodes))


@settings(max_examples=50, deadline=None)
@given(shape=episode_shapes(), slots=slot_lists)
def test_episodes_are_well_formed(shape: dict[str, Any], slots: list[int]) -> None:
    episodes = sample_indices(**shape, slots=torch.tensor(slots))
    num_slots, n_way = len(slots), shape["n_way"]
    assert episodes.classes.shape == episodes.turns.shape == (num_slots, n_way)
    assert episodes.support.shape == (num_slots, n_way, shape["k_shot"])
    assert episodes.query.shape == (num_slots, n_way, shape["n_query"])
    for t in range(num_slots):
        classes = episodes.classes[t].tolist()
        assert len(set(classes)) == n_way
        for w, c in enumerate(classes):
            assert 0 <= c < len(shape["class_counts"])
            examples = episodes.support[t, w].tolist() + episodes.query[t, w].tolist()
            assert len(set(examples)) == len(examples), "support and query share an example, or one is drawn twice"
            assert all(0 <= e < int(shape["class_counts"][c]) for e in examples)
    assert set(episodes.turns.flatten().tolist()) <= (set(range(4)) if shape["turn_classes"] else {0})


@settings(max_examples=30, deadline=None)
@given(shape=episode_shapes(), workers=st.integers(1, 5), order=st.permutations(range(10)))
def test_a_slot_does_not_depend_on_the_other_slots(shape: dict[str, Any], workers: int, order: list[int]) -> None:
    """Any number of workers, in any order, see the same global batch."""
    slots = torch.arange(10)
    whole = sample_indices(**shape, slots=slots)
    assert_same(sample_indices(**shape, slots=slots), whole)
    permuted = torch.tensor(order)
    assert_same(sample_indices(**shape, slots=permuted), rows(whole, permuted))
    for rank in range(workers):
        own = slots[rank::workers]
        assert_same(sample_indices(**shape, slots=own), rows(whole, own))


def test_global_random_state_plays_no_part() -> None:
    arguments: dict[str, Any] = {"seed": 0, "split": "meta_val", "step": 3, "n_way": 5, "k_shot": 1, "n_query": 2}
    arguments |= {"class_counts": torch.full((20,), 20), "slots": torch.arange(4)}
    torch.manual_seed(1)
    first = sample_indices(**arguments)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert_same(sample_indices(**arguments), first)
    torch.set_rng_state(state)
    sample_indices(**arguments)
    assert torch.get_rng_state().equal(state)


@settings(max_examples=50, deadline=None)
@given(
    a=st.tuples(st.integers(0, 1000), st.sampled_from(SPLITS), steps, st.integers(0, 1000)),
    b=st.tuples(st.integers(0, 1000), st.sampled_from(SPLITS), steps, st.integers(0, 1000)),
    changed=st.integers(0, 3),
)
def test_seed_split_step_and_slot_each_change_the_episode(a: Any, b: Any, changed: int) -> None:
    assume(a[changed] != b[changed])

    def episode(seed: int, split: Any, step: int, slot: int) -> EpisodeIndices:
        counts = torch.full((1000,), 1000)
        address = {"seed": seed, "split": split, "step": step, "slots": torch.tensor([slot])}
        return sample_indices(**address, class_counts=counts, n_way=5, k_shot=5, n_query=5)

    one, other = episode(*a), episode(*a[:changed], b[changed], *a[changed + 1 :])
    assert not one.classes.equal(other.classes)
    assert not one.support.equal(other.support)


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 8)), spare=st.lists(st.integers(0, 9), min_size=3), key=steps)
def test_draws_agree_with_taking_from_a_list(shape: tuple[int, int], spare: list[int], key: int) -> None:
    """Independent reference: take the floor(u·n)-th of the n numbers that are left, one after the other."""
    count, k = shape
    u = keys.uniform(keys.fold(keys.make(key), torch.arange(count)), k)
    populations = [k + extra for extra in spare[:count]]
    drawn = draw_without_replacement(u, torch.tensor(populations))
    for row, population in enumerate(populations):
        left = list(range(population))
        expected = [left.pop(int(u[row, i] * len(left))) for i in range(k)]
        assert drawn[row].tolist() == expected
        assert draw_without_replacement(u[row], population).tolist() == expected


@pytest.fixture(scope="module")
def many() -> EpisodeIndices:
    """30 000 episodes of 7 classes of unequal size."""
    return sample_indices(
        seed=5,
        split="meta_train",
        step=11,
        slots=torch.arange(30_000),
        class_counts=torch.tensor([6, 8, 10, 20, 40, 80, 160]),
        n_way=3,
        k_shot=2,
        n_query=2,
        turn_classes=True,
    )


def test_each_class_is_as_often_at_each_label(many: EpisodeIndices) -> None:
    """Classes are uniform whatever their sizes, and no class prefers a label."""
    table = np.stack([np.bincount(many.classes[:, w].numpy(), minlength=7) for w in range(3)])
    assert stats.chisquare(table.ravel()).pvalue > 1e-4


def test_ordered_pairs_of_classes_are_uniform(many: EpisodeIndices) -> None:
    pairs = np.bincount((many.classes[:, 0] * 7 + many.classes[:, 1]).numpy(), minlength=49)
    different = ~np.eye(7, dtype=bool).ravel()
    assert (pairs[~different] == 0).all()
    assert stats.chisquare(pairs[different]).pvalue > 1e-4


@pytest.mark.parametrize(("class_id", "count"), [(0, 6), (3, 20)])
def test_examples_are_uniform_in_support_and_query(many: EpisodeIndices, class_id: int, count: int) -> None:
    here = many.classes == class_id
    for part in (many.support, many.query):
        for position in range(part.shape[-1]):
            drawn = np.bincount(part[here][:, position].numpy(), minlength=count)
            assert stats.chisquare(drawn).pvalue > 1e-4


def test_examples_of_two_classes_of_an_episode_are_independent() -> None:
    episodes = sample_indices(
        seed=5,
        split="meta_train",
        step=11,
        slots=torch.arange(30_000),
        class_counts=torch.full((4,), 8),
        n_way=2,
        k_shot=1,
        n_query=1,
    )
    for part in (episodes.support, episodes.query):
        pairs = np.bincount((part[:, 0, 0] * 8 + part[:, 1, 0]).numpy(), minlength=64)
        assert stats.chisquare(pairs).pvalue > 1e-4


def test_turns_are_uniform_and_change_nothing_else(many: EpisodeIndices) -> None:
    assert stats.chisquare(np.bincount(many.turns.flatten().numpy(), minlength=4)).pvalue > 1e-4
    pairs = np.bincount((many.turns[:, 0] * 4 + many.turns[:, 1]).numpy(), minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-4, "turns of two classes of an episode depend on each other"
    counts = torch.tensor([6, 8, 10, 20, 40, 80, 160])
    slots = torch.arange(100)
    address: dict[str, Any] = {"seed": 5, "split": "meta_train", "step": 11, "slots": slots, "class_counts": counts}
    without = sample_indices(**address, n_way=3, k_shot=2, n_query=2)
    assert_same(without._replace(turns=many.turns[:100]), rows(many, slots))
