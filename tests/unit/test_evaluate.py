"""Fixed episodes: what is scored does not depend on how much of the adaptation path is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import class_report, promotion, workflow
from pipeline import experiment as experiments
from pipeline.errors import ConfigError, DataError, TrainingStopped
from pipeline.experiment import Experiment
from pipeline.tasks.classes import ClassTasks
from pipeline.training.ahead import results
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.context import LocalContext
from pipeline.training.evaluate import Estimate, Evaluation, episode_batches, evaluate
from pipeline.training.loop import train
from pipeline.types import Adapted, Algorithm, MetaState, TaskBatch
from tests.faults import experiment, open_run


def test_fewer_steps_are_scored_as_among_all(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(experiment(tmp_path, tiny_data), device=torch.device("cpu"))
    state = parts.algorithm.init(0)

    def scored(**how: Any) -> Evaluation:
        return evaluate(
            parts.algorithm,
            parts.family,
            state,
            split="meta_val",
            seed=1,
            episodes=5,
            data_digest="x",
            chunk=2,
            steps=3,
            **how,
        )

    whole, last = scored(), scored(last_only=True)
    assert whole.scores.shape[2] == 4
    assert last.scores.shape[2] == 1
    assert torch.equal(last.scores[..., 0], whole.scores[..., -1])
    assert torch.equal(last.losses[..., 0], whole.losses[..., -1])
    assert not torch.equal(whole.losses[..., 0], whole.losses[..., -1])

    some = scored(curve_episodes=3)  # in chunks of two: the second one holds an episode of either kind
    assert torch.equal(some.scores[..., -1], whole.scores[..., -1])
    assert torch.equal(some.losses[:3], whole.losses[:3])
    assert some.losses[3:, :, :-1].isnan().all()
    assert some.loss("inductive") == whole.loss("inductive")
    assert some.loss("inductive", 1) == Estimate.of(whole.losses[:3, 0, 1])
    assert some.to_dict()["episodes_before_the_last_step"] == 3


class Diverging:
    """An algorithm whose answers to some episodes are NaN."""

    def __init__(self, algorithm: Algorithm, some: slice) -> None:
        self._algorithm, self._some = algorithm, some

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def predict(self, adapted: Adapted, query_x: torch.Tensor, mode: Any) -> torch.Tensor:
        answers = self._algorithm.predict(adapted, query_x, mode)
        answers[self._some, :, 0] = torch.nan
        return answers


def test_answers_that_are_no_numbers_are_wrong(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no 1/n_way, which argmax makes of NaN; such a model is no champion, and what cannot be evaluated stops."""
    exp = experiment(tmp_path, tiny_data, backend="local", steps=2, validate_every=1)
    parts = experiments.build(exp, device=torch.device("cpu"))
    fixed: dict[str, Any] = {"split": "meta_test", "seed": 1, "episodes": 6, "data_digest": "x", "chunk": None}
    state = parts.algorithm.init(0)
    some: Any = Diverging(parts.algorithm, slice(2, 4))
    plain = evaluate(parts.algorithm, parts.family, state, keep_predictions=True, **fixed)
    told = evaluate(some, parts.family, state, keep_predictions=True, **fixed)
    assert bool((plain.scores[2:4] > 0).any())
    assert not told.scores[2:4].any()
    assert torch.equal(told.scores[4:], plain.scores[4:])
    assert told.predictions is not None
    assert bool((told.predictions.answers[2:4] == -1).all())
    assert isinstance(parts.family, ClassTasks)
    shares = class_report.report(told, parts.family, "inductive").of_class
    assert shares.hits.sum() / shares.chances.sum() == pytest.approx(told.score("inductive").mean)
    content = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert content["inductive"][-1]["loss"] is None
    assert content["inductive"][-1]["mean"] == told.score("inductive").mean

    card: Any = SimpleNamespace(data_digest="x")
    candidate: Any = SimpleNamespace(state=state, algorithm=some, card=card)
    chosen = promotion.decide(candidate, None, parts.family, episodes=6, chunk=None, device=torch.device("cpu"))
    assert (chosen.promote, chosen.reason) == (False, "its answers are not finite in some episodes")

    run = open_run(exp)
    monkeypatch.setattr(experiments, "build", lambda *_, **__: parts._replace(algorithm=some))
    train(LocalContext(), exp, run)
    assert run.checkpoints.best() is None
    with pytest.raises(TrainingStopped, match=r"in no validation were all losses finite.*Lower algorithm\.inner_lr"):
        workflow.evaluate_run(exp, run, parts, None, "x")  # type: ignore[arg-type]


