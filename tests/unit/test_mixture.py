"""Several data sets as one task family."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.utils.validation import _validate_param_name

from pipeline import class_report, config, placement, workflow
from pipeline import experiment as experiments
from pipeline.config import validate
from pipeline.datasets.source import Column
from pipeline.errors import ConfigError
from pipeline.experiment import Experiment
from pipeline.learner import card_of
from pipeline.shown import shown
from pipeline.tasks import shards
from pipeline.tasks.images import ImageTasks
from pipeline.tasks.mixture import MixtureConfig, MixtureTasks
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tabular import Moments, TabularTasks, joint_encoding
from pipeline.tracking import param_name
from pipeline.training.context import LocalContext
from pipeline.training.evaluate import Estimate, evaluate, summarize
from pipeline.training.loop import train
from pipeline.types import SPLITS
from tests import faults

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def other_data(tiny_data_set: Callable[..., Path]) -> Path:
    return tiny_data_set(classes=24, per_class=10)


def images(data: Path, **options: Any) -> dict[str, Any]:
    return {"family": "images", "data": str(data), "split": "random", "n_query": 2, "eval_n_query": 2, **options}


def mixture(*tasks: dict[str, Any], weights: tuple[float, ...] = (1.0, 3.0)) -> MixtureTasks:
    sets = [{"name": f"set{i}", "weight": weights[i], "task": task} for i, task in enumerate(tasks)]
    section = validate(MixtureConfig, {"family": "mixture", "sets": sets}, source="test")
    return section.build(device=CPU, dtype=torch.float64)


def experiment(folder: Path, *tasks: dict[str, Any], **training: object) -> Experiment:
    content = faults.experiment(folder, "", backend="local", **training).to_dict()
    content["task"] = {"family": "mixture", "sets": [{"name": f"set{i}", "task": t} for i, t in enumerate(tasks)]}
    return experiments.from_dict(content, source="test")


def test_steps_are_of_the_sets_by_their_weights(tiny_data: Path, other_data: Path) -> None:
    """And a step's episodes are those that its set has alone, but for the numbers of classes."""
    tasks = mixture(images(tiny_data), images(other_data, k_shot=2))
    drawn = Counter(tasks.drawn(5, step) for step in range(4000))
    assert drawn[1] / 4000 == pytest.approx(0.75, abs=0.03)
    assert tasks.train_classes == 6 + 8
    assert tasks.variable_shapes
    slots = torch.tensor([4, 0])
    met = set()
    for step in range(20):
        number = tasks.drawn(1, step)
        ours = tasks.sample("meta_train", step, slots, seed=1)
        alone = tasks.families[number].sample("meta_train", step, slots, seed=1)
        assert ours.classes is not None
        assert alone.classes is not None
        assert torch.equal(ours.support_x, alone.support_x)
        assert torch.equal(ours.classes - (0, 6)[number], alone.classes)
        met |= set(ours.classes.flatten().tolist())
    assert met == set(range(14))


def test_evaluation_takes_the_sets_in_turn_and_tells_each(tiny_data: Path, other_data: Path, tmp_path: Path) -> None:
    """Each set's score is what it gets alone, and the overall one is their mean."""
    exp = experiment(tmp_path, images(tiny_data, eval_n_way=3), images(other_data, eval_k_shot=2))
    parts = experiments.build(exp, device=CPU)
    assert isinstance(parts.family, MixtureTasks)
    state = parts.algorithm.init(0)

    def scored(family: Any, episodes: int) -> Any:
        fixed: dict[str, Any] = {"split": "meta_test", "seed": 4, "data_digest": "x", "chunk": 3}
        return evaluate(parts.algorithm, family, state, episodes=episodes, **fixed)

    together = scored(parts.family, 11)
    each = together.of_sets()
    assert list(each) == ["set0", "set1"]
    for (name, ours), family, episodes in zip(each.items(), parts.family.families, (6, 5), strict=True):
        alone = scored(family, episodes)
        torch.testing.assert_close(ours.scores, alone.scores)
        torch.testing.assert_close(ours.losses, alone.losses)
        assert ours.task == alone.task
        assert together.to_dict()["sets"][name]["inductive"] == ours.to_dict()["inductive"]
        metrics = summarize(together, "test")
        assert metrics[f"test_{name}_accuracy_inductive"] == pytest.approx(alone.score("inductive").mean)
    assert together.score("inductive") == Estimate.of(together.final_scores("inductive"))


