"""Data that several tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.datasets.source import Column
from pipeline.tasks import shards
from pipeline.types import SPLITS, Split
from tests.servers import mlflow_server, postgres, s3

REPOSITORY = Path(__file__).resolve().parents[1]


ON_ONE_RAY_CLUSTER = tuple(
    f"tests/integration/test_{name}.py" for name in ("command_line", "whole_way", "sweeps", "prepare_on_ray")
)
ORDER = ("distributed", "integration", "contract", "infra", "unit")  # what takes long is not left for the end


def _share(nodeid: str) -> str:
    """Tests that `make test` runs in one process, one after another: what they have in common is set up once."""
    file = nodeid.split("::")[0]
    return "one Ray cluster" if file in ON_ONE_RAY_CLUSTER else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `make test`, which runs two tests at a time: the shares in the order of their tests.

    A scheduler of our own: with pytest 9.2, xdist 3.8 does not find the groups of its `loadgroup` and deals out single
    tests, so that both processes set up everything.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByShare(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _share(nodeid)

    config.option.loadscopereorder = False
    return ByShare(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One process of `make test` begins with the Ray cluster, the other with what computes in several processes."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
        return _share(item.nodeid) != "one Ray cluster", ORDER.index(folder) if folder in ORDER else len(ORDER)

    if hasattr(config, "workerinput"):  # of xdist
        items.sort(key=place)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As workers run. On a busy machine the threads of small ops wait for each other much longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_data_set(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of small image data sets, each in a folder of its own.

    `classes` names "group0/class00", … in groups of four; each class is its own random pattern under noise, with
    an empty margin, so that a few adaptation steps can tell classes apart. The class split "random" deals them to
    the parts in turn, or as `part_of` says.
    """

    def make(
        *,
        classes: int = 16,
        per_class: int = 8,
        size: int = 12,
        channels: int = 1,
        part_of: Callable[[int], Split] = lambda i: SPLITS[i % len(SPLITS)],
    ) -> Path:
        names = [f"group{i // 4}/class{i:02d}" for i in range(classes)]
        parts: dict[str, Split] = {name: part_of(i) for i, name in enumerate(names)}

        def source() -> Iterator[shards.ClassExamples]:
            for i, name in enumerate(names):
                random = np.random.default_rng(i)
                pattern = random.choice([0, 200], size=(1, size, size, channels))
                noise = random.integers(0, 56, size=(per_class, size, size, channels))
                images = (pattern + noise).astype(np.uint8)
                margin = np.pad(np.ones((size - 4, size - 4, 1), dtype=np.uint8), ((2, 2), (2, 2), (0, 0)))
                yield shards.ClassExamples(name, name.split("/")[0], images * margin)

        out = tmp_path_factory.mktemp("data") / "tiny"
        shards.write(
            out,
            source(),
            splits={"random": parts},
            source={"name": "tiny"},
            preprocessing={"kind": "drawing", "size": size, "channels": channels},
        )
        return out

    return make


@pytest.fixture(scope="session")
def tiny_data(tiny_data_set: Callable[..., Path]) -> Path:
    """16 classes of 8 images, 12×12×1. Shared: do not change it."""
    return tiny_data_set()


@pytest.fixture(scope="session")
def tiny_sets(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small data set for each family of classes, of the same 16 classes of 8 examples. Shared: do not change them.

    text: sentences of a class's own words among those of all. tabular: two columns of numbers, of which the second
    misses some, and one of categories, around values of each class.
    """
    names = [entry.name for entry in shards.read_manifest(tiny_data).classes]
    parts: dict[str, Split] = {name: SPLITS[i % len(SPLITS)] for i, name in enumerate(names)}
    columns = [
        Column(name="length"),
        Column(name="width", missing=True),
        Column(name="colour", kind="categorical", categories=["blue", "green", "red"]),
    ]

    def sentences() -> Iterator[shards.ClassExamples]:
        for i, name in enumerate(names):
            random = np.random.default_rng(i)
            own = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(3)]
            texts = [" ".join(random.permutation([*random.choice(own, 3), "please", "the", "now"])) for _ in range(8)]
            yield shards.ClassExamples(name, name.split("/")[0], texts)

    def rows() -> Iterator[shards.ClassExamples]:
        for i, name in enumerate(names):
            random = np.random.default_rng(i)
            numbers = random.normal(size=2) * [30, 0.1] + random.normal(size=(8, 2)) * [3, 0.01]
            numbers[i % 8, 1] = np.nan
            colours = np.where(random.random(8) < 0.8, i % 3, random.integers(0, 3, 8))
            features = np.column_stack([numbers, colours]).astype(np.float32)
            yield shards.ClassExamples(name, name.split("/")[0], features)

    folder = tmp_path_factory.mktemp("sets")
    how: dict[str, Any] = {"splits": {"random": parts}, "source": {"name": "tiny"}, "preprocessing": {}}
    shards.write(folder / "text", sentences(), modality="text", **how)
    shards.write(folder / "tabular", rows(), modality="vector", columns=columns, **how)
    return {"images": tiny_data, "text": folder / "text", "tabular": folder / "tabular"}


@pytest.fixture(scope="session")
def omniglot_zips() -> Path:
    """The folder of Omniglot's official archives. Tests that use it carry `@pytest.mark.data`."""
    folder = REPOSITORY.parent / "shared" / "data" / "omniglot"
    if not (folder / "images_background.zip").is_file():
        pytest.skip(f"the real Omniglot archives are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    """One PostgreSQL for the session; make databases of your own in it."""
    reason = postgres.why_not()
    if reason is not None:
        pytest.skip(reason)
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 endpoint of the session's own, with no bucket yet; what the environment of its clients needs."""
    with s3.running(tmp_path_factory.mktemp("object-store")) as server:
        yield server.environment


@pytest.fixture(scope="session")
def mlflow_on_postgres(
    postgres_server: postgres.Postgres, object_store: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[mlflow_server.MlflowServer, mlflow_server.Account]]:
    """One MLflow server for the session as infra/ ships it, on PostgreSQL and S3 with basic auth; its administrator.

    The bucket `metapipe`, which its artifacts go to, is made by the test that needs it.
    """
    admin = mlflow_server.Account()
    folder = tmp_path_factory.mktemp("mlflow-server")
    postgres_server.create_database("mlflow")
    env = {**object_store, "MLFLOW_ARTIFACTS_DESTINATION": "s3://metapipe/mlflow"}
    with mlflow_server.shipped(folder, postgres=postgres_server, database="mlflow", admin=admin, env=env) as server:
        yield server, admin
