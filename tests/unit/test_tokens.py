"""Hashed tokens: what is counted, where it is cut, and what stays the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from pipeline.config import validate
from pipeline.errors import ConfigError, DataError
from pipeline.tasks.tokens import HASHES, WORD, Tokens


def bag(numbers: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(numbers[numbers > 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_tokens_are_scikit_learns_hashes_as_often_as_they_occur() -> None:
    texts = ["play it again, play it", "", "Grüße aus Köln"]
    numbers = Tokens(words=(1, 2), characters=None, max_tokens=20)(texts)
    hashed = HashingVectorizer(
        ngram_range=(1, 2), token_pattern=WORD, n_features=HASHES, alternate_sign=False, norm=None
    ).transform(texts)
    for row, text in enumerate(numbers):
        expected = {1 + 2 * int(i): int(n) for i, n in zip(hashed[row].indices, hashed[row].data, strict=True)}
        assert bag(text) == expected
    assert sorted(bag(numbers[0]).values()) == [1, 1, 1, 2, 2, 2]  # "again", two of its pairs; play, it, "play it"
    assert not numbers[1].any()


def test_words_come_first_and_what_is_too_long_is_cut_off() -> None:
    texts = ["one two three", "four"]
    words = Tokens(words=(1, 1), characters=None, max_tokens=4)(texts)
    both = Tokens(words=(1, 1), characters=(3, 3), max_tokens=4)(texts)
    np.testing.assert_array_equal(both[0, :3], words[0, :3])
    assert (both % 2 == [[1, 1, 1, 0], [1, 0, 0, 0]]).all()  # odd: words, even: characters
    assert both[:, 3].all()
    assert (Tokens(words=(1, 1), characters=None, max_tokens=2)(texts) == words[:, :2]).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_a_text_has_its_tokens_whatever_stands_beside_it(texts: list[str]) -> None:
    tokens = Tokens(max_tokens=16)
    together = tokens(texts)
    assert together.shape == (len(texts), 16)
    assert together.dtype == np.int64
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_array_equal(row, tokens([text])[0])
        assert (np.diff((row > 0).astype(int)) <= 0).all()  # zeros at the end only


def test_case_counts_where_it_is_asked_for() -> None:
    assert (Tokens()(["May I"]) == Tokens()(["may i"])).all()
    assert (Tokens(lowercase=False)(["May I"]) != Tokens(lowercase=False)(["may i"])).any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"words": None, "characters": None}, "give one of them"),
        ({"words": [2, 1]}, "words: should be two lengths"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_settings_that_make_no_tokens_are_refused(content: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(Tokens, content, source="test")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="text 2: expected a string, got float"):
        Tokens()(["a", float("nan")])  # type: ignore[list-item]
