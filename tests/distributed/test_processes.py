"""Real processes over gloo: any number of workers gives the same parameters; a killed run resumes bit-identically."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import experiment as experiments
from pipeline import launch, runs
from pipeline.errors import TrainingStopped
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.training import journal
from pipeline.training.context import Context, run_processes
from pipeline.training.evaluate import SELECTION_SEED, evaluate
from pipeline.training.loop import train_worker
from pipeline.training.plan import Plan
from pipeline.training.step import global_gradient, slots_of_rank
from pipeline.types import MetaState
from tests.faults import (
    DRIVER,
    assert_same_end,
    difference,
    experiment,
    final_params,
    open_run,
    reached,
    run_to_end,
    wait_until,
    worker_processes,
)

pytestmark = pytest.mark.distributed


def test_any_number_of_workers_gives_the_same_parameters(tiny_data: Path, tmp_path: Path) -> None:
    """W = 1, 2, 3, 4 after 20 steps of Adam in float64, with shares as unequal as 3, 3, 2: ≤ 1e-10 relative."""
    reference = run_to_end(experiment(tmp_path / "1", tiny_data, num_workers=1))
    for workers, chunk in ((2, None), (3, 2), (4, 1)):
        run = run_to_end(experiment(tmp_path / str(workers), tiny_data, num_workers=workers, task_chunk=chunk))
        for name, value in final_params(reference).items():
            other = final_params(run)[name]
            assert float((other - value).norm() / value.norm()) <= 1e-10, (workers, name)
        ours, theirs = journal.read(run.path / "metrics.jsonl"), journal.read(reference.path / "metrics.jsonl")
        key = "val_accuracy_inductive"
        assert [r[key] for r in ours if key in r] == [r[key] for r in theirs if key in r]


def first_step_loss(context: Context, content: dict, file: str) -> None:
    exp = experiments.from_dict(content, source="test")
    parts = experiments.build(exp, device=context.device)
    slots = slots_of_rank(context, exp.training.meta_batch_size)
    batch = parts.family.sample("meta_train", 0, slots, seed=exp.seed)
    gradient = global_gradient(context, parts.algorithm, parts.algorithm.init(0), batch, step=0, chunk=None)
    evaluation = evaluate(
        parts.algorithm,
        parts.family,
        parts.algorithm.init(0),
        split="meta_val",
        seed=SELECTION_SEED,
        episodes=7,
        data_digest="",
        chunk=2,
        context=context,
    )
    assert evaluation.scores.shape == (7, 2, 3)  # every rank gets every episode
    if context.rank == 0:
        torch.save(gradient.metrics["meta_loss"], file)


def test_first_loss_in_float32_agrees_across_workers(tiny_data: Path, tmp_path: Path) -> None:
    losses = []
    for workers in (1, 3):
        exp = experiment(tmp_path, tiny_data, num_workers=workers, dtype="float32")
        file = str(tmp_path / f"loss-{workers}")
        run_processes(first_step_loss, exp.to_dict(), file, num_workers=workers)
        losses.append(float(torch.load(file, weights_only=True)))
    assert abs(losses[0] - losses[1]) <= 1e-6 * abs(losses[0])


def test_killed_and_resumed_is_bit_identical(tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver in the middle; its workers end too; the same command again; nothing differs at the end."""
    import yaml

    def config_file(name: str) -> Path:
        exp = experiment(tmp_path / name, tiny_data, num_workers=2, steps=60, dtype="float32")
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(exp.to_dict()))
        return file

    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    undisturbed = run_to_end(experiments.load(config_file("undisturbed")))

    command = [sys.executable, str(script), str(config_file("killed"))]
    killed = RunFolder(tmp_path / "killed" / "images" / "001")
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: reached(killed, 20), watch=driver)
    workers = worker_processes(driver.pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # they do not outlive their driver
    assert not reached(killed, 60)

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == "resumed"
    assert_same_end(killed, undisturbed)


def test_nonfinite_steps_are_skipped_by_all_ranks_and_then_stop_the_run(tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, tiny_data, num_workers=2, dtype="float32", max_nonfinite_steps=3)
    exp = exp.model_copy(update={"algorithm": exp.algorithm.model_copy(update={"inner_lr": 1e30})})
    run, _ = runs.open_run(exp, data_digest=experiments.check_fits(exp))
    with pytest.raises(TrainingStopped, match="not finite 3 times in a row"):
        launch.run_workers(exp, run)


def nan_on_one_rank(context: Context, content: dict, folder: str) -> None:
    exp = experiments.from_dict(content, source="test")
    parts = experiments.build(exp, device=context.device)
    slots = slots_of_rank(context, exp.training.meta_batch_size)
    batch = parts.family.sample("meta_train", 0, slots, seed=exp.seed)
    if context.rank == 1:
        batch = batch._replace(query_x=batch.query_x * float("nan"))
    state: MetaState = parts.algorithm.init(0)
    gradient = global_gradient(context, parts.algorithm, state, batch, step=0, chunk=None)
    (Path(folder) / str(context.rank)).write_text(str(gradient.finite))


def test_nan_on_one_rank_is_seen_by_all(tiny_data: Path, tmp_path: Path) -> None:
    exp = experiment(tmp_path, tiny_data, num_workers=3)
    run_processes(nan_on_one_rank, exp.to_dict(), str(tmp_path), num_workers=3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["False"] * 3


def few_episodes(context: Context, content: dict, folder: str) -> None:
    exp = experiments.from_dict(content, source="test")
    parts = experiments.build(exp, device=context.device)
    fixed = {"split": "meta_val", "seed": SELECTION_SEED, "episodes": 2, "data_digest": "", "chunk": None}
    evaluation = evaluate(parts.algorithm, parts.family, parts.algorithm.init(0), context=context, **fixed)
    torch.save(evaluation.scores, f"{folder}/{context.rank}")


def test_more_workers_than_episodes(tiny_data: Path, tmp_path: Path) -> None:
    run_processes(few_episodes, experiment(tmp_path, tiny_data).to_dict(), str(tmp_path), num_workers=3)
    scores = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(3)]
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
