"""Hard classes and confusions, against plain loops over episodes and queries."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import class_report, workflow
from pipeline import experiment as experiments
from pipeline.errors import ConfigError
from pipeline.experiment import Components
from pipeline.learner import Learner, card_of
from pipeline.tasks.classes import ClassTasks
from pipeline.training.evaluate import MODES, Evaluation, Predictions, evaluate
from tests.faults import experiment

pytestmark = pytest.mark.usefixtures("one_thread")
# two-sided 95 % points of Student's t with 1, 2, … 22 degrees of freedom, from a printed table
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201]
STUDENT_T += [2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074]
FIXED: dict[str, Any] = {"split": "meta_test", "seed": 3, "episodes": 23, "data_digest": "x", "chunk": 4}


@pytest.fixture(scope="module")
def parts(tiny_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Components:
    """Ten classes of two or three groups in meta_test; five of them in an episode, untrained and so often confused."""
    data = tiny_data_set(classes=30)
    exp = experiment(tmp_path_factory.mktemp("runs"), data)
    return experiments.build(exp, device=torch.device("cpu"))


def classes_of(parts: Components) -> ClassTasks:
    class_report.check(parts.family)
    assert isinstance(parts.family, ClassTasks)
    return parts.family


@pytest.fixture(scope="module")
def evaluation(parts: Components) -> Evaluation:
    return evaluate(parts.algorithm, parts.family, parts.algorithm.init(0), keep_predictions=True, **FIXED)


def test_predictions_are_those_that_were_scored(parts: Components, evaluation: Evaluation) -> None:
    plain = evaluate(parts.algorithm, parts.family, parts.algorithm.init(0), **FIXED)
    assert plain.predictions is None
    assert torch.equal(plain.scores, evaluation.scores)
    assert torch.equal(plain.losses, evaluation.losses)
    predictions = evaluation.predictions
    assert predictions is not None
    right = (predictions.answers == predictions.labels.unsqueeze(1)).double().mean(dim=2)  # [E, M]
    torch.testing.assert_close(right, evaluation.scores[:, :, -1])
    batch = parts.family.sample("meta_test", 0, torch.arange(23), seed=3)
    assert batch.classes is not None
    assert torch.equal(predictions.classes.long(), batch.classes)
    assert torch.equal(predictions.labels.long(), batch.query_y)
    few = evaluate(parts.algorithm, parts.family, parts.algorithm.init(0), keep_predictions=True, **FIXED, steps=0)
    assert few.predictions is not None
    assert not torch.equal(few.predictions.answers, predictions.answers)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_agree_with_loops_over_queries(parts: Components, evaluation: Evaluation, mode: Any) -> None:
    family = classes_of(parts)
    told = class_report.report(evaluation, family, mode).to_dict()
    entries, predictions = family.entries("meta_test"), evaluation.predictions
    assert predictions is not None
    right: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # name -> episode -> right or not
    chances: dict[tuple[str, str], int] = defaultdict(int)
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for e in range(23):
        inside = [entries[c] for c in predictions.classes[e].tolist()]
        answers = predictions.answers[e, MODES.index(mode)].tolist()
        for label, answer in zip(predictions.labels[e].tolist(), answers, strict=True):
            true, given = inside[label], inside[answer]
            for unit in (true.name, f"of {true.group}"):
                right[unit][e].append(int(label == answer))
            for other in inside:
                if other is not true:
                    chances[true.name, other.name] += 1
                    taken[true.name, other.name] += int(other is given)

    def check(unit: str, row: dict[str, Any]) -> None:
        episodes = list(right[unit].values())
        n, x = sum(map(len, episodes)), sum(map(sum, episodes))
        assert (row["queries"], row["episodes"]) == (n, len(episodes))
        assert row["accuracy"] == pytest.approx(x / n)
        spread = sum((sum(one) - x / n * len(one)) ** 2 for one in episodes)
        error = math.sqrt(len(episodes) / (len(episodes) - 1) * spread) / n
        assert len(episodes) > 2
        assert row["ci95"] == pytest.approx(STUDENT_T[len(episodes) - 2] * error, rel=1e-3)

    assert {row["name"] for row in told["classes"]} | {f"of {row['name']}" for row in told["groups"]} == set(right)
    for row in told["classes"]:
        check(row["name"], row)
        shares = [statistics.mean(one) for one in right[row["name"]].values()]  # equally many queries in each episode
        assert row["accuracy"] == pytest.approx(statistics.mean(shares))
    for row in told["groups"]:
        check(f"of {row['name']}", row)
    for rows in (told["classes"], told["groups"]):
        mean = sum(row["accuracy"] * row["queries"] for row in rows) / sum(row["queries"] for row in rows)
        drawn = [(row["accuracy"] * row["queries"] + 2 * mean) / (row["queries"] + 2) for row in rows]  # n_query
        assert drawn == sorted(drawn)

    group = {entry.name: entry.group for entry in entries}
    names = told["group_confusion"]["groups"]
    for g, row_group in enumerate(names):
        for h, column_group in enumerate(names):
            pairs = [p for p in chances if (group[p[0]], group[p[1]]) == (row_group, column_group)]
            n, x = sum(chances[p] for p in pairs), sum(taken[p] for p in pairs)
            assert told["group_confusion"]["opportunities"][g][h] == n
            assert told["group_confusion"]["rate"][g][h] == (pytest.approx(x / n) if n else None)

    for pair in told["pairs"]:
        a, b = pair["classes"]
        assert pair["confused"] == [taken[a, b], taken[b, a]]
        assert pair["queries"] == chances[a, b] + chances[b, a]
        assert pair["rate"] == pytest.approx((taken[a, b] + taken[b, a]) / pair["queries"])
    assert len(told["pairs"]) == sum(taken[a, b] + taken[b, a] > 0 for a, b in chances if a < b)
    mean = sum(taken.values()) / sum(chances.values())
    for pair in told["pairs"]:
        assert pair["ranked_by"] == pytest.approx((sum(pair["confused"]) + 4 * mean) / (pair["queries"] + 4))
    ranked = [pair["ranked_by"] for pair in told["pairs"]]
    assert ranked == sorted(ranked, reverse=True)


def test_classes_and_queries_that_an_episode_does_not_have_count_for_nothing(
    parts: Components, evaluation: Evaluation
) -> None:
    """Where episodes differ in shape."""
    assert evaluation.predictions is not None
    padded = Predictions(*(F.pad(part, (0, 2), value=-1) for part in evaluation.predictions))
    family = classes_of(parts)
    ours = class_report.report(replace(evaluation, predictions=padded), family, "inductive").to_dict()
    assert ours == class_report.report(evaluation, family, "inductive").to_dict()


def test_an_interval_needs_two_episodes_and_covers_what_it_should() -> None:
    """Episodes whose queries are all right or all wrong: as wide as of one query each, and 95 % of intervals cover."""
    generator, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        hits = 10.0 * generator.binomial(1, 0.6, size=30)
        shares = class_report.clustered(np.zeros(30), np.arange(30), hits, np.full(30, 10.0), 2)
        covered += bool(abs(shares.share[0] - 0.6) <= shares.half_width[0])
        widths.append(shares.half_width[0])
        assert np.isnan(shares.share[1])
    assert 0.92 < covered / 400 < 0.98
    assert statistics.mean(widths) == pytest.approx(2.045 * math.sqrt(0.24 / 30), rel=0.03)
    one = class_report.clustered(np.zeros(1), np.zeros(1, dtype=int), np.ones(1), np.ones(1), 1)
    assert np.isnan(one.half_width[0])
    assert one.share[0] == 1


def test_files(parts: Components, evaluation: Evaluation, tmp_path: Path) -> None:
    family = classes_of(parts)
    ours = class_report.write(evaluation, family, tmp_path / "report", mode="inductive")
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"classes.json", "classes.png", "confusions.png", "groups.png"}
    content = json.loads((tmp_path / "report" / "classes.json").read_text())
    assert content["inductive"] == ours.to_dict() != content["transductive"]
    for name in files - {"classes.json"}:
        assert matplotlib.image.imread(tmp_path / "report" / name).std() > 0.01
    hardest = content["inductive"]["classes"][0]
    assert class_report.metrics(ours)["test_hardest_class_accuracy_inductive"] == hardest["accuracy"]
    assert class_report.tags(ours)["hardest.class"] == hardest["name"]
    assert class_report.tags(ours)["hardest.pair"] == " | ".join(content["inductive"]["pairs"][0]["classes"])


def test_examples_are_the_classes_own_images(parts: Components) -> None:
    from pipeline.tasks.shards import ShardReader

    family = classes_of(parts)
    reader = ShardReader(family.config.data, family.manifest)
    members = family.manifest.members("random", "meta_test")
    images = family.examples("meta_test", [7, 0], 3)
    for image, member in zip(images, (members[7], members[0]), strict=True):
        assert np.array_equal(image.permute(0, 2, 3, 1).numpy(), reader.read_class(member)[:3])
    assert family.examples("meta_test", [1], 99).shape == (1, 8, 1, 12, 12)


def test_all_right_and_tasks_without_classes(parts: Components, evaluation: Evaluation, tmp_path: Path) -> None:
    assert evaluation.predictions is not None
    perfect = evaluation.predictions._replace(answers=evaluation.predictions.labels.unsqueeze(1).expand(-1, 2, -1))
    object.__setattr__(evaluation := Evaluation(**vars(evaluation)), "predictions", perfect)
    ours = class_report.write(evaluation, classes_of(parts), tmp_path, mode="inductive")
    assert ours.pairs == []
    assert class_report.metrics(ours)["test_hardest_group_accuracy_inductive"] == 1
    sinusoid = experiments.from_dict(
        {
            "name": "s",
            "task": {"family": "sinusoid"},
            "model": {"name": "mlp"},
            "algorithm": {"name": "maml", "inner_lr": 0.1},
            "training": {"steps": 1},
        },
        source="test",
    )
    built = experiments.build(sinusoid, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="--report"):
        class_report.check(built.family)
    told = evaluate(built.algorithm, built.family, built.algorithm.init(0), keep_predictions=True, **FIXED)
    assert told.predictions is None


def test_the_report_of_a_model(parts: Components, tmp_path: Path, tiny_data_set: Callable[..., Path]) -> None:
    """`metapipe evaluate --report`: the same numbers with and without."""
    exp = experiment(tmp_path, tiny_data_set(classes=30))
    card = card_of(
        exp,
        objective="classification",
        input_shape=parts.family.input_shape,
        num_outputs=5,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    learner = Learner(card, parts.algorithm.init(0))
    plain = workflow.evaluate_model(learner, episodes=6)
    told = workflow.evaluate_model(learner, episodes=6, report=tmp_path / "report")
    assert torch.equal(told.evaluation.scores, plain.evaluation.scores)
    content = json.loads((tmp_path / "report" / "classes.json").read_text())
    assert content["episodes"] == 6
    queries = [row["queries"] for row in content["inductive"]["classes"]]
    right = sum(row["accuracy"] * row["queries"] for row in content["inductive"]["classes"])
    assert right / sum(queries) == pytest.approx(told.evaluation.score("inductive").mean)
