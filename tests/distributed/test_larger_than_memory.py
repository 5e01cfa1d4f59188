"""The benchmark larger_than_memory, small: a tenth of the set's size is the memory there is for it."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import validate
from pipeline.tasks.images import ImagesConfig, ImageTasks
from tests.benchmarks.larger_than_memory import forget, memory_now, write_random_images
from tests.benchmarks.measuring import in_fresh_process

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
