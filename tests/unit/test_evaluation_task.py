"""A model evaluated on other data, other shapes of episodes, every class of a data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import experiment as experiments
from pipeline import workflow
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Experiment
from pipeline.learner import Learner, card_of, write_model
from pipeline.tasks import shards
from tests import faults

pytestmark = pytest.mark.usefixtures("one_thread")


def learner_of(exp: Experiment) -> Learner:
    """Not trained."""
    parts = experiments.build(exp, device=torch.device("cpu"))
    card = card_of(
        exp,
        objective=parts.family.objective.name,
        input_shape=parts.family.input_shape,
        num_outputs=parts.family.num_outputs,
        preprocessing=None,
        data_digest=exp.task.verify(),
        training_classes=list(parts.family.class_digests("meta_train")) if parts.family.train_classes else (),
        checkpoint={},
    )
    return Learner(card, parts.algorithm.init(0))


@pytest.fixture(scope="module")
def learner(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Of five ways."""
    return learner_of(faults.experiment(tmp_path_factory.mktemp("runs"), tiny_data))


@pytest.fixture(scope="module")
def other(tiny_data_set: Callable[..., Path]) -> Path:
    """Six other classes, all of them in meta_test of their only class split."""
    folder = tiny_data_set(classes=6, per_class=9)
    manifest = shards.read_manifest(folder)
    entries = [entry.model_copy(update={"splits": {"all_test": "meta_test"}}) for entry in manifest.classes]
    changed = manifest.model_copy(update={"classes": entries, "splits": ["all_test"]})
    changed = changed.model_copy(update={"digest": changed.compute_digest()})
    (folder / shards.MANIFEST).write_text(changed.model_dump_json(), encoding="utf-8")
    return folder


def test_every_class_of_other_data(learner: Learner, other: Path) -> None:
    found = workflow.evaluate_model(learner, data=str(other), part="all", n_way=4, k_shot=2, n_query=3, episodes=6)
    assert not found.trained_on_this_data
    assert found.data == str(other)
    content = found.evaluation.to_dict()
    assert content["task"]["class_split"] == shards.EVERY_CLASS
    assert [content["task"][key] for key in ("n_way", "k_shot", "n_query")] == [4, 2, 3]
    by_split = workflow.evaluate_model(learner, data=str(other), n_way=4, k_shot=2, n_query=3, episodes=6)
    assert torch.equal(by_split.evaluation.scores, found.evaluation.scores), "its only class split has all in meta_test"
    assert by_split.evaluation.task["class_split"] == "all_test"


def test_several_data_sets_are_each_as_alone(learner: Learner, tiny_data: Path, other: Path) -> None:
    folders = [str(tiny_data), str(other)]
    both = workflow.evaluate_model_on(learner, folders, n_query=2, episodes=5, baselines=True)
    assert [result.trained_on_this_data for result in both] == [True, False]
    for folder, result in zip(folders, both, strict=True):
        alone = workflow.evaluate_model(learner, data=folder, n_query=2, episodes=5, baselines=True)
        assert torch.equal(alone.evaluation.scores, result.evaluation.scores)
        assert alone.comparisons == result.comparisons


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"part": "all"}, DataError, "was trained on 6 of the 16"),
        ({"part": "all", "class_split": "random"}, ConfigError, "Leave --class-split out"),
        ({"class_split": "group"}, DataError, "has no class split 'group'"),
        ({"k_shot": 8}, DataError, "eval_k_shot=8"),
    ],
)
def test_what_does_not_fit_is_refused(learner: Learner, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        workflow.evaluate_model(learner, episodes=2, **options)


def test_more_ways_than_outputs_are_refused(learner: Learner, other: Path) -> None:
    with pytest.raises(ConfigError, match="--n-way 6: images was trained for 5-way tasks"):
        workflow.evaluate_model(learner, data=str(other), n_way=6, n_query=2, episodes=2)


def test_pictures_of_another_kind_are_refused(learner: Learner, other: Path) -> None:
    of_photos = Preprocessing(kind="photo", size=12, channels=1)
    on_photos = Learner(learner.card.model_copy(update={"preprocessing": of_photos}), learner.state)
    with pytest.raises(ConfigError, match=r"were prepared as drawing, images was trained on photos.*--kind photo"):
        workflow.evaluate_model(on_photos, data=str(other), n_way=4, n_query=2, episodes=2)


def test_a_bad_data_set_is_found_before_any_is_evaluated(
    learner: Learner, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(DataError, match="no such data set"):
        workflow.evaluate_model_on(learner, [str(tiny_data), "/no/such"], episodes=2)


def test_a_model_of_a_mixture(tiny_data: Path, other: Path, tmp_path: Path) -> None:
    """On its sets, or on other data as its first set's task."""
    content = faults.experiment(tmp_path, tiny_data, backend="local").to_dict()
    task = {**content["task"], "variable": {"least_n_way": 2, "evaluation": True}, "augmentation": {"flip": 0.5}}
    content["task"] = {"family": "mixture", "sets": [{"name": name, "task": task} for name in ("a", "b")]}
    learner = learner_of(experiments.from_dict(content, source="test"))
    own = workflow.evaluate_model(learner, episodes=4, report=tmp_path / "report")
    assert list(own.evaluation.of_sets()) == ["a", "b"]
    for name in "ab":
        told = json.loads((tmp_path / "report" / "sets" / name / "classes.json").read_text())
        assert told["episodes"] == own.evaluation.of_sets()[name].episodes
    assert own.evaluation.task["sets"]["a"]["k_shot"] == "variable"
    fixed = workflow.evaluate_model(learner, episodes=4, n_way=3)
    assert fixed.evaluation.task["sets"]["b"]["k_shot"] == 1
    elsewhere = workflow.evaluate_model(learner, episodes=4, data=str(other), n_way=3)
    assert elsewhere.evaluation.task["family"] == "images"
    assert not elsewhere.evaluation.sets
    with pytest.raises(ConfigError, match="--part all need --data"):
        workflow.evaluate_model(learner, part="all")


def test_procedural_tasks_have_no_other_data(tmp_path: Path, tiny_data: Path) -> None:
    content = faults.experiment(tmp_path, tiny_data, backend="local", model={"name": "mlp"}).to_dict()
    content["task"] = {"family": "regression", "function": "linear"}
    learner = learner_of(experiments.from_dict(content, source="test"))
    assert workflow.evaluate_model(learner, k_shot=3, episodes=3).evaluation.task["k_shot"] == 3
    for options in ({"data": str(tiny_data)}, {"n_way": 3}, {"part": "all"}):
        with pytest.raises(ConfigError, match="its tasks are procedural"):
            workflow.evaluate_model(learner, episodes=3, **options)


def test_the_command_shows_one_table(
    learner: Learner, tiny_data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.evaluate import evaluate

    write_model(tmp_path / "model", learner.card, learner.state)
    both = [str(tiny_data), str(other)]
    given: dict[str, Any] = {"data": both, "n_query": 2, "episodes": 3}
    evaluate(str(tmp_path / "model"), **given, json=True)
    told = json.loads(capsys.readouterr().out)
    assert [row["data"] for row in told["data_sets"]] == both
    evaluate(str(tmp_path / "model"), **given)
    shown = capsys.readouterr().out
    assert "5-way" in shown
    assert "inductive" in shown
    with pytest.raises(ConfigError, match="--out and --report"):
        evaluate(str(tmp_path / "model"), **given, out=tmp_path / "file")
    with pytest.raises(ConfigError, match="--part some: choose one of meta_train, meta_val, meta_test, all"):
        evaluate(str(tmp_path / "model"), part="some")