def test_a_best_checkpoint_that_was_removed_is_no_divergence(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = experiment(tmp_path, tiny_data, backend="local", steps=2, validate_every=1)
    run = open_run(exp)
    train(LocalContext(), exp, run)
    latest = run.checkpoints.latest()
    monkeypatch.setattr(CheckpointStore, "best", lambda _: None)
    meta = CheckpointStore.meta
    monkeypatch.setattr(CheckpointStore, "meta", lambda self, step: {**meta(self, step), "best_step": 1})
    assert workflow.best_checkpoint(run)[0] == latest
    monkeypatch.setattr(workflow, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(pytest.fail.Exception, match="evaluated"):
        workflow.evaluate_run(exp, run, experiments.build(exp, device=torch.device("cpu")), None, "x")  # type: ignore[arg-type]


def test_episodes_that_memory_does_not_hold_are_scored_in_smaller_chunks(tiny_data: Path, tmp_path: Path) -> None:
    parts = experiments.build(experiment(tmp_path, tiny_data), device=torch.device("cpu"))
    state, sizes = parts.algorithm.init(0), []

    class Small:
        """Holds two episodes at once."""

        def __getattr__(self, name: str) -> Any:
            return getattr(parts.algorithm, name)

        def adaptation_path(self, state: MetaState, x: torch.Tensor, *rest: Any, **how: Any) -> Iterator[Adapted]:
            sizes.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return parts.algorithm.adaptation_path(state, x, *rest, **how)

    def scored(algorithm: Any) -> Evaluation:
        how: dict[str, Any] = {"split": "meta_val", "seed": 1, "episodes": 7, "data_digest": "x", "chunk": 5}
        return evaluate(algorithm, parts.family, state, keep_predictions=True, **how)

    most = 2
    small, whole = scored(Small()), scored(parts.algorithm)
    assert sizes == [5, 2, 2, 2, 1]
    torch.testing.assert_close(small.losses, whole.losses)
    assert small.predictions is not None
    assert len(small.predictions.answers) == 7
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        scored(Small())


def read_from_a_disk(folder: Path, data: Path, **task: object) -> Experiment:
    content = experiment(folder, data).to_dict()
    content["task"] |= {"memory_limit_mb": 0, "n_way": 3, "window": {"classes": 4, "steps": 2, "eval_episodes": 3}}
    content["task"] |= task
    return experiments.from_dict(content, source="test")


def test_episodes_are_read_while_the_ones_before_them_are_evaluated(tiny_data: Path, tmp_path: Path) -> None:
    """Each chunk waits here until the next one is being drawn, so nothing but that lets it go on."""
    parts = experiments.build(read_from_a_disk(tmp_path, tiny_data), device=torch.device("cpu"))
    in_memory = experiments.build(
        read_from_a_disk(tmp_path, tiny_data, memory_limit_mb=100), device=torch.device("cpu")
    )
    state, chunks = parts.algorithm.init(0), ([0, 1], [2, 3], [4, 5], [6])
    began = {chunk[0]: threading.Event() for chunk in chunks}
    seen, others = [], []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(parts.family, name)

        def sample(self, split: Any, step: int, slots: torch.Tensor, **how: Any) -> TaskBatch:
            began[int(slots[0])].set()
            others.append(threading.current_thread() is not threading.main_thread())
            return parts.family.sample(split, step, slots, **how)

    class Evaluated:
        def __getattr__(self, name: str) -> Any:
            return getattr(parts.algorithm, name)

        def adaptation_path(self, *given: Any, **how: Any) -> Iterator[Adapted]:
            following = chunks[min(len(seen) + 1, 3)][0]
            seen.append(began[following].wait(60))
            return parts.algorithm.adaptation_path(*given, **how)

    def scored(algorithm: Any, family: Any) -> Evaluation:
        how: dict[str, Any] = {"split": "meta_val", "seed": 1, "episodes": 7, "data_digest": "x", "chunk": 2}
        return evaluate(algorithm, family, state, **how)

    ours = scored(Evaluated(), Watched())
    assert seen == [True] * 4
    assert others == [True] * 4
    assert torch.equal(ours.losses, scored(parts.algorithm, in_memory.family).losses)


def test_what_cannot_be_read_ahead_stops_whoever_asks_for_it() -> None:
    taken, done = [], []

    def call(number: int) -> int:
        if number == 2:
            raise DataError("shard 2")
        return number

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(4):
            taken.append((number, len(done)))
            yield partial(call, number)

    waits: list[float] = []
    found = results(calls(), ahead=True, waited=waits.append)
    for result in (0, 1):
        assert next(found) == result
        done.append(result)
    with pytest.raises(DataError, match="shard 2"):
        next(found)
    assert taken == [(0, 0), (1, 0), (2, 1), (3, 2)]  # one before it is needed, and none earlier
    assert len(waits) == 2
    assert list(results([], ahead=True)) == []
    ahead = results([partial(call, 5), partial(call, 2)], ahead=True)
    assert next(ahead) == 5
    ahead.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def varying(folder: Path, data: Path, **training: object) -> Experiment:
    content = experiment(folder, data, **{"backend": "local", "steps": 3, "validate_every": 3, **training}).to_dict()
    content["model"] = {"name": "mlp", "hidden": [8]}
    content["task"] |= {"n_query": 3, "eval_n_query": 3, "variable": {"least_n_way": 2, "evaluation": True}}
    return experiments.from_dict(content, source="test")


def test_episodes_of_many_shapes_are_scored_one_by_one(tiny_data: Path, tmp_path: Path) -> None:
    """Each as it is alone, whatever the chunk; what an episode does not have is no answer."""
    parts = experiments.build(varying(tmp_path, tiny_data), device=torch.device("cpu"))
    state = parts.algorithm.init(0)

    def scored(chunk: int, **how: Any) -> Evaluation:
        return evaluate(
            parts.algorithm,
            parts.family,
            state,
            split="meta_test",
            seed=1,
            episodes=9,
            data_digest="x",
            chunk=chunk,
            keep_predictions=True,
            **how,
        )

    ours, others = scored(4), scored(1)
    assert torch.equal(ours.scores, others.scores)
    assert torch.equal(ours.losses, others.losses)
    assert ours.predictions is not None
    classes, labels, answers = ours.predictions
    batches = dict(
        (int(slots), batch)
        for slots, batch in episode_batches(parts.family, "meta_test", torch.arange(9), seed=1, chunk=None)
    )
    assert len({batch.num_classes for batch in batches.values()}) > 1
    assert len({batch.support_x.shape for batch in batches.values()}) > 3
    for slot, batch in batches.items():
        there = labels[slot] >= 0
        assert torch.equal(labels[slot][there].long(), batch.query_y[0])
        assert batch.classes is not None
        assert torch.equal(classes[slot][classes[slot] >= 0].long(), batch.classes[0])
        right = (answers[slot][:, there] == labels[slot][there]).double().mean(1)
        torch.testing.assert_close(right, ours.scores[slot, :, -1])


def test_training_on_many_shapes(tiny_data: Path, tmp_path: Path) -> None:
    """Planned for the largest; no compiled program is for all of them."""
    exp = varying(tmp_path, tiny_data, memory_budget="40 MB")
    run = open_run(exp)
    train(LocalContext(), exp, run)
    assert run.checkpoints.latest() == 3
    with pytest.raises(ConfigError, match=r"training\.compile: .*shape"):
        experiments.check_fits(varying(tmp_path, tiny_data, compile=True))
