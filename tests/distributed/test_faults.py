"""Every fault once, with real processes: after it the run ends as an undisturbed one does, bit for bit.

Faults of Ray's workers, nodes and head are in tests/integration/test_ray_faults.py; many of them at random in
tests/soak.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import experiment as experiments
from pipeline import launch, runs, storage
from pipeline.config import validate
from pipeline.errors import DataError, StopRequested, TrainingStopped
from pipeline.experiment import Experiment
from pipeline.runs import RunFolder
from pipeline.tasks import shards
from pipeline.tasks.images import ImagesConfig, ImageTasks
from pipeline.training import journal
from pipeline.training.context import Context, run_processes
from pipeline.training.loop import train_worker
from tests import disks, faults
from tests.faults import (
    DRIVER,
    assert_same_end,
    difference,
    final_params,
    open_run,
    reached,
    run_to_end,
    wait_until,
    worker_processes,
)
from tests.servers import s3 as s3_server
from tests.servers.s3 import S3

pytestmark = pytest.mark.distributed

FEW = {"steps": 12, "validate_every": 4, "num_workers": 2, "dtype": "float32"}  # for faults at a chosen moment
MORE = {**FEW, "steps": 300, "validate_every": 50}  # for faults that take a moment to arrive


def experiment(runs_folder: Path | str, data: Path | str, **training: Any) -> Experiment:
    """Of milliseconds a step: what is spoilt here does not depend on the network."""
    model = {"name": "mlp", "hidden": [8], "normalization": "batch"}
    return faults.experiment(runs_folder, data, model=model, **training)


@pytest.fixture(scope="module")
def few(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_to_end(experiment(tmp_path_factory.mktemp("few"), tiny_data, **FEW))


@pytest.fixture(scope="module")
def more(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_to_end(experiment(tmp_path_factory.mktemp("more"), tiny_data, **MORE))


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# --- processes


def test_killed_workers_are_started_again(tiny_data: Path, tmp_path: Path, more: RunFolder) -> None:
    """Rank 1, then rank 0, then all ranks at once."""
    exp = experiment(tmp_path, tiny_data, **MORE)
    run = open_run(exp)

    def kill() -> None:
        for step, victims in ((50, slice(1, 2)), (100, slice(0, 1)), (150, slice(None))):
            wait_until(lambda step=step: reached(run, step))
            for pid in worker_processes()[victims]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killed: list[int] = []
    killer = in_background(kill)
    launch.run_workers(exp, run)
    killer.join()
    assert len(set(killed)) == 4
    assert_same_end(run, more)


def killed_while_writing(context: Context, content: dict, run_path: str, moment: str, write: int) -> None:
    """Rank 0 dies in the midst of its checkpoint number `write`."""
    writes = {"n": 0}
    rename, sync = os.rename, storage.sync

    def die_at(here: str) -> None:
        if context.rank == 0 and writes["n"] == write and here == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_sync(path: Path) -> None:
        if path.name == "state.pt":
            writes["n"] += 1
            die_at("half of the files written")
        sync(path)

    def counted_rename(old: Path, new: Path) -> None:
        die_at("before the rename")
        rename(old, new)
        die_at("after the rename")

    storage.sync, os.rename = counted_sync, counted_rename
    train_worker(context, content, run_path)


def test_killed_during_a_checkpoint_write(tiny_data: Path, tmp_path: Path, few: RunFolder) -> None:
    """That of step 8, at three moments of it."""
    exp = experiment(tmp_path, tiny_data, **FEW)
    run = open_run(exp)
    moments = (("half of the files written", 2, 4), ("before the rename", 1, 4), ("after the rename", 1, 8))
    for moment, write, left in moments:
        with pytest.raises(TrainingStopped, match="worker 0 ended with exit code -9"):
            run_processes(killed_while_writing, exp.to_dict(), str(run.path), moment, write, num_workers=2)
        assert run.checkpoints.latest() == left, moment
    launch.run_workers(exp, run)
    assert_same_end(run, few)


def driver(exp: Experiment, folder: Path) -> list[str]:
    (folder / "driver.py").write_text(DRIVER)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(exp.to_dict()))
    return [sys.executable, str(folder / "driver.py"), str(folder / "experiment.yaml")]


def test_sigterm_writes_a_checkpoint_and_ends(tiny_data: Path, tmp_path: Path, more: RunFolder) -> None:
    """A spot machine's notice, first to the driver, then to one worker: a checkpoint of the step that was reached.

    The driver's exit code is 143; the same command goes on. In one process:
    `test_an_interrupt_ends_everything_and_says_how_to_go_on` in tests/integration.
    """
    exp = experiment(tmp_path, tiny_data, **{**MORE, "validate_every": 1000})
    run = RunFolder(tmp_path / "images" / "001")

    def stopped_after(step: int) -> int:
        latest = run.checkpoints.latest()
        assert latest is not None
        assert step < latest < MORE["steps"]
        assert len(journal.read(run.journal)) == latest, "every step's metrics are there"
        return latest

    process = subprocess.Popen(driver(exp, tmp_path))
    wait_until(lambda: len(journal.read(run.journal)) > 5, watch=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    first = stopped_after(5)

    def terminate() -> None:
        wait_until(lambda: len(journal.read(run.journal)) > first + 5)
        os.kill(worker_processes()[-1], signal.SIGTERM)

    assert runs.open_run(exp, data_digest=experiments.check_fits(exp))[1], "it is gone on with"
    terminator = in_background(terminate)
    with pytest.raises(StopRequested, match="stopped on request at outer step"):
        launch.run_workers(exp, run)
    terminator.join()
    stopped_after(first + 5)
    launch.run_workers(exp, run)
    # validated at other steps, so only the parameters can be compared
    assert all(torch.equal(value, final_params(more)[name]) for name, value in final_params(run).items())


def terminated_at(context: Context, content: dict, run_path: str, until: int) -> None:
    """Rank 0 gets SIGTERM in the midst of step `until`."""
    from pipeline.algorithms.maml import MAML

    meta_grad, still = MAML.meta_grad, [until]

    def terminated(self, state, batch, *, step):  # type: ignore[no-untyped-def]
        if context.rank == 0 and still == [step]:
            still.clear()  # once, however many chunks the step has
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_grad(self, state, batch, step=step)

    MAML.meta_grad = terminated  # type: ignore[method-assign]
    train_worker(context, content, run_path)


def test_workers_leave_and_join(tiny_data: Path, tmp_path: Path) -> None:
    """Three workers, then one, four and two: float64, 50 steps of Adam, ≤ 1e-10 of the undisturbed run of one.

    So any number of workers gives the same parameters, with shares as unequal as 3, 3, 2. Of conv4, which has no bias
    before a normalization: its gradient is rounding alone, which Adam would blow up.
    """
    training = {"steps": 50, "validate_every": 10}
    undisturbed = run_to_end(faults.experiment(tmp_path / "undisturbed", tiny_data, **training, backend="local"))
    for workers, until in ((3, 10), (1, 20), (4, 30), (2, None)):
        exp = faults.experiment(tmp_path / "elastic", tiny_data, **training, num_workers=workers)
        run = open_run(exp)
        if until is None:
            launch.run_workers(exp, run)
        else:
            with pytest.raises(StopRequested, match=f"outer step {until + 1} of 50"):
                run_processes(terminated_at, exp.to_dict(), str(run.path), until, num_workers=workers)
    numbers = [int(record["num_workers"]) for record in journal.read(run.journal)]
    assert numbers == 11 * [3] + 10 * [1] + 10 * [4] + 19 * [2]
    assert difference(final_params(run), final_params(undisturbed)) <= 1e-10
    key = "val_accuracy_inductive"
    scores, expected = (
        [record[key] for record in journal.read(r.journal) if key in record] for r in (run, undisturbed)
    )
    assert scores == expected
    assert len(scores) == 5


# --- numbers


def nan_at_step_5(context: Context, content: dict, run_path: str, disturbed: bool) -> None:
    """Rank 1 takes ten times as long as the other and has a NaN once, or (the reference) both leave that step out."""
    from pipeline.algorithms.maml import MAML

    meta_grad = MAML.meta_grad

    def spoilt(self, state, batch, *, step):  # type: ignore[no-untyped-def]
        if disturbed and context.rank == 1:
            time.sleep(0.4)
        if step == 5 and (not disturbed or context.rank == 1):
            batch = batch._replace(query_x=batch.query_x * float("nan"))
        return meta_grad(self, state, batch, step=step)

    MAML.meta_grad = spoilt  # type: ignore[method-assign]
    train_worker(context, content, run_path)


def test_a_straggler_is_told_and_its_nan_skips_the_step_on_all(tiny_data: Path, tmp_path: Path) -> None:
    ends = []
    for disturbed in (True, False):
        exp = experiment(tmp_path / str(disturbed), tiny_data, **FEW)
        run = open_run(exp)
        run_processes(nan_at_step_5, exp.to_dict(), str(run.path), disturbed, num_workers=2)
        ends.append(run)
    assert_same_end(*ends)
    records = journal.read(ends[0].journal)
    assert [record["skipped_steps"] for record in records] == [0] * 5 + [1] * 7
    told = [record["slowest_rank"] == 1 and record["compute_seconds_max"] > 0.4 for record in records]
    assert sum(told) > len(told) / 2, "but for steps in which the machine was busier with rank 0"


# --- storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "small", kilobytes=300) as folder:
        yield folder


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    small_disk: Path, tiny_data: Path, tmp_path: Path, more: RunFolder
) -> None:
    exp = experiment(small_disk, tiny_data, **MORE)
    run = open_run(exp)

    def fill() -> None:
        wait_until(lambda: reached(run, 20))
        with (small_disk / "filler").open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(bytes(1024))

    filler = in_background(fill)
    with pytest.raises(TrainingStopped, match=r"No space left.*The checkpoint of step \d+ is whole.*Make room"):
        launch.run_workers(exp, run)
    filler.join()
    kept = run.checkpoints.latest()
    assert kept is not None
    run.checkpoints.load(kept)  # whole
    (small_disk / "filler").unlink()
    launch.run_workers(exp, run)
    assert_same_end(run, more)


def test_a_shard_damaged_during_the_run_is_named_and_repaired(tiny_data: Path, tmp_path: Path, more: RunFolder) -> None:
    """Read from the mapped file as it trains: the damage is met by the rank that draws that class."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    content = experiment(tmp_path / "runs", data, **MORE).to_dict()
    content["task"]["memory_limit_mb"] = 0
    exp = experiments.from_dict(content, source="test")
    run = open_run(exp)
    shard = data / shards.read_manifest(data).shards[0].file
    whole = shard.read_bytes()

    def damage() -> None:
        wait_until(lambda: reached(run, 20))
        with shard.open("r+b") as stream:
            for position in range(len(whole) // 10, len(whole) * 8 // 10, 200):
                stream.seek(position)
                stream.write(bytes([whole[position] ^ 0xFF]))

    damager = in_background(damage)
    with pytest.raises(DataError, match=f"{shard}: row group .* cannot be read"):
        launch.run_workers(exp, run)
    damager.join()
    assert not reached(run, MORE["steps"])
    with pytest.raises(DataError, match="is damaged"):
        experiments.check_fits(exp)
    shard.write_bytes(whole)
    launch.run_workers(exp, run)
    assert_same_end(run, more)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """With one bucket, which is named `bucket`."""
    with s3_server.running(tmp_path_factory.mktemp("s3")) as server, s3_server.as_our_own(server):
        server.make_bucket("bucket")
        yield server


def test_a_few_bytes_of_an_object_are_read_again_where_the_refusal_is_longer_than_they_are(s3: S3) -> None:
    content = os.urandom(1 << 10)
    place = storage.location("s3://bucket/part")
    assert isinstance(place, storage.ObjectPath)
    place.write_bytes(content)
    before = s3.count("refused")
    with place.open_input() as file:
        s3.fail(0.5)
        try:
            for start in range(0, 128, 8):
                file.seek(start)
                assert file.read(8) == content[start : start + 8]
        finally:
            s3.fail(0.0)
    assert s3.count("refused") > before + 1


def test_data_and_run_in_a_store_that_fails_one_request_in_ten(
    s3: S3, tiny_data: Path, tmp_path: Path, more: RunFolder
) -> None:
    """Refused requests and lost answers while data is read and checkpoints and metrics are written.

    And a SIGKILL of the driver in the middle: its workers end too, and the same command goes on.
    """
    data = storage.location("s3://bucket/data/tiny")
    storage.copy_folder(tiny_data, data, last=shards.MANIFEST)
    assert shards.verify(data) == shards.read_manifest(tiny_data)
    exp = experiment("s3://bucket/runs", str(data), **MORE)
    run = RunFolder("s3://bucket/runs/images/001")
    command = driver(exp, tmp_path)
    before = {kind: s3.count(kind) for kind in ("refused", "lost", "half")}
    s3.fail(0.1)
    try:
        process = subprocess.Popen(command)
        wait_until(lambda: reached(run, 20), watch=process)
        workers = worker_processes(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert not reached(run, MORE["steps"])
        again = subprocess.run(command, timeout=200, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert again.stdout.strip() == "resumed"
    finally:
        s3.fail(0.0)
    assert all(s3.count(kind) > count + 3 for kind, count in before.items())
    assert_same_end(run, more)
    assert [path.name for path in run.path.iterdir()] == ["checkpoints", "config.yaml", "metrics.jsonl", "run.json"]


def test_a_store_that_cannot_be_written_is_told_before_anything_starts(s3: S3, tiny_data: Path) -> None:
    from pipeline.errors import ConfigError

    exp = experiment("s3://no-such-bucket/runs", tiny_data)
    with (
        pytest.raises(ConfigError, match=r"tracking\.runs=s3://no-such-bucket/runs/images: cannot be written"),
        runs.claimed(runs.runs_of(exp)),
    ):
        pass


HOLDER = """
import sys, time
from pipeline.runs import claimed
from pipeline.storage import location
with claimed(location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_works_on_a_name_in_a_store(s3: S3) -> None:
    from pipeline.errors import ConfigError

    address = "s3://bucket/runs/claimed"
    with subprocess.Popen([sys.executable, "-c", HOLDER, address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match="another process"), runs.claimed(storage.location(address)):
                pass
        finally:
            process.kill()
    with runs.claimed(storage.location(address)):  # its process is gone
        pass


def test_windows_from_a_store_that_fails_one_request_in_ten(s3: S3, tiny_data: Path) -> None:
    place = storage.location("s3://bucket/windows")
    storage.copy_folder(tiny_data, place, last=shards.MANIFEST)

    def family(data: Path | str) -> ImageTasks:
        task = {"family": "images", "data": str(data), "split": "random", "n_way": 3, "n_query": 2, "eval_n_query": 2}
        task |= {"memory_limit_mb": 0, "window": {"classes": 3, "steps": 2}}
        return validate(ImagesConfig, task, source="test").build(device=torch.device("cpu"), dtype=torch.float32)

    here, there = family(tiny_data), family(str(place))
    s3.fail(0.1)
    try:
        for step in range(8):
            ours, theirs = (each.sample("meta_train", step, torch.arange(4), seed=0) for each in (there, here))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    finally:
        s3.fail(0.0)
