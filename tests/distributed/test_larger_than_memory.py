"""The benchmark larger_than_memory, small: a tenth of the set's size is the memory there is for it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import experiment as experiments
from pipeline import launch
from pipeline.algorithms.maml import MAML
from pipeline.config import validate
from pipeline.errors import TrainingStopped
from pipeline.experiment import Experiment
from pipeline.tasks.images import ImagesConfig, ImageTasks
from pipeline.tasks.shards import verify
from pipeline.training.context import Context, run_processes
from pipeline.training.loop import train_worker
from tests import faults
from tests.benchmarks.larger_than_memory import forget, memory_now, random_pictures, write_pictures, write_random_images
from tests.benchmarks.measuring import in_fresh_process
from tests.faults import assert_same_end, open_run, run_to_end

pytestmark = pytest.mark.distributed

CLASSES, EXAMPLES = 480, 10  # of 84×84×3: 102 MB
WINDOW = {"classes": 12, "steps": 1}  # 2.5 MB
CACHE_MB = 5  # two of them
WARM_UP, STEPS = 3, 40  # in which 432 of the 448 classes of meta-training are read


def family_of(data: str, **options: Any) -> ImageTasks:
    task = {"family": "images", "data": data, "split": "random", "n_query": 2, "eval_n_query": 2}
    config = validate(ImagesConfig, task | {"cache_mb": CACHE_MB, "window": WINDOW, **options}, source="test")
    return config.build(device=torch.device("cpu"), dtype=torch.float32)


def digest(family: ImageTasks, step: int) -> str:
    batch = family.sample("meta_train", step, torch.arange(2), seed=0)
    return hashlib.sha256(batch.support_x.numpy().tobytes() + batch.query_x.numpy().tobytes()).hexdigest()


def in_little_memory(data: str) -> tuple[list[str], str]:
    """Every step's episodes, and what becomes of loading the whole set.

    What this process holds after a few steps (the cache, the libraries and threads' stacks and heaps, none of which
    depend on the set's size) may grow by a tenth of the set and not by a byte more.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own reserves a gigabyte
    torch.set_num_threads(1)
    threading.stack_size(1 << 18)  # of 8 MB, readers that come later would take more than the tenth
    family = family_of(data, memory_limit_mb=0)
    digests = [digest(family, step) for step in range(WARM_UP)]
    size = sum(file.stat().st_size for file in Path(data).rglob("*.parquet"))
    most = memory_now()[1] + size // 10
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for step in range(WARM_UP, STEPS):
        digests.append(digest(family, step))
        cache = family._images.cache  # type: ignore[attr-defined]
        assert cache.nbytes <= cache.capacity
    try:
        family_of(data, memory_limit_mb=1000)
    except MemoryError as error:
        return digests, type(error).__name__
    return digests, "loaded"


def test_a_tenth_of_its_size_is_memory_enough(tmp_path: Path) -> None:
    write_random_images(tmp_path / "set", CLASSES, examples=EXAMPLES)
    forget(tmp_path / "set")
    data = str(tmp_path / "set")
    digests, whole = in_fresh_process(in_little_memory, data)
    in_memory = family_of(data, memory_limit_mb=1000)
    assert digests == [digest(in_memory, step) for step in range(STEPS)]
    assert len(set(digests)) == STEPS
    assert whole == "MemoryError"  # the limit is one


def test_pictures_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", random_pictures(8, 84), 60)
    verify(tmp_path / "set")
    data, kept = str(tmp_path / "set"), tmp_path / "decoded"
    window: dict[str, Any] = {"window": {"classes": 6, "steps": 2}, "cache_mb": 3, "decoded_cache": str(kept)}
    windowed, in_memory = (family_of(data, **window, memory_limit_mb=mb) for mb in (0, 1000))
    for step in range(6):
        assert digest(windowed, step) == digest(in_memory, step)
        cache = windowed._images.cache  # type: ignore[attr-defined]
        assert cache.nbytes <= cache.capacity
    assert len(list(kept.iterdir())) > 12


KILLED_AT, CHECKPOINTS_EVERY, WINDOW_STEPS = 11, 5, 7  # it goes on from step 10, the fourth of the second window


def killed(context: Context, content: dict[str, Any], run_path: str) -> None:
    """Both ranks, by SIGKILL, in the midst of a step."""
    meta_grad = MAML.meta_grad

    def until(self: MAML, state: Any, batch: Any, *, step: int) -> Any:
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return meta_grad(self, state, batch, step=step)

    MAML.meta_grad = until  # type: ignore[method-assign]
    train_worker(context, content, run_path)


@pytest.mark.parametrize("family", ["images", "text"])
def test_killed_in_the_middle_of_a_window_it_ends_bit_identical(
    family: str, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    def of(name: str) -> Experiment:
        training = {"steps": 20, "validate_every": CHECKPOINTS_EVERY, "num_workers": 2, "meta_batch_size": 4}
        content = faults.experiment(tmp_path / name, tiny_sets[family], **training).to_dict()
        content["task"] = {"family": family, "data": str(tiny_sets[family]), "split": "random", "n_way": 3}
        content["task"] |= {"n_query": 2, "eval_n_query": 2, "memory_limit_mb": 0}
        content["task"] |= {"window": {"classes": 4, "steps": WINDOW_STEPS, "eval_episodes": 3}}
        networks = {"images": {"name": "mlp", "hidden": [8]}, "text": {"name": "text", "buckets": 64, "embedding": 8}}
        content["model"] = networks[family]
        return experiments.from_dict(content, source="test")

    exp = of("killed")
    run = open_run(exp)
    with pytest.raises(TrainingStopped, match="exit code -9"):
        run_processes(killed, exp.to_dict(), str(run.path), num_workers=2)
    assert run.checkpoints.latest() == KILLED_AT - KILLED_AT % CHECKPOINTS_EVERY
    assert KILLED_AT // WINDOW_STEPS == run.checkpoints.latest() // WINDOW_STEPS == 1
    launch.run_workers(exp, run)
    assert_same_end(run, run_to_end(of("undisturbed")))