def test_training_tells_the_validation_of_each_set(tiny_data: Path, other_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, images(tiny_data), images(other_data, k_shot=2), steps=3, validate_every=3)
    run = faults.open_run(exp)
    train(LocalContext(), exp, run)
    *_, record = faults.without_clock(run)
    assert {"val_accuracy_inductive", "val_set0_accuracy_inductive", "val_set1_accuracy_inductive"} <= set(record)
    exp = experiments.from_dict(exp.to_dict(), source="again")
    family = experiments.build(exp, device=CPU).family
    assert isinstance(family, MixtureTasks)
    card = card_of(
        exp,
        objective="classification",
        input_shape=family.input_shape,
        num_outputs=family.num_outputs,
        preprocessing=family.preprocessing,
        data_digest=exp.task.verify(),
        training_classes=list(family.class_digests("meta_train")),
        checkpoint={},
    )
    assert (card.n_way, card.k_shot) == (5, 2)
    first = family.families[0]
    assert isinstance(first, ImageTasks)
    assert card.preprocessing is not None
    assert set(first.class_digests("meta_train")) <= set(card.training_classes)


def test_sets_that_do_not_go_together_are_refused(
    tiny_data: Path, tiny_data_set: Callable[..., Path], tmp_path: Path
) -> None:
    large = tiny_data_set(size=16)
    with pytest.raises(ConfigError, match=r"set1 has classification of images \[1, 16, 16\]"):
        mixture(images(tiny_data), images(large))
    with pytest.raises(ConfigError, match="set1 has regression"):
        mixture(images(tiny_data), {"family": "sinusoid"})
    with pytest.raises(ConfigError, match="set0 has difficulty"):
        mixture(images(tiny_data, difficulty={}), images(tiny_data))
    with pytest.raises(ConfigError, match=r"sets\[1\]\.task\.n_wa: unknown key \(did you mean n_way"):
        mixture(images(tiny_data), images(tiny_data, n_wa=3))
    part = {"name": "one", "task": images(tiny_data)}
    with pytest.raises(ConfigError, match="names must differ"):
        validate(MixtureConfig, {"family": "mixture", "sets": [part, part]}, source="test")
    with pytest.raises(ConfigError, match=r"training\.compile"):
        experiments.check_fits(experiment(tmp_path, images(tiny_data), images(tiny_data, k_shot=2), compile=True))


def test_classes_that_one_set_trains_on_and_another_is_tested_on_are_refused(
    tiny_data: Path, tiny_data_set: Callable[..., Path], tmp_path: Path
) -> None:
    """Before any worker starts. The classes are found by their examples, wherever the set lies."""
    dealt_otherwise = tiny_data_set(part_of=lambda i: SPLITS[(i + 2) % 3])
    exp = experiment(tmp_path, images(tiny_data), images(dealt_otherwise))
    with pytest.raises(ConfigError, match=r"6 of the 6 meta_test classes of set1 are in meta_train of set0 \(group"):
        experiments.check_fits(exp)
    only_selected_by = tiny_data_set(part_of=lambda i: SPLITS[-i % 3])
    with pytest.raises(ConfigError, match="meta_test classes of set1 are in meta_val of set0"):
        mixture(images(tiny_data), images(only_selected_by))
    assert mixture(images(tiny_data), images(tiny_data, k_shot=2)).train_classes == 12


LENGTH, WIDTH = Column(name="length"), Column(name="width", missing=True)
COLOUR = Column(name="colour", kind="categorical", categories=["blue", "red"])
OTHER_COLOUR = Column(name="colour", kind="categorical", categories=["violet", "red"])


