"""What the text model starts from: rarity and mean of meta-training's texts, and words' vectors from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline import baselines, initial
from pipeline import experiment as experiments
from pipeline.algorithms.protonet import ProtoNet
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Components, Experiment
from pipeline.tasks import shards
from pipeline.tasks.text import TextTasks
from pipeline.tasks.tokens import Tokens
from pipeline.training.evaluate import evaluate
from pipeline.types import SPLITS, MetaState, Params

SHAPE = {"split": "random", "n_way": 2, "k_shot": 1, "n_query": 1, "eval_n_query": 1}
WORDS = {"tokens": {"words": [1, 1], "characters": None}}


def experiment(data: Path, model: dict[str, Any], **task: Any) -> Experiment:
    content = {
        "name": "start",
        "task": {"family": "text", "data": str(data), **SHAPE, **task},
        "model": {"name": "text", "buckets": 2**18, "embedding": None, **model},
        "algorithm": {"name": "protonet", "distance": "cosine"},
        "training": {"steps": 1, "backend": "local", "dtype": "float64"},
    }
    return experiments.from_dict(content, source="test")


def write_texts(folder: Path, of_class: Callable[[int], list[str]] = lambda _: ["alpha delta", "alpha beta"]) -> Path:
    """Four classes in each part."""
    names = [f"c{number}" for number in range(12)]
    classes = (shards.ClassExamples(name, "all", of_class(number)) for number, name in enumerate(names))
    splits = {"random": {name: SPLITS[number % 3] for number, name in enumerate(names)}}
    shards.write(folder, classes, splits=splits, modality="text", source={"name": "tiny"}, preprocessing={})
    return folder


def common_and_own_words(number: int) -> list[str]:
    random = np.random.default_rng(number)
    return [" ".join([*random.choice(["the", "to", "a", "of"], 6), f"own{number}"]) for _ in range(6)]


def started(exp: Experiment) -> tuple[Components, Params, str]:
    given = initial.resolve(exp)
    assert given is not None
    return experiments.build(exp, device=torch.device("cpu")), given.state.params, given.source


def test_it_begins_with_the_answers_of_tf_idf_centroids(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data", common_and_own_words)
    exp = experiment(data, {"start": "tfidf"}, n_way=4, eval_n_query=5, **WORDS)
    parts, params, told = started(exp)
    assert told == "tfidf of meta-training's texts"
    how: dict[str, Any] = {"split": "meta_test", "seed": 3, "episodes": 8}
    scores = evaluate(parts.algorithm, parts.family, MetaState(params, {}), data_digest="", chunk=None, **how)
    counting, rarity = baselines.scores(parts.family, **how).values()
    torch.testing.assert_close(scores.final_scores("inductive"), rarity)
    assert counting.mean() < rarity.mean() - 0.01


def test_the_center_is_the_mean_of_meta_trainings_bags(tiny_sets: dict[str, Path]) -> None:
    parts, params, _ = started(experiment(tiny_sets["text"], {"start": "tfidf", "center": True, "buckets": 64}))
    assert isinstance(parts.family, TextTasks)
    assert isinstance(parts.algorithm, ProtoNet)
    texts = torch.stack(list(parts.family.texts("meta_train")))[None]
    features, _ = parts.model.features({name: value[None] for name, value in params.items()}, texts)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(1, 64, dtype=torch.float64))
    assert params["center"].norm() > 0.1


def row(word: str, buckets: int) -> int:
    return 1 + (int(Tokens(words=(1, 1), characters=None)([word])[0, 0]) - 1) % buckets


def vectors_of(folder: Path, kind: str) -> Path:
    vectors = {"alpha": [1.0, 2, 3], "beta": [-1.0, 0, 0.5], "beta gamma": [9.0, 9, 9], "gamma-ray": [7.0, 7, 7]}
    if kind == "safetensors":
        save_file({word: np.array(v) for word, v in vectors.items()}, folder / "v.safetensors")
        return folder / "v.safetensors"
    lines = [f"{word} {' '.join(map(str, v))}\n" for word, v in vectors.items()]
    (folder / f"v.{kind}").write_text("".join([f"{len(lines)} 3\n"] * (kind == "vec") + lines))
    return folder / f"v.{kind}"


@pytest.mark.parametrize("kind", ["txt", "vec", "safetensors"])
def test_rows_start_from_words_vectors_in_a_file(kind: str, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data")
    file = vectors_of(tmp_path, kind)
    exp = experiment(data, {"embedding": 3, "buckets": 997, "vectors": str(file)}, **WORDS)
    parts, params, told = started(exp)
    assert told == f"{file} (2 of 4 words have a row, 2 are no single word, 75% of the tokens of meta-training)"
    table = params["embedding.weight"]
    found = table[[row("alpha", 997), row("beta", 997)]]
    torch.testing.assert_close(found.square().mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found / found[0, 0], torch.tensor([[1, 2, 3], [-1, 0, 0.5]], dtype=torch.float64))
    fresh = parts.algorithm.init(exp.seed).params["embedding.weight"]
    assert int((table != fresh).any(dim=1).sum()) == 2


@pytest.mark.parametrize(
    ("content", "model", "kind", "words"),
    [
        (None, {}, ConfigError, "v.txt: cannot be read"),
        (b"alpha 1 2 3 4\n", {}, ConfigError, "line 1 has 4 numbers, and model.embedding is 3"),
        (b"2 4\nalpha 1 2 3 4\n", {}, ConfigError, "line 1 tells of 2 words with 4 numbers each, and .* is 3"),
        (b"2 3\nalpha 1 2 3 4\n", {}, ConfigError, "line 2 has 4 numbers, and model.embedding is 3"),
        (b"alpha 1\nbeta 1\n", {}, ConfigError, "line 1 has 1 fields after the word"),
        (b"alpha 1 2 3\nbeta 1 2\n", {}, ConfigError, "line 2 has 2 fields after the word"),
        (b"alpha 1 nan 3\n", {}, DataError, "line 1 holds NaN"),
        (b"\xff 1 2 3\n", {}, DataError, "line 1 is not UTF-8"),
        (b"", {}, DataError, "holds no word's vector"),
        (b"alpha 1 2 3\n", {"embedding": None}, ConfigError, "embedding: null has none"),
    ],
)
def test_other_files_are_refused(
    content: bytes | None, model: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    data = write_texts(tmp_path / "data")
    if content is not None:
        (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(kind, match=words):
        initial.resolve(experiment(data, {"embedding": 3, "vectors": str(tmp_path / "v.txt"), **model}, **WORDS))


def test_vectors_of_words_need_words(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data")
    exp = experiment(data, {"embedding": 3, "vectors": "v.txt"}, tokens={"words": None, "characters": [3, 3]})
    with pytest.raises(ConfigError, match=r"task\.tokens\.words is None"):
        initial.resolve(exp)


def test_a_data_set_that_is_read_in_windows_gives_the_same_start(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data", common_and_own_words)
    model = {"start": "tfidf", "center": True, "buckets": 64}
    _, whole, _ = started(experiment(data, model))
    windows = {"memory_limit_mb": 0, "window": {"classes": 2, "steps": 3}}
    _, read, _ = started(experiment(data, model, **windows))
    assert whole.keys() == read.keys()
    assert all(torch.equal(read[name], value) for name, value in whole.items())
