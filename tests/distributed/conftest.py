"""Workers that start at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.multiprocessing

WARM = ("torch._dynamo", "pipeline.launch", "pipeline.experiment", "tests.faults")  # a first Adam imports dynamo


@pytest.fixture(autouse=True, scope="module")
def _workers_of_a_warm_process() -> Iterator[None]:
    """Workers are forked from a process that has imported PyTorch; each of their own would take four seconds for it.

    Those that a driver in a process of its own starts are spawned, as a user's are.
    """
    warm = torch.multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(list(WARM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "get_context", lambda method=None: warm)
        yield