def table(folder: Path, columns: list[Column], **options: Any) -> dict[str, Any]:
    """The section of a set of twelve classes; its rows are those of its columns, whatever their order."""
    names = [f"c{number:02d}" for number in range(12)]
    random = np.random.default_rng(len(folder.name))
    scale = 10.0 ** len(folder.name)

    def rows(_: str) -> np.ndarray:
        values = {
            "length": random.normal(scale, scale, 6),
            "width": np.where(random.random(6) < 0.3, np.nan, random.normal(size=6)),
            "colour": random.integers(0, 2, 6),
        }
        return np.column_stack([values.get(column.name, np.zeros(6)) for column in columns]).astype(np.float32)

    classes = [shards.ClassExamples(name, "all", rows(name)) for name in names]
    parts = {name: SPLITS[i % 3] for i, name in enumerate(names)}
    how: dict[str, Any] = {"splits": {"random": parts}, "source": {}, "preprocessing": {}, "modality": "vector"}
    shards.write(folder, classes, columns=columns, **how)
    shape = {"n_way": 2, "k_shot": 2, "n_query": 1, "eval_n_query": 1}
    return {"family": "tabular", "data": str(folder), **shape, **options}


@pytest.mark.parametrize("normalize", ["support", "training", "none"])
def test_tables_are_mixed_by_the_names_of_columns_and_categories(normalize: str, tmp_path: Path) -> None:
    """One encoding, with the categories of all sets and the statistics of rows drawn by the sets' weights."""
    sections = [
        table(tmp_path / "a", [LENGTH, WIDTH, COLOUR], normalize=normalize),
        table(tmp_path / "bb", [OTHER_COLOUR, WIDTH, LENGTH], normalize=normalize),
    ]
    tasks = mixture(*sections)
    assert tasks.input_shape == (6,)
    encoding = TableEncoding.model_validate(tasks.preprocessing)
    assert encoding.columns == [LENGTH, WIDTH, COLOUR.model_copy(update={"categories": ["blue", "red", "violet"]})]
    rows, weights = [], []
    for family, weight in zip(tasks.families, (1.0, 3.0), strict=True):
        assert isinstance(family, TabularTasks)
        names = [column.name for column in family.manifest.columns]
        with shards.ShardReader(family.config.data, family.manifest) as reader:
            found = np.concatenate([reader.read_class(c) for c in family.manifest.members("random", "meta_train")])
        rows.append(found[:, [names.index("length"), names.index("width")]].astype(np.float64))
        weights.append(weight / (~np.isnan(rows[-1])).sum(axis=0) * np.ones_like(rows[-1]))
        support, _ = family.rows("meta_train", 0, torch.arange(3), seed=5)
        named = [
            [
                {
                    column.name: column.categories[int(value)] if column.categories else value
                    for column, value in zip(family.manifest.columns, row, strict=True)
                }
                for row in task
            ]
            for task in support.tolist()
        ]
        inputs = family.sample("meta_train", 0, torch.arange(3), seed=5).support_x
        for task, ours in zip(named, inputs, strict=True):
            torch.testing.assert_close(shown(task, encoding, [6], torch.float64).support, ours)
    values, shares = np.concatenate(rows), np.concatenate(weights)
    for number in range(2):
        there = ~np.isnan(values[:, number])
        mean = np.average(values[there, number], weights=shares[there, number])
        variance = np.average((values[there, number] - mean) ** 2, weights=shares[there, number])
        assert encoding.mean[number] == pytest.approx(mean)
        assert encoding.variance[number] == pytest.approx(variance)


