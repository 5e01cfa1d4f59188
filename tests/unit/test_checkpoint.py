"""Checkpoints: whole or not there, the latest and the best, and remedies that work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from pipeline.training import outer
from pipeline.training.checkpoint import Best, CheckpointStore, TrainState
from pipeline.types import MetaState


def state(step: int, best: int | None = None) -> TrainState:
    params = {"w": torch.full((3,), float(step)).requires_grad_()}
    optimizer = outer.make_optimizer(outer.OuterConfig(), params)
    return TrainState(step, MetaState(params, {}), optimizer, best=Best(best, 0.5 if best else None))


def test_only_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert (store.latest(), store.best()) == (None, None)
    (tmp_path / ".partial-of-a-killed-process").mkdir()
    (tmp_path / "step-00000010.bak").mkdir()
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20)):
        store.save(state(step, best), data_digest="d")
    assert store.steps() == [20, 40]
    assert (store.latest(), store.best()) == (40, 20)
    assert float(store.load_meta(20).params["w"][0]) == 20
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000020", "step-00000040", "step-00000010.bak"}


@pytest.mark.parametrize("file", ["state.pt", "meta.json"])
@pytest.mark.parametrize("damage", [b"", b"not what it was"])
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(tmp_path: Path, file: str, damage: bytes) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(10, 10), data_digest="d")
    store.save(state(20, 10), data_digest="d")
    (store.path(20) / file).write_bytes(damage)
    with pytest.raises(DataError, match=r"step-00000020.*Remove"):
        store.load(20)
    shutil.rmtree(store.path(20))
    assert (store.latest(), store.best()) == (10, 10)
    store.save(state(20, 10), data_digest="d")
    shutil.rmtree(store.path(10))
    assert (store.latest(), store.best()) == (20, None)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(10), data_digest="d")
    file = store.path(10) / "state.pt"
    torch.save({"params": Path("x")}, file)
    import hashlib
    import json

    meta = store.meta(10) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (store.path(10) / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="cannot be read"):
        store.load(10)
