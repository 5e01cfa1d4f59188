"""The smoke configuration over every path to a meta-gradient: the same run, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import experiment as experiments
from pipeline.kernels import native
from pipeline.runs import RunFolder
from pipeline.training import journal
from tests.conftest import REPOSITORY
from tests.faults import difference, final_params, run_to_end

pytestmark = pytest.mark.distributed


class SmokeNetwork(nn.Module):
    """The configuration's conv4 as a user would write it, for one task; parameters have conv4's names."""

    def __init__(self, hidden: int = 16, blocks: int = 4) -> None:
        super().__init__()
        for block in range(1, blocks + 1):
            layers = nn.Module()
            layers.conv = nn.Conv2d(1 if block == 1 else hidden, hidden, 3, stride=2, padding=1, bias=False)
            layers.norm = nn.BatchNorm2d(hidden)
            self.add_module(f"block{block}", layers)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = block.norm(block.conv(x)).relu()
        return self.head(x.mean(dim=(2, 3)))


AS_A_MODULE = {"model": "{name: module, factory: 'tests.distributed.test_paths:SmokeNetwork'}"}
NATIVE = pytest.mark.skipif(native.why_not() is not None, reason="native kernels cannot be built here")
PATHS: dict[str, dict[str, Any]] = {
    "closed": {"training.kernel": "closed"},
    "closed, a task at a time": {"training.kernel": "closed", "training.task_chunk": 1},
    "closed, recomputed": {"training.kernel": "closed", "algorithm.recompute_inner_steps": True},
    "compiled": {"training.kernel": "closed", "training.compile": True},
    "any module, a loop": {**AS_A_MODULE, "model.batching": "loop"},
    "any module, vmap": {**AS_A_MODULE, "model.batching": "vmap"},
    "any module, vmap, recomputed": {
        **AS_A_MODULE,
        "model.batching": "vmap",
        "algorithm.recompute_inner_steps": True,
    },
    "native": {"training.kernel": "native"},
    "native, recomputed": {"training.kernel": "native", "algorithm.recompute_inner_steps": True},
}
MARKS = {"compiled": [pytest.mark.slow], "native": [NATIVE], "native, recomputed": [NATIVE]}
EVERY_PATH = [pytest.param(path, marks=MARKS.get(path, [])) for path in PATHS]


def trained(folder: Path, data: Path, dtype: str, **settings: Any) -> RunFolder:
    """The configuration's run: 20 outer steps in one process."""
    values = {
        "task.data": data,
        "task.split": "random",
        "training.steps": 20,
        "training.validate_every": 20,
        "training.dtype": dtype,
        "evaluation.validation_episodes": 40,
        "tracking.runs": folder,
    }
    smoke = REPOSITORY / "configs" / "smoke.yaml"
    if "model" in settings:  # begins where conv4 does
        start = experiments.build(experiments.load(smoke, _set(values)), device=torch.device("cpu")).model.init(0)
        save_file({name: value.contiguous() for name, value in start.items()}, folder / "start.safetensors")
        values["training.init_from"] = folder / "start.safetensors"
    return run_to_end(experiments.load(smoke, _set(values | settings)))


def _set(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def data(tiny_data_set: Callable[..., Path]) -> Path:
    """Of the glyphs' size, with which the configuration goes."""
    return tiny_data_set(size=28)


@pytest.fixture(scope="module")
def pure(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    return {
        dtype: trained(tmp_path_factory.mktemp(dtype), data, dtype, **{"training.kernel": "pure"})
        for dtype in ("float64", "float32")
    }


@pytest.mark.parametrize("path", EVERY_PATH)
def test_the_same_parameters_in_float64(path: str, pure: dict[str, RunFolder], data: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, data, "float64", **PATHS[path])
    assert difference(final_params(run), final_params(pure["float64"])) <= 1e-10


@pytest.mark.parametrize("path", EVERY_PATH)
def test_the_same_first_loss_in_float32_and_accuracy_within_its_interval(
    path: str, pure: dict[str, RunFolder], data: Path, tmp_path: Path
) -> None:
    ours, theirs = (
        journal.read(run.journal) for run in (trained(tmp_path, data, "float32", **PATHS[path]), pure["float32"])
    )
    assert ours[0]["meta_loss"] == pytest.approx(theirs[0]["meta_loss"], rel=1e-6)
    last, reference = ours[-1], theirs[-1]
    margin = reference["val_accuracy_inductive_ci95"] + last["val_accuracy_inductive_ci95"]
    assert abs(last["val_accuracy_inductive"] - reference["val_accuracy_inductive"]) <= margin
