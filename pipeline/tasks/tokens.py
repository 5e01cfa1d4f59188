"""Text -> token numbers: words and pieces of words, hashed. Training and serving use the same code.

Nothing is learned and nothing is kept: the number of a token is a hash of its letters (MurmurHash3, through
scikit-learn's HashingVectorizer), so a word that no training text held has a number too. The registered model carries
the settings, so a user's sentences are cut as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipeline.config import Section
from pipeline.errors import DataError

HASHES = 2**30  # values of a hash; the embedding table takes them modulo its rows
MAX_CHARACTERS = 20_000  # of a text; what comes after them is left out before it is cut into tokens
WORD = r"(?u)\b\w+\b"


class Tokens(Section):
    """Hashed n-grams of words, and of the characters within words."""

    kind: Literal["tokens"] = "tokens"
    words: tuple[int, int] | None = (1, 2)  # shortest and longest n-gram of words; null: none
    characters: tuple[int, int] | None = (3, 4)  # the same of characters; a word's ends count as blanks
    max_tokens: int = Field(default=128, ge=1, le=65536)  # of a text, n-grams of words first; more are left out
    lowercase: bool = True

    @field_validator("words", "characters")
    @classmethod
    def _from_short_to_long(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("should be two lengths, the shorter one first, such as [1, 2]")
        return value

    @model_validator(mode="after")
    def _of_something(self) -> Tokens:
        if self.words is None and self.characters is None:
            raise ValueError("tokens are of words, of characters or of both: give one of them")
        return self

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [texts, max_tokens]: a number from 1 on for every token of a text, as often as it occurs; then zeros.

        Raises DataError: something that is no text.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {number + 1}: expected a string, got {type(text).__name__}.")
        numbers = np.zeros((len(texts), self.max_tokens), dtype=np.int64)
        used = np.zeros(len(texts), dtype=np.int64)
        for stream, vectorizer in self._vectorizers:
            counts = vectorizer.transform([text[:MAX_CHARACTERS] for text in texts])
            times = counts.data.astype(np.int64)
            tokens = np.repeat(counts.indices.astype(np.int64), times)
            text_of = np.repeat(np.repeat(np.arange(len(texts)), np.diff(counts.indptr)), times)
            of_text = np.bincount(text_of, minlength=len(texts))
            place = used[text_of] + np.arange(len(tokens)) - (of_text.cumsum() - of_text)[text_of]
            kept = place < self.max_tokens
            numbers[text_of[kept], place[kept]] = 1 + 2 * tokens[kept] + stream  # words have odd ones, the others even
            used += of_text
        return numbers

    @cached_property
    def _vectorizers(self) -> list[tuple[int, Any]]:
        from sklearn.feature_extraction.text import HashingVectorizer  # a second to import

        how: dict[str, Any] = {"n_features": HASHES, "alternate_sign": False, "norm": None, "lowercase": self.lowercase}
        found = []
        if self.words is not None:
            found.append((0, HashingVectorizer(analyzer="word", token_pattern=WORD, ngram_range=self.words, **how)))
        if self.characters is not None:
            found.append((1, HashingVectorizer(analyzer="char_wb", ngram_range=self.characters, **how)))
        return found