def test_a_column_that_one_set_never_fills_is_as_in_the_others(tmp_path: Path) -> None:
    full, empty = mixture(*(table(tmp_path / name, [LENGTH, WIDTH]) for name in ("a", "bb"))).families
    assert isinstance(full, TabularTasks)
    assert isinstance(empty, TabularTasks)
    empty.moments["width"] = Moments(0, 0.0, 0.0)
    for weights in ([1.0, 5.0], [1.0, 0.1]):
        encoding = joint_encoding({"full": full, "empty": empty}, weights)
        assert (encoding.mean[1], encoding.variance[1]) == pytest.approx(full.moments["width"][1:])


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ([LENGTH, COLOUR], {}, "of set0 and set1 only set0 has the columns 'width'"),
        ([LENGTH, WIDTH, COLOUR, Column(name="depth")], {}, "only set1 has the columns 'depth'"),
        ([LENGTH, WIDTH, Column(name="colour")], {}, "column 'colour' is categorical in set0 and numeric in set1"),
        ([LENGTH, WIDTH, COLOUR], {"normalize": "none"}, "normalize is support in set0 and none in set1"),
        ([LENGTH, WIDTH, COLOUR], {"prior_examples": 3}, "prior_examples is 1.0 in set0 and 3.0 in set1"),
    ],
)
def test_tables_that_cannot_be_mixed_are_refused(
    columns: list[Column], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    first = table(tmp_path / "a", [LENGTH, WIDTH, COLOUR])
    with pytest.raises(ConfigError, match=words):
        mixture(first, table(tmp_path / "bb", columns, **options))


def test_texts_that_are_cut_differently_are_refused(tiny_sets: dict[str, Path]) -> None:
    """One number would mean two words."""
    one: dict[str, Any] = {"family": "text", "data": str(tiny_sets["text"]), "eval_n_query": 2, "n_query": 2}
    with pytest.raises(ConfigError, match=r'"words":\[1,1\].*task\.tokens'):
        mixture(one, {**one, "tokens": {"words": [1, 1]}})


def test_keys_of_a_set_are_set_and_found(tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, images(tiny_data), images(Path("elsewhere")))
    content = config.apply_overrides(exp.to_dict(), ["task.sets[1].weight=5", "task.sets[1].task.data=/there"])
    assert content["task"]["sets"][1]["weight"] == 5
    assert config.flatten(content)["task.sets[1].task.data"] == "/there"
    assert exp.task.sets[1].weight == 1
    for key in config.flatten(content):
        _validate_param_name(param_name(key))
    with pytest.raises(ConfigError, match=r"there is no sets\[2\]"):
        config.apply_overrides(content, ["task.sets[2].weight=5"])
    with pytest.raises(ConfigError, match=r"task\.sets\[1\]\.task\.data=elsewhere: on the cluster"):
        placement.check_storage(exp)


def test_a_run_tells_the_hard_classes_of_each_set(tiny_data: Path, other_data: Path, tmp_path: Path) -> None:
    """As if it had been evaluated alone: reports, episode pictures, metrics and tags."""

    class Log:
        def __init__(self) -> None:
            self.told: dict[str, Any] = {}

        def artifacts(self, folder: Path, place: str) -> None:
            self.files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

        def summary(self, metrics: dict[str, float], *, step: int) -> None:
            self.told |= metrics

        def tags(self, tags: dict[str, str]) -> None:
            self.told |= tags

    exp = experiment(tmp_path, images(tiny_data, eval_n_way=3), images(other_data), steps=2, validate_every=2)
    content = exp.to_dict()
    content["evaluation"]["test_episodes"] = 31
    exp = experiments.from_dict(content, source="test")
    run, log = faults.open_run(exp), Log()
    train(LocalContext(), exp, run)
    parts = experiments.build(exp, device=CPU)
    assert isinstance(parts.family, MixtureTasks)
    test = workflow.evaluate_run(exp, run, parts, log, "x")  # type: ignore[arg-type]
    for name, family in zip(("set0", "set1"), parts.family.families, strict=True):
        files = {"classes.json", "classes.png", "groups.png", "confusions.png", "episodes.png"}
        assert {f"sets/{name}/{file}" for file in files} <= log.files
        content = json.loads((run.evaluation / "sets" / name / "classes.json").read_text())
        own = test.of_sets()[name]
        alone = evaluate(
            parts.algorithm,
            family,
            workflow.best_checkpoint(run)[1],
            split="meta_test",
            seed=test.seed,
            episodes=own.episodes,
            data_digest="x",
            chunk=None,
            keep_predictions=True,
        )
        assert isinstance(family, ImageTasks)
        ours = class_report.report(alone, family, "inductive")
        assert content["inductive"] == ours.to_dict()
        assert (
            log.told[f"test_{name}_hardest_class_accuracy_inductive"] == content["inductive"]["classes"][0]["accuracy"]
        )
        assert log.told[f"hardest.{name}.class"] == content["inductive"]["classes"][0]["name"]
    assert "classes.json" not in log.files
