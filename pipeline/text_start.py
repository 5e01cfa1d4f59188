"""What the text model starts from where that is not random: the rarity of tokens, their mean, and words' vectors.

Computed once, by the process that makes a run, from meta-training's texts alone (see `pipeline.initial`).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.models.bag import PADDING
from pipeline.models.text import Text, TextConfig, unit_length
from pipeline.tasks.text import Rarity, TextTasks
from pipeline.tasks.tokens import Tokens
from pipeline.types import Params, TaskFamily

AT_ONCE = 512  # texts of a bag, words that are cut
LARGEST = 1e6  # of a vector's numbers: beyond it the file is no list of vectors


def start(config: TextConfig, model: Text, family: TaskFamily, fresh: Params) -> tuple[Params, str]:
    """The parameters to start from, and what was found, for the user.

    Raises ConfigError: the vectors are not to be had, or do not fit the model. DataError: a damaged file.
    """
    families = _text_families(family)
    params = dict(fresh)
    table = params["embedding.weight"].clone()
    told = []
    if config.vectors is not None:
        placed, words = _place_vectors(config, model, families[0].config.tokens, table)
        hits = tokens = 0
        for text in _texts(families):
            rows = model.rows(text[text > 0])
            hits, tokens = hits + int(placed[rows].sum()), tokens + len(rows)
        told.append(f"{config.vectors} ({words}, {hits / max(tokens, 1):.0%} of the tokens of meta-training)")
    if config.start == "tfidf":
        rarity = Rarity(model.rows(text) for text in _texts(families))(torch.arange(len(table)))
        table *= rarity.view(-1, *[1] * (table.ndim - 1)).to(table.dtype)
        told.append("tfidf of meta-training's texts")
    table[PADDING] = 0
    params["embedding.weight"] = table
    if config.center:
        params["center"] = _mean_bag(model, table, _texts(families))
    return params, "; ".join(told)


def _text_families(family: TaskFamily) -> list[TextTasks]:
    """Raises ConfigError: other tasks than texts."""
    families: list[Any] = getattr(family, "families", [family])
    if not all(isinstance(each, TextTasks) for each in families):
        raise ConfigError("model.start and model.vectors are for task.family: text: leave them out.")
    return families


def _texts(families: list[TextTasks]) -> Iterator[Tensor]:
    """Token numbers [L] of meta-training's texts, on the CPU."""
    return (text.cpu().long() for family in families for text in family.texts("meta_train"))


def _mean_bag(model: Text, table: Tensor, texts: Iterator[Tensor]) -> Tensor:
    """[D], of bags of unit length."""
    total, number = torch.zeros(model.sizes[0], dtype=torch.float64), 0
    while some := list(itertools.islice(texts, AT_ONCE)):
        bags = model.bags(table[None], model.rows(torch.stack(some)[None]))
        total += unit_length(bags)[0].to(torch.float64).sum(dim=0)
        number += len(some)
    return (total / max(number, 1)).to(table.dtype)


def _place_vectors(config: TextConfig, model: Text, tokens: Tokens, table: Tensor) -> tuple[Tensor, str]:
    """Put the words' vectors into their rows of the table, scaled to unit variance as fresh rows are.

    Returns which rows have one, bool [buckets + 1], and how many words took a row. The first word of a row has it:
    files begin with the most frequent ones.
    """
    source = f"model.vectors: {config.vectors}"
    if tokens.words is None or tokens.words[0] != 1:
        raise ConfigError(f"{source}: holds words, and task.tokens.words is {tokens.words}. Set it to [1, 1].")
    alone = tokens.model_copy(update={"words": (1, 1), "characters": None, "max_tokens": 2})
    placed = torch.zeros(len(table), dtype=torch.bool)
    words = several = 0
    squares, numbers = 0.0, 0
    vectors = _vectors(config, source)
    while some := list(itertools.islice(vectors, AT_ONCE)):
        words += len(some)
        rows = model.rows(torch.from_numpy(alone([word for word, _ in some])).long())
        for (_, vector), (row, next_row) in zip(some, rows.tolist(), strict=True):
            if row == PADDING or next_row != PADDING:
                several += 1
                continue
            if not placed[row]:
                placed[row] = True
                table[row] = torch.from_numpy(vector).to(table.dtype)
                squares += float(np.square(vector, dtype=np.float64).sum())
                numbers += len(vector)
    taken = int(placed.sum())
    if not taken or squares == 0:
        raise DataError(f"{source}: holds no word's vector ({words} entries). Give GloVe's text, or words by name.")
    table[placed] /= (squares / numbers) ** 0.5
    told = f"{taken:,} of {words:,} words have a row"
    if several:
        told += f", {several:,} are no single word"
    if words - several > taken:
        told += f", {words - several - taken:,} found it taken (the same word in other case, or model.buckets is small)"
    return placed, told


def _vectors(config: TextConfig, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """Words and their vectors, float32 [D] each."""
    assert config.vectors is not None
    place = storage.readable(config.vectors)
    try:
        if config.vectors.endswith(".safetensors"):
            found = _by_name(place.read_bytes(), source)
        else:
            lines = place.open("rb") if isinstance(place, Path) else io.BytesIO(place.read_bytes())
            with lines:
                yield from _lines(lines, config, source)
            return
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror or error}).") from error
    for word, vector in found.items():
        if vector.shape != (config.embedding,):
            raise ConfigError(_other_length(source, f"{word!r} has the shape {list(vector.shape)}", config))
        yield word, _finite(vector.astype(np.float32), source, repr(word))


def _by_name(content: bytes, source: str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(content)
    except Exception as error:
        raise DataError(f"{source}: cannot be read as safetensors ({error}).") from error


def _lines(lines: IO[bytes], config: TextConfig, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """A word, which may hold blanks, and its numbers a line; fastText's first line tells sizes."""
    assert config.embedding is not None
    first = True  # of the vectors
    for number, line in enumerate(lines, start=1):
        word, *values = line.rstrip().rsplit(b" ", config.embedding)
        fields = line.split()
        if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields) and config.embedding != 1:
            if fields[1] != b"%d" % config.embedding:
                found = f"line 1 tells of {fields[0].decode():.20} words with {fields[1].decode():.20} numbers each"
                raise ConfigError(_other_length(source, found, config))
            continue
        if not fields:
            continue
        where = f"line {number}"
        try:
            if len(values) != config.embedding:
                raise ValueError
            vector = np.array([float(value) for value in values], dtype=np.float32)
            text = word.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: {where} is not UTF-8 ({error}).") from error
        except ValueError:
            found = f"{where} has {len(fields) - 1} fields after the word"
            raise ConfigError(_other_length(source, found, config)) from None
        if first and _is_number(text.rsplit(" ", 1)[-1]) and " " in text:
            raise ConfigError(_other_length(source, f"{where} has {len(fields) - 1} numbers", config))
        first = False
        yield text, _finite(vector, source, where)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _finite(vector: np.ndarray, source: str, where: str) -> np.ndarray:
    if not (np.abs(vector) <= LARGEST).all():
        raise DataError(f"{source}: {where} holds NaN or a number beyond {LARGEST:g}.")
    return vector


def _other_length(source: str, found: str, config: TextConfig) -> str:
    return (
        f"{source}: {found}, and model.embedding is {config.embedding}. It should be a word and that many numbers a "
        "line, or .safetensors of vectors by word: set model.embedding to their length."
    )
