"""What every task family of the registry must do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import validate
from pipeline.errors import DataError
from pipeline.tasks import TASK_FAMILIES
from pipeline.types import SPLITS, TaskBatch, TaskFamily

SMALL = {"n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "in-memory": {"n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4},
        "memory-mapped": {"n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4, "memory_limit_mb": 0},
        "rotations-as-classes": {"n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4, "rotations": "new_classes"},
        "rotations-per-class": {"n_way": 4, "k_shot": 2, "n_query": 3, "eval_n_query": 4, "rotations": "per_class"},
        "augmented": {
            "n_way": 4,
            "k_shot": 2,
            "n_query": 3,
            "eval_n_query": 4,
            "augmentation": {"crop_padding": 2, "rotation": 20, "flip": 0.5, "brightness": 0.3, "erasing": 0.5},
        },
        "variable": {"n_way": 5, "n_query": 3, "eval_n_query": 4, "variable": {"least_n_way": 2, "evaluation": True}},
        "variable-mapped": {
            "n_way": 5,
            "n_query": 3,
            "eval_n_query": 4,
            "variable": {"least_n_way": 3, "most_support": 9},
            "rotations": "per_class",
            "memory_limit_mb": 0,
        },
    },
    "mixture": {
        "images": {
            "sets": [
                {"name": "few", "task": {"family": "images", "n_way": 3, "n_query": 2, "eval_n_query": 2}},
                {
                    "name": "turned",
                    "weight": 2,
                    "task": {"family": "images", "n_query": 3, "eval_n_query": 3, "rotations": "new_classes"},
                },
            ]
        },
        "functions": {
            "sets": [
                {"name": "waves", "task": {"family": "sinusoid"}},
                {"name": "lines", "task": {"family": "regression", "function": "linear"}},
            ]
        },
    },
    "regression": {
        "linear": {"function": "linear", "num_inputs": 3, "num_outputs": 2, "noise": 0.1},
        "step": {"function": "step", "test_ranges": {"level": [3, 5]}},
    },
    "sinusoid": {"default": {"k_shot": 6, "n_query": 7}},
    "tabular": {
        "in-memory": SMALL,
        "memory-mapped": {**SMALL, "memory_limit_mb": 0},
        "by-training": {**SMALL, "normalize": "training"},
        "variable": {"n_way": 5, "n_query": 3, "eval_n_query": 4, "variable": {"least_n_way": 2, "evaluation": True}},
    },
    "text": {
        "in-memory": {**SMALL, "tokens": {"max_tokens": 24}},
        "memory-mapped": {**SMALL, "tokens": {"max_tokens": 24}, "memory_limit_mb": 0},
        "variable-mapped": {
            "n_way": 5,
            "n_query": 3,
            "eval_n_query": 4,
            "variable": {"least_n_way": 3, "most_support": 9},
            "memory_limit_mb": 0,
        },
    },
}


def names() -> list[str]:
    return [config.model_fields["family"].annotation.__args__[0] for config in TASK_FAMILIES]


def build(
    name: str, options: dict[str, Any], data: Path | dict[str, Path], dtype: torch.dtype = torch.float32
) -> TaskFamily:
    config = next(c for c in TASK_FAMILIES if c.model_fields["family"].annotation.__args__[0] == name)
    places = data if isinstance(data, dict) else {"images": data}

    def placed(task: dict[str, Any]) -> dict[str, Any]:
        family = task["family"]
        return {**task, "data": places[family], "split": "random"} if family in places else task

    content = placed({"family": name, **options})
    if "sets" in content:
        content["sets"] = [{**part, "task": placed(part["task"])} for part in content["sets"]]
    return validate(config, content, source="contract").build(device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(params=[pytest.param((n, o), id=f"{n}-{case}") for n in CASES for case, o in CASES[n].items()])
def family(request: pytest.FixtureRequest, tiny_sets: dict[str, Path]) -> TaskFamily:
    return build(*request.param, tiny_sets)


def equal(a: TaskBatch, b: TaskBatch) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_family_is_covered() -> None:
    assert set(names()) == set(CASES)


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_and_types(family: TaskFamily, split: Any) -> None:
    slots, *_ = family.alike(split, torch.arange(5))
    batch, tasks = family.sample(split, 3, slots, seed=0), len(slots)
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        assert x.shape[0] == tasks
        assert x.shape[2:] == family.input_shape
        assert y.shape[:2] == x.shape[:2]
        assert x.dtype == (torch.int64 if family.inputs == "tokens" else torch.float32)
        assert bool(x.isfinite().all())
    assert batch.keys is not None
    assert batch.keys.dtype == torch.int64
    assert len(batch.keys.unique()) == tasks
    if family.train_classes is None:
        assert batch.classes is None
    else:
        assert batch.num_classes is not None
        assert int(batch.query_y.max()) == batch.num_classes - 1
        assert (
            0
            <= int(batch.classes.min())
            <= int(batch.classes.max())
            < (family.train_classes if split == "meta_train" else 99)
        )
    outputs = torch.zeros(tasks, batch.query_y.shape[1], family.num_outputs)
    assert family.objective.loss(outputs, batch.query_y).shape == (tasks,)
    assert family.objective.score(outputs, batch.query_y).shape == (tasks,)


def test_an_episode_depends_on_seed_split_step_and_slot_only(family: TaskFamily) -> None:
    """Any share of the slots, in any order, gives the same episodes; no global random number is used."""
    before = torch.random.get_rng_state()
    whole = family.sample("meta_train", 7, torch.arange(6), seed=1)
    share = family.sample("meta_train", 7, torch.tensor([5, 1]), seed=1)
    assert equal(share, whole.tasks(torch.tensor([5, 1])))
    torch.manual_seed(123)
    assert equal(family.sample("meta_train", 7, torch.arange(6), seed=1), whole)
    torch.random.set_rng_state(before)


def test_episodes_of_steps_in_a_row_are_those_of_each_step(family: TaskFamily) -> None:
    """A family may draw several steps at once; whatever is asked for in between, or again, changes no episode."""
    slots, others = torch.tensor([3, 0, 8]), torch.tensor([1, 2])
    asked: list[tuple[Any, int, torch.Tensor, int]] = [("meta_train", step, slots, 0) for step in range(5, 10)]
    asked += [
        ("meta_val", 10, family.alike("meta_val", slots)[0], 0),
        ("meta_train", 10, slots, 0),
        ("meta_train", 11, others, 0),
    ]
    asked += [("meta_train", 11, slots, 1), ("meta_train", 12, slots, 1), ("meta_train", 13, slots, 1)]
    asked += [("meta_train", 4000, slots, 1), ("meta_train", 4001, slots, 1), ("meta_train", 12, slots, 1)]
    for split, step, numbers, seed in asked:
        each = [one(family, split, step, slot, seed) for slot in numbers]
        alone = TaskBatch(*(None if part[0] is None else torch.cat(part) for part in zip(*each, strict=True)))
        assert equal(family.sample(split, step, numbers, seed=seed), alone), (split, step, seed)


def one(family: TaskFamily, split: Any, step: int, slot: torch.Tensor, seed: int) -> TaskBatch:
    """One episode, drawn by itself by a family that has drawn nothing before."""
    fresh = type(family)(family.config, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[call-arg, attr-defined]
    return fresh.sample(split, step, slot.view(1), seed=seed)


def test_seeds_splits_steps_and_slots_differ(family: TaskFamily) -> None:
    slot = torch.tensor([0])
    draws = [
        family.sample("meta_train", 0, slot, seed=0),
        family.sample("meta_train", 0, slot, seed=1),
        family.sample("meta_train", 1, slot, seed=0),
        family.sample("meta_train", 0, torch.tensor([1]), seed=0),
    ]
    assert not any(equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_the_largest_shape_holds_every_other(family: TaskFamily) -> None:
    """What memory is planned by."""
    largest = family.largest(2, seed=1)
    shapes = set()
    for step in range(30):
        batch = family.sample("meta_train", step, torch.arange(2), seed=1)
        shapes.add((batch.num_classes, batch.support_x.shape[1], batch.query_x.shape[1]))
        assert batch.support_x.shape[1] <= largest.support_x.shape[1]
        assert batch.query_x.shape[1] <= largest.query_x.shape[1]
        assert (batch.num_classes or 0) <= (largest.num_classes or 0)
    assert (len(shapes) > 1) == family.variable_shapes


@pytest.mark.parametrize("split", SPLITS)
def test_slots_that_are_alike_are_all_there_once(family: TaskFamily, split: Any) -> None:
    groups = family.alike(split, torch.tensor([4, 1, 9]))
    assert sorted(torch.cat(groups).tolist()) == [1, 4, 9]
    for group in groups:
        whole = family.sample(split, 0, group, seed=2)
        assert equal(whole.tasks(slice(0, 1)), family.sample(split, 0, group[:1], seed=2))


def test_images_come_from_the_right_classes(tiny_data: Path) -> None:
    """Support and query of one label are one class's images, and no image is in both."""
    family = build("images", CASES["images"]["in-memory"], tiny_data)
    mapped = build("images", CASES["images"]["memory-mapped"], tiny_data)
    batch = family.sample("meta_train", 0, torch.arange(8), seed=0)
    assert equal(batch, mapped.sample("meta_train", 0, torch.arange(8), seed=0))
    assert (family.prefetch, mapped.prefetch) == (False, True)
    support = batch.support_x.unflatten(1, (4, 2)).flatten(3)
    query = batch.query_x.unflatten(1, (4, 3)).flatten(3)
    for episode, label in itertools.product(range(8), range(4)):
        distances = torch.cdist(query[episode, label], support[episode].flatten(0, 1))
        assert bool((distances.argmin(1) // 2 == label).all())  # the class's pattern outweighs its noise
        assert float(distances.min()) > 0


def test_rotations_train_only_and_turn_whole_images(tiny_data: Path) -> None:
    plain = build("images", CASES["images"]["in-memory"], tiny_data)
    turned = build("images", CASES["images"]["rotations-per-class"], tiny_data)
    slots = torch.arange(8)
    assert equal(turned.sample("meta_val", 0, slots, seed=0), plain.sample("meta_val", 0, slots, seed=0))
    a = plain.sample("meta_train", 0, slots, seed=0).support_x
    b = turned.sample("meta_train", 0, slots, seed=0).support_x
    turns = [
        next(k for k in range(4) if torch.equal(torch.rot90(x, k, dims=(-2, -1)), y))
        for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    ]
    assert set(turns) == {0, 1, 2, 3}
    assert turns[::2] == turns[1::2]  # one turn per class and task


def test_rotations_as_classes_make_four_of_each(tiny_data: Path) -> None:
    options = {**CASES["images"]["rotations-as-classes"], "n_way": 4}
    batch = build("images", options, tiny_data).sample("meta_train", 0, torch.arange(40), seed=0)
    plain = build("images", {**options, "rotations": "none"}, tiny_data)
    upright = plain.sample("meta_train", 0, torch.arange(200), seed=0).support_x.flatten(0, 1)
    pictures = {picture.numpy().tobytes() for picture in upright}
    seen = [picture.numpy().tobytes() in pictures for picture in batch.support_x.flatten(0, 1)]
    assert 0.1 < sum(seen) / len(seen) < 0.45  # a quarter of the classes stand upright


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_way": 9}, "n_way=9"),
        ({"n_way": 3, "k_shot": 7}, "task.k_shot=7"),
        ({"n_way": 3, "eval_n_query": 8}, "task.eval_n_query=8"),
        ({"n_way": 3, "split": "alphabet"}, "has no class split 'alphabet'"),
    ],
)
def test_too_small_data_sets_are_refused(tiny_data: Path, options: dict, words: str) -> None:
    content = {"family": "images", "data": tiny_data, "split": "random", "n_query": 2, "eval_n_query": 2, **options}
    config = validate(TASK_FAMILIES[0], content, source="test")
    with pytest.raises(DataError, match=words):
        config.build(device=torch.device("cpu"), dtype=torch.float32)


def test_sinusoid_points_lie_on_sinusoids_within_the_papers_ranges() -> None:
    family = build("sinusoid", {"k_shot": 50, "n_query": 50}, Path(), dtype=torch.float64)
    batch = family.sample("meta_train", 0, torch.arange(200), seed=0)
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    basis = torch.cat([torch.sin(x), torch.cos(x)], dim=-1)  # A·sin(x − φ) = A cos φ · sin x − A sin φ · cos x
    solution = torch.linalg.lstsq(basis, y).solution
    assert float((basis @ solution - y).abs().max()) < 1e-10
    amplitude = solution.norm(dim=1).squeeze()
    phase = torch.atan2(-solution[:, 1, 0], solution[:, 0, 0])
    assert 0.1 <= float(amplitude.min()) < 0.5
    assert 4.6 < float(amplitude.max()) <= 5.0
    assert 0 <= float(phase.min()) < 0.2
    assert 2.9 < float(phase.max()) <= torch.pi
    assert 4.9 < float(x.abs().max()) <= 5.0
