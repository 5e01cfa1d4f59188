"""Counter-based keys against SplitMix64 in plain integers, and the properties that episodes rest on."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline import keys

WORD = 1 << 64
int64s = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix64(seed: int, n: int) -> list[int]:
    """The first n outputs of the published generator, as unsigned integers."""
    outputs, state = [], seed % WORD
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        outputs.append(z ^ (z >> 31))
    return outputs


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
    ],
)
def test_published_outputs(seed: int, published: list[int]) -> None:
    assert splitmix64(seed, 3) == published
    assert [word % WORD for word in keys.bits(torch.tensor(seed), 3).tolist()] == published


@settings(max_examples=50, deadline=None)
@given(seed=int64s, n=st.integers(1, 20))
def test_bits_and_uniforms_are_splitmix64(seed: int, n: int) -> None:
    expected = splitmix64(seed, n)
    key = torch.tensor(seed)
    assert [word % WORD for word in keys.bits(key, n).tolist()] == expected
    assert keys.uniform(key, n).tolist() == [(word >> 11) / 2**53 for word in expected]


@settings(max_examples=50, deadline=None)
@given(key=st.lists(int64s, min_size=1, max_size=5), word=int64s, n=st.integers(1, 5))
def test_vector_keys_agree_with_scalar_keys(key: list[int], word: int, n: int) -> None:
    vector = torch.tensor(key)
    for i, scalar in enumerate(vector):
        assert keys.fold(vector, word)[i] == keys.fold(scalar, word) == keys.fold(scalar, torch.tensor(word))
        assert keys.fold(torch.tensor(word), vector)[i] == keys.fold(torch.tensor(word), scalar)
        assert keys.bits(vector, n)[i].equal(keys.bits(scalar, n))


@settings(max_examples=50, deadline=None)
@given(words=st.lists(int64s, min_size=2, max_size=4, unique=True))
def test_the_order_and_number_of_words_matter(words: list[int]) -> None:
    variants = [tuple(words), tuple(reversed(words)), tuple(words[:-1]), (*words, 0)]
    made = {int(keys.make(*variant)) for variant in variants}
    assert len(made) == len(variants)


def test_neighbouring_keys_do_not_collide() -> None:
    """Seeds, splits, steps and slots are small integers: none of their keys may meet."""
    grid = torch.arange(64)
    seeds = keys.fold(torch.zeros((), dtype=torch.int64), grid)
    made = keys.fold(keys.fold(seeds[:, None], grid)[..., None], grid)
    assert len(made.unique()) == 64**3


@pytest.mark.parametrize("across", ["draws of one key", "keys of a counter"])
def test_uniforms_are_uniform(across: str) -> None:
    key = keys.make(20, 3)
    n = 200_000
    u = keys.uniform(key, n) if across == "draws of one key" else keys.uniform(keys.fold(key, torch.arange(n)), 1)[:, 0]
    assert u.dtype == torch.float64
    assert 0 <= float(u.min()) < float(u.max()) < 1
    cells = np.histogram(u.numpy(), bins=100, range=(0, 1))[0]
    assert stats.chisquare(cells).pvalue > 1e-4
    pairs = np.histogram2d(u[:-1].numpy(), u[1:].numpy(), bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


@settings(max_examples=50, deadline=None)
@given(bound=st.integers(1, 1 << 53), u=st.floats(0, 1, exclude_max=True))
def test_below_stays_below(bound: int, u: float) -> None:
    largest = 1 - 2.0**-53
    drawn = keys.below(torch.tensor([0.0, u, largest], dtype=torch.float64), bound)
    assert drawn.dtype == torch.int64
    assert drawn[0] == 0
    assert 0 <= int(drawn[1]) < bound
    assert int(drawn[2]) == bound - 1


def test_pure() -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    first = keys.uniform(keys.make(1, 2), 10)
    torch.rand(1)
    assert keys.uniform(keys.make(1, 2), 10).equal(first)
    torch.set_rng_state(before[0])
    keys.uniform(keys.make(1, 2), 10)
    assert torch.get_rng_state().equal(before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
