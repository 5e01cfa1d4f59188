"""Real MLflow stores, a real Ray cluster and trained models, shared by the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import experiment as experiments
from pipeline import launch, workflow
from pipeline.experiment import Experiment
from pipeline.tasks import shards
from pipeline.workflow import Outcome
from tests.servers import mlflow_server

STEPS = 60


def images_experiment(home: Path, data: Path, **training: object) -> Experiment:
    content = {
        "name": "tiny",
        "task": {"family": "images", "data": str(data), "split": "random", "n_way": 4, "n_query": 2, "eval_n_query": 3},
        "model": {"name": "conv4", "hidden": 8, "downsample": "stride"},
        "algorithm": {"name": "maml", "inner_lr": 0.4, "eval_adaptation_steps": 2},
        "training": {"steps": STEPS, "meta_batch_size": 8, "validate_every": STEPS // 2, "num_workers": 2, **training},
        "evaluation": {"validation_episodes": 10, "test_episodes": 12, "promotion_episodes": 10},
        "tracking": {"runs": str(home / "runs")},
    }
    return experiments.from_dict(content, source="test")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with its own MLflow store, which every test of the session writes to."""
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    yield folder
    del os.environ["MLFLOW_TRACKING_URI"]
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(autouse=True)
def _mlflow_as_it_was() -> Iterator[None]:
    """What a test tells MLflow ends with the test."""
    with mlflow_server.as_it_was():
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray cluster for the session: starting one takes 20 to 40 s on two cores."""
    with launch.ray_cluster(cpus=4):
        yield


@pytest.fixture(scope="session")
def image_data(tiny_data_set) -> Path:
    return tiny_data_set(classes=24, per_class=8, size=28)


@pytest.fixture(scope="session")
def trained(home: Path, image_data: Path, ray_cluster: None) -> Outcome:
    """The whole way once, on two Ray workers."""
    return workflow.train(images_experiment(home, image_data), say=lambda _: None)


@pytest.fixture(scope="session")
def pictures(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Unseen classes as picture files of several sizes and kinds: (support, a folder per class; query)."""
    folder = tmp_path_factory.mktemp("pictures")
    manifest = shards.read_manifest(image_data)
    members = manifest.members("random", "meta_test")[:3]
    with shards.ShardReader(image_data, manifest) as reader:
        for number, class_id in enumerate(members):
            images = reader.read_class(class_id)[..., 0]
            (folder / "support" / f"kind{number}").mkdir(parents=True)
            (folder / "query").mkdir(exist_ok=True)
            _save(images[0], folder / "support" / f"kind{number}" / "a.png", size=28)
            _save(images[1], folder / "support" / f"kind{number}" / "b.jpg", size=112)
            _save(images[2], folder / "query" / f"kind{number}.png", size=56)
    return folder / "support", folder / "query"


def _save(image: np.ndarray, file: Path, *, size: int) -> None:
    Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST).save(file)
