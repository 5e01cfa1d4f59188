"""Every algorithm on texts and on tables: it learns, it is served raw examples, or it says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import serving, workflow
from pipeline.errors import ConfigError, DataError
from pipeline.learner import AdaptedLearner, Learner, write_model
from pipeline.tasks import shards
from pipeline.tasks.shards.manifest import Column
from pipeline.tasks.tabular import TabularTasks
from pipeline.training import outer
from pipeline.types import MetaState
from tests.contract.entries import OTHER_MODALITIES, Case, build, card, plain, raw

STEPS = 8


@pytest.fixture(scope="module", params=[(name, p.values[0]) for name in OTHER_MODALITIES for p in plain()], ids=str)
def case(request: pytest.FixtureRequest, tiny_sets: dict[str, Path], one_thread: None) -> Case:
    problem, (name, variant, _) = request.param
    return Case(name, variant, problem, tiny_sets)


def expected(case: Case) -> np.ndarray:
    batch, steps = case.batch.tasks(slice(0, 1)), case.algorithm.eval_steps
    *_, adapted = case.algorithm.adaptation_path(
        case.state, batch.support_x, batch.support_y, steps=steps, inductive=True
    )
    return case.algorithm.predict(adapted, batch.query_x, "inductive")[0].softmax(-1).numpy()


def test_a_few_outer_steps_reduce_the_meta_loss(case: Case) -> None:
    params = {k: v.clone().requires_grad_() for k, v in case.state.params.items()}
    config = case.experiment.training.outer
    optimizer = outer.make_optimizer(config, params)
    losses = []
    for step in range(STEPS):
        gradient = case.algorithm.meta_grad(MetaState(params, {}), case.batch, step=step)
        assert gradient.grads.keys() == params.keys()
        losses.append(float(gradient.metrics["meta_loss"]))
        outer.update(config, optimizer, params, gradient.grads, lr=case.entry.outer_lr)
    assert losses[-1] < 0.95 * losses[0]


def test_a_learner_takes_raw_examples(case: Case, tmp_path: Path) -> None:
    """Cut and normalized as in training, from the card alone; as MLflow's signature has them too."""
    write_model(tmp_path, card(case), case.state)
    learner = Learner.from_folder(tmp_path)
    support, query = raw(case)
    labels = case.batch.support_y[0].numpy()
    answers = learner.adapt(support, labels).predict(query)
    np.testing.assert_allclose(answers, expected(case), rtol=1e-10, atol=1e-10)
    alone = learner.adapt(support, labels).predict(query[:1])
    np.testing.assert_allclose(alone, answers[:1], rtol=1e-10, atol=1e-10)
    of_signature = {spec.name: spec for spec in serving.signature(learner.card).inputs}
    assert of_signature["support_x"].shape == (-1, *np.shape(support)[1:])
    assert of_signature["support_x"].type.kind == np.asarray(support).dtype.kind


def test_kinds_of_inputs_that_a_network_does_not_take_are_refused(tiny_sets: dict[str, Path]) -> None:
    name, variant, _ = plain()[0].values[0]
    text, table = (Case(name, variant, problem, tiny_sets) for problem in OTHER_MODALITIES)
    for case, model, words in (
        (text, {"name": "mlp"}, "mlp takes images and vectors, and task.family: text gives tokens"),
        (text, {"name": "conv4"}, "conv4 takes images, and task.family: text gives tokens"),
        (table, {"name": "text"}, "text takes tokens, and task.family: tabular gives vectors"),
    ):
        content = {**case.experiment.to_dict(), "model": model}
        with pytest.raises(ConfigError, match=f"model.name: {words}"):
            build(type(case.experiment).model_validate(content))


@pytest.fixture(scope="module")
def text_learner(tiny_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Learner:
    case = Case("protonet", {}, "text", tiny_sets)
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, card(case), case.state)
    return Learner.from_folder(folder)


@pytest.fixture(scope="module")
def table_learner(tiny_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Learner:
    case = Case("protonet", {}, "tabular", tiny_sets)
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, card(case), case.state)
    return Learner.from_folder(folder)


