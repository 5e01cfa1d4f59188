"""Real processes over gloo: what one rank sees the others do. The same parameters with any number of them, and faults:
test_faults.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import experiment as experiments
from pipeline.errors import TrainingStopped
from pipeline.experiment import Experiment
from pipeline.training import journal
from pipeline.training.context import Context, LocalContext, run_processes
from pipeline.training.evaluate import SELECTION_SEED, evaluate
from pipeline.training.loop import train_worker
from pipeline.training.plan import Plan
from pipeline.training.step import global_gradient, slots_of_rank
from pipeline.types import MetaState
from tests.faults import difference, experiment, final_params, open_run, run_to_end

pytestmark = pytest.mark.distributed


WITH_FEW = {"split": "meta_val", "seed": SELECTION_SEED, "data_digest": "", "chunk": 2}


def what_one_of_three_sees(context: Context, content: dict, folder: str) -> None:
    """Of the first step, of that step with a NaN in rank 1's tasks, and of two evaluations."""
    exp = experiments.from_dict(content, source="test")
    parts = experiments.build(exp, device=context.device)
    state: MetaState = parts.algorithm.init(0)
    slots = slots_of_rank(context, exp.training.meta_batch_size)
    batch = parts.family.sample("meta_train", 0, slots, seed=exp.seed)
    loss = global_gradient(context, parts.algorithm, state, batch, step=0, chunk=None).metrics["meta_loss"]
    if context.rank == 1:
        batch = batch._replace(query_x=batch.query_x * float("nan"))
    spoilt = global_gradient(context, parts.algorithm, state, batch, step=0, chunk=None)
    seven, two = (
        evaluate(parts.algorithm, parts.family, state, episodes=episodes, context=context, **WITH_FEW)
        for episodes in (7, 2)
    )
    seen = {"loss": loss, "finite": spoilt.finite, "seven": seven.scores, "two": two.scores}
    torch.save(seen, f"{folder}/{context.rank}")


@pytest.fixture(scope="module")
def of_three(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks has seen, in float32."""
    folder = tmp_path_factory.mktemp("three")
    exp = experiment(folder, tiny_data, dtype="float32")
    run_processes(what_one_of_three_sees, exp.to_dict(), str(folder), num_workers=3)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(3)]


def test_first_loss_in_float32_agrees_across_workers(of_three: list, tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, tiny_data, dtype="float32")
    parts = experiments.build(exp, device=torch.device("cpu"))
    batch = parts.family.sample("meta_train", 0, torch.arange(exp.training.meta_batch_size), seed=exp.seed)
    alone = global_gradient(LocalContext(), parts.algorithm, parts.algorithm.init(0), batch, step=0, chunk=None)
    loss = float(alone.metrics["meta_loss"])
    assert all(abs(float(seen["loss"]) - loss) <= 1e-6 * abs(loss) for seen in of_three)


def test_nan_on_one_rank_is_seen_by_all(of_three: list) -> None:
    assert [seen["finite"] for seen in of_three] == [False] * 3


def test_every_rank_gets_every_episode_also_where_there_are_fewer_than_ranks(of_three: list) -> None:
    for name, episodes in (("seven", 7), ("two", 2)):
        scores = [seen[name] for seen in of_three]
        assert scores[0].shape[:2] == (episodes, 2)
        assert all(torch.equal(scores[0], other) for other in scores)


def test_a_lost_worker_ends_the_others_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="worker 1 ended with exit code 7"):
        run_processes(one_leaves, num_workers=2)


def one_leaves(context: Context) -> None:
    if context.rank == 1:
        os._exit(7)
    context.all_reduce(torch.zeros(1))


def with_a_small_gpu(context: Context, content: dict, run_path: str) -> None:
    """Rank 1 has room for two tasks, and none for the native kernels."""
    from pipeline.algorithms.maml import MAML
    from pipeline.kernels import native

    meta_grad = MAML.meta_grad

    def small(self, state, batch, *, step):  # type: ignore[no-untyped-def]
        if context.rank == 1 and len(batch.support_x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return meta_grad(self, state, batch, step=step)

    MAML.meta_grad = small  # type: ignore[method-assign]
    if context.rank == 1:
        native.why_not = lambda: "there is no C++ compiler"  # type: ignore[assignment]
    train_worker(context, content, run_path)


def test_all_ranks_compute_as_the_least_of_them_can(tiny_data: Path, tmp_path: Path) -> None:
    def wide(name: str, **settings: object) -> Experiment:
        exp = experiment(tmp_path / name, tiny_data, steps=6, validate_every=3, num_workers=2, **settings)
        content = exp.to_dict()
        content["model"]["hidden"] = 16  # as the native kernels ask for
        return experiments.from_dict(content, source="test")

    expected = run_to_end(wide("expected", task_chunk=2, kernel="closed"))
    exp = wide("small", task_chunk=4, kernel="auto")
    run = open_run(exp)
    run_processes(with_a_small_gpu, exp.to_dict(), str(run.path), num_workers=2)
    assert run.checkpoints.load(6)["plan"] == Plan("closed", "float32", None, 2)._asdict()
    assert [record.get("task_chunk") for record in journal.read(run.journal)] == [2.0] + 5 * [None]
    assert difference(final_params(run), final_params(expected)) <= 1e-10
