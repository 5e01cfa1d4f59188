"""Baselines without learning, against scikit-learn's on the same episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from pipeline import baselines
from pipeline.config import validate
from pipeline.tasks.tabular import TabularTasks, TabularTasksConfig
from pipeline.tasks.text import TextTasks, TextTasksConfig

SHAPE = {"split": "random", "n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4}
HOW = {"split": "meta_test", "seed": 3, "episodes": 6}
CPU = torch.device("cpu")


def accuracies(family: TextTasks | TabularTasks, answers: object) -> list[float]:
    """Of `answers(support, labels, query)` to each episode."""
    batch = family.sample("meta_test", 0, torch.arange(6), seed=3)
    parts = (part.numpy() for part in batch[:4])
    episodes = zip(*parts, strict=True)
    return [float(np.mean(answers(s, y, q) == truth)) for s, y, q, truth in episodes]  # type: ignore[operator]


def test_of_tables_nearest_neighbour_and_centroid(tiny_sets: dict[str, Path]) -> None:
    content = {"family": "tabular", "data": tiny_sets["tabular"], **SHAPE}
    family = validate(TabularTasksConfig, content, source="test").build(device=CPU, dtype=torch.float64)
    found = baselines.scores(family, **HOW)  # type: ignore[arg-type]
    assert list(found) == ["nearest neighbour on the inputs", "nearest centroid on the inputs"]
    for scores, model in zip(found.values(), (KNeighborsClassifier(1), NearestCentroid()), strict=True):
        expected = accuracies(family, lambda s, y, q, model=model: model.fit(s, y).predict(q))
        np.testing.assert_allclose(scores.numpy(), expected)


def test_of_texts_nearest_centroid_by_counts_and_by_tf_idf(tiny_sets: dict[str, Path]) -> None:
    content = {"family": "text", "data": tiny_sets["text"], **SHAPE, "tokens": {"max_tokens": 40}}
    family = validate(TextTasksConfig, content, source="test").build(device=CPU, dtype=torch.float64)
    found = list(baselines.scores(family, **HOW).values())  # type: ignore[arg-type]
    training = torch.stack(list(family.texts("meta_train")))
    assert len(training) == sum(entry.count for entry in family.entries("meta_train"))
    known = {token: i for i, token in enumerate(sorted(set(training.unique().tolist()) - {0}))}

    def counts(texts: np.ndarray, known: dict[int, int]) -> csr_matrix:
        made = np.zeros((len(texts), len(known)))
        for row, text in enumerate(texts):
            for token in text[text > 0]:
                made[row, known[int(token)]] += 1
        return csr_matrix(made)

    def nearest(support: np.ndarray, labels: np.ndarray, query: np.ndarray, *, rarity: bool) -> np.ndarray:
        every = {**known}
        for token in np.concatenate([support, query]).ravel():
            if token:
                every.setdefault(int(token), len(every))  # tokens that training never met
        bags = [counts(texts, every) for texts in (support, query)]
        if rarity:
            transform = TfidfTransformer().fit(counts(training.numpy(), every))
            s, q = (transform.transform(part).toarray() for part in bags)
        else:
            s, q = (normalize(part).toarray() for part in bags)
        means = normalize(np.stack([s[labels == w].mean(axis=0) for w in range(4)]))
        return (q @ means.T).argmax(axis=1)

    for scores, rarity in zip(found, (False, True), strict=True):
        expected = accuracies(family, lambda s, y, q, rarity=rarity: nearest(s, y, q, rarity=rarity))
        np.testing.assert_allclose(scores.numpy(), expected)
    assert found[1].mean() > 0.25
