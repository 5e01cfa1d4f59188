"""What is told of an adaptation: how far each layer moves for each task, and the rates that were learned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline import movement, pictures
from pipeline.movement import Movement
from pipeline.tasks.shapes import OneShape
from pipeline.training import journal, loop
from pipeline.training.context import LocalContext
from pipeline.training.evaluate import SELECTION_SEED
from pipeline.types import Adapted, MetaState, Params
from tests.faults import experiment, open_run


class Walk:
    """An algorithm whose layers move by known amounts: `a` by its slot's number and the step, `b` not at all."""

    eval_steps = 2

    def adaptation_path(
        self, state: MetaState, support_x: Tensor, support_y: Tensor, *, steps: int, **_: Any
    ) -> Iterator[Adapted]:
        slots = support_x[:, 0, 0]
        for step in range(steps + 1):
            params: Params = {
                "a.weight": torch.tensor([3.0, 0.0]).expand(len(slots), 2) + step * slots.unsqueeze(1) * torch.ones(2),
                "a.bias": torch.tensor([4.0]).expand(len(slots), 1),
                "b": torch.ones(len(slots), 2, 2),
                "zero.bias": torch.zeros(len(slots), 3) + step,
            }
            yield Adapted(params, None)


class Slots(OneShape):
    """A family whose inputs are the slots' numbers."""

    prefetch = False

    def sample(self, split: str, step: int, slots: Tensor, *, seed: int, weights: Tensor | None = None) -> Any:
        assert (split, step, seed) == ("meta_val", 0, SELECTION_SEED)

        class Batch:
            support_x = slots.view(-1, 1, 1).float()
            support_y = slots.view(-1, 1)
            num_classes = None

        return Batch


def walk(**settings: Any) -> Movement:
    moved = movement.measure(Walk(), Slots(), MetaState({}, {}), **settings)  # type: ignore[arg-type]
    assert moved is not None
    return moved


def test_relative_movement_by_layer_step_and_task() -> None:
    moved = walk(episodes=5)
    assert moved.layers == ["a", "b", "zero"]
    assert moved.relative.shape == (3, 3, 5)
    for step in range(3):
        for task in range(5):
            # (3, 0, 4) has length 5; two of the three numbers move by step · task
            assert float(moved.relative[step, 0, task]) == pytest.approx(step * task * math.sqrt(2) / 5)
            assert float(moved.relative[step, 1, task]) == 0
            assert float(moved.distances[step, 2, task]) == pytest.approx(step * math.sqrt(3))


def test_episodes_may_be_adapted_in_chunks() -> None:
    whole, pieces = walk(episodes=5), walk(episodes=5, chunk=2)
    torch.testing.assert_close(whole.relative, pieces.relative, rtol=0, atol=0, equal_nan=True)


def test_numbers_for_people() -> None:
    moved = walk(episodes=5)
    content = json.loads(json.dumps(moved.to_dict(), allow_nan=False))
    assert content["episodes"] == 5
    a, zero = content["layers"]["a"], content["layers"]["zero"]
    assert a["mean"] == pytest.approx([0, 2 * math.sqrt(2) / 5, 4 * math.sqrt(2) / 5])
    assert a["standard_deviation"][2] == pytest.approx(2 * math.sqrt(2.5) * math.sqrt(2) / 5)
    assert a["episodes"] == pytest.approx([2 * task * math.sqrt(2) / 5 for task in range(5)])
    assert zero["mean"] == [None] * 3  # 0 / 0, and a number / 0
    assert zero["mean_distance"] == pytest.approx([0, math.sqrt(3), 2 * math.sqrt(3)])
    assert moved.metrics() == {"movement/a": pytest.approx(4 * math.sqrt(2) / 5), "movement/b": 0.0}


def test_no_steps_no_movement() -> None:
    metric = Walk()
    metric.eval_steps = 0
    assert movement.measure(metric, Slots(), MetaState({}, {})) is None  # type: ignore[arg-type]


def test_anil_moves_the_head_alone(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(
        algorithm(experiment(tmp_path, tiny_data), name="anil", inner_lr=0.1, adaptation_steps=2),
        device=torch.device("cpu"),
    )
    moved = movement.measure(parts.algorithm, parts.family, parts.algorithm.init(0), episodes=3)
    assert moved is not None
    assert moved.layers[-1] == "head", "in the network's order"
    last = dict(zip(moved.layers, moved.relative[-1], strict=True))
    assert bool((last.pop("head") > 0).all())
    assert all(bool((value == 0).all()) for value in last.values())


def test_any_movement_has_a_picture(tmp_path: Path) -> None:
    pictures.movement(walk(episodes=4), tmp_path / "movement.png")
    assert (tmp_path / "movement.png").read_bytes().startswith(b"\x89PNG")
    many = Movement([f"layer{i}" for i in range(40)], torch.rand(12, 40, 3), torch.rand(12, 40, 3))
    pictures.movement(many, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_rates_have_a_picture_where_there_are_any(tmp_path: Path) -> None:
    by_step = {"rate/a.weight/step1": 0.1, "rate/a.weight/step2": -0.2, "rate/b/step1": 0.3, "rate/b/step2": 0.4}
    layers, steps, rates = pictures.rate_table(by_step | {"affine/a": 1.0}) or ([], [], None)
    assert (layers, steps) == (["a.weight", "b"], ["step1", "step2"])
    assert rates.tolist() == [[0.1, -0.2], [0.3, 0.4]]
    assert pictures.rate_table({"affine/a": 1.0}) is None
    for number, described in enumerate([by_step, {"rate/a.weight": 0.0}, {"rate/a": 1e-3, "negative_rates/a": 0.5}]):
        pictures.learned_rates(described, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    pictures.learned_rates({"affine/a": 1.0}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def algorithm(exp: experiments.Experiment, **keys: Any) -> experiments.Experiment:
    return experiments.from_dict({**exp.to_dict(), "algorithm": keys}, source="test")


def test_validations_log_what_was_learned(tiny_data: Path, tmp_path: Path) -> None:
    exp = algorithm(experiment(tmp_path, tiny_data, backend="local"), name="meta_sgd")
    run = open_run(exp)
    loop.train(LocalContext(), exp, run)
    records = journal.read(run.journal)
    assert any("learned/rate/head.weight" in record for record in records)
    for record in records:
        assert ("learned/rate/head.weight" in record) == ("val_accuracy_inductive" in record)
    rates = run.checkpoints.load_meta(exp.training.steps).params["meta_sgd/rate/head.weight"]
    assert records[-1]["learned/rate/head.weight"] == pytest.approx(float(rates.mean()))


def test_the_algorithms_own_quantities_by_outer_step(tmp_path: Path) -> None:
    common = {"time": 1, "meta_loss": 0.5, "train_accuracy": 0.5, "tasks_per_second": 9.0, "outer_lr": 1.0}
    records: list[dict[str, Any]] = [{"step": step, **common, "cg_residual": 1 / step} for step in (1, 2)]
    records[1] |= {"val_accuracy_inductive": 0.3, "learned/rate/a": 0.1, "learned/rate/b": 0.2, "learned/lambda": 2.0}
    assert pictures.own_quantities(records) == {
        "cg_residual": {"": [(1, 1.0), (2, 0.5)]},
        "rate": {"a": [(2, 0.1)], "b": [(2, 0.2)]},
        "lambda": {"": [(2, 2.0)]},
    }
    pictures.over_training(records, tmp_path / "own.png")
    assert (tmp_path / "own.png").stat().st_size > 1000
    pictures.over_training([{"step": 1, **common}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