@pytest.mark.parametrize(
    ("support", "words"),
    [
        ("one text", "support_x: expected a list of texts, got str"),
        (["good", ""], "support_x: entry 1 is '' and no text"),
        (["good", None], "support_x: entry 1 is None and no text"),
        ([], "support_x: holds no text"),
    ],
)
def test_what_is_no_text_is_refused(text_learner: Learner, support: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        text_learner.adapt(support, ["a", "b"])


ROWS = [
    {"length": 1.0, "width": 2, "colour": "red", "note": "left out"},
    {"length": 3, "width": None, "colour": "blue"},
    {"length": "2.5", "width": "", "colour": "violet"},
]


def adapted(learner: Learner, rows: Any) -> tuple[AdaptedLearner, np.ndarray]:
    made = learner.adapt(rows, ["a", "b", "a"])
    return made, made.predict(rows)


def test_rows_are_arrays_dicts_or_a_data_frame(table_learner: Learner) -> None:
    """A missing value is one however it is written; a category that training did not know is none."""
    pandas = pytest.importorskip("pandas")
    _, by_name = adapted(table_learner, ROWS)
    codes = np.array([[1, 2, 2], [3, np.nan, 0], [2.5, np.nan, np.nan]])
    objects = np.array([[1.0, 2, "red"], [3, None, "blue"], [2.5, np.nan, "violet"]], dtype=object)
    for rows in (codes, objects, pandas.DataFrame(ROWS), torch.from_numpy(codes)):
        np.testing.assert_array_equal(adapted(table_learner, rows)[1], by_name)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"length": 1, "width": 2}] * 3, "has no column 'colour'. The model's columns are: length, width, colour"),
        ([{**ROWS[0], "length": "long"}] * 3, "column 'length' holds 'long', which is no finite number"),
        ([{**ROWS[0], "length": float("inf")}] * 3, "column 'length' holds inf"),
        (np.full((3, 3), np.inf), "infinite values"),
        (np.zeros((3, 2)), "expected rows of 3 columns"),
        (np.zeros((0, 3)), "expected rows of 3 columns"),
    ],
)
def test_rows_that_do_not_fit_are_refused(table_learner: Learner, rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        adapted(table_learner, rows)


def test_data_of_another_family_is_refused(tiny_sets: dict[str, Path]) -> None:
    name, variant, _ = plain()[0].values[0]
    with pytest.raises(DataError, match=r"holds examples of modality vector; .* Choose tabular"):
        Case(name, variant, "text", {"text": tiny_sets["tabular"]})


def test_a_table_is_evaluated_as_its_model_was_trained(tiny_sets: dict[str, Path], table_learner: Learner) -> None:
    """By the statistics of the model's own card; a table without its columns is refused."""
    case = Case("protonet", {}, "tabular", tiny_sets)
    family = case.parts.family
    assert isinstance(family, TabularTasks)
    encoding = family.encoding.model_copy(update={"normalize": "training", "mean": [1.0, 2.0], "variance": [4.0, 0.0]})
    family.use(encoding)
    (support, _), batch = family.rows("meta_train", 0, torch.arange(1), seed=1), case.batch.tasks(slice(0, 1))
    own = family.sample("meta_train", 0, torch.arange(1), seed=1).support_x
    torch.testing.assert_close(own[..., 0], ((support[..., 0] - 1) / 2).clamp(-5, 5))
    assert not torch.equal(own, batch.support_x)
    for columns, words in (
        ([*encoding.columns, Column(name="depth")], "has no column 'depth'"),
        (
            [encoding.columns[0], Column(name="colour"), encoding.columns[1]],
            r"'colour' is categorical \(blue, green, red\) here, and numeric where .* --numeric colour",
        ),
    ):
        with pytest.raises(DataError, match=words):
            family.use(encoding.model_copy(update={"columns": columns}))


def test_another_table_is_matched_by_the_names_of_columns_and_categories(
    tiny_sets: dict[str, Path], table_learner: Learner, tmp_path: Path
) -> None:
    """The same rows with columns and categories in another order, and more of both, give the same answers."""
    manifest = shards.read_manifest(tiny_sets["tabular"])
    columns = [
        Column(name="note", kind="categorical", categories=["a", "b"]),
        Column(name="colour", kind="categorical", categories=["green", "red", "violet", "blue"]),
        *manifest.columns[1::-1],
    ]
    with shards.ShardReader(tiny_sets["tabular"], manifest) as reader:

        def otherwise(number: int) -> Iterator[shards.ClassExamples]:
            for class_id, entry in enumerate(manifest.classes):
                rows = np.asarray(reader.read_class(class_id))
                colours = np.array([3, 0, 1], np.float32)[rows[:, 2].astype(int)]
                colours[:number] = 2  # violet
                note = np.zeros_like(colours)
                shown = np.column_stack([note, colours, rows[:, 1], rows[:, 0]])
                yield shards.ClassExamples(entry.name, entry.group, shown)

        parts = {entry.name: entry.splits["random"] for entry in manifest.classes}
        how: dict[str, Any] = {"splits": {"random": parts}, "source": {}, "preprocessing": {}, "modality": "vector"}
        for name, violet in (("same", 0), ("other", 4)):
            shards.write(tmp_path / name, otherwise(violet), columns=columns, **how)
    shape: dict[str, Any] = {"part": "meta_test", "n_way": 4, "n_query": 3, "episodes": 8}
    own = workflow.evaluate_model(table_learner, data=str(tiny_sets["tabular"]), **shape)
    same, other = (
        workflow.evaluate_model(table_learner, data=str(tmp_path / name), **shape) for name in ("same", "other")
    )
    assert torch.equal(same.evaluation.losses, own.evaluation.losses)
    assert not torch.equal(other.evaluation.losses, own.evaluation.losses)
    assert own.notes == []
    assert same.notes == [
        f"{tmp_path / 'same'}: column 'colour': 1 of its categories were not in training and count as missing (violet)"
    ]
