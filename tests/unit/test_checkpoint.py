"""Checkpoints: whole or not there, the latest and the best, and remedies that work."""

from __future__ import annotations

import hashlib
import json
import os
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
@pytest.mark.parametrize("damage", [b"", b"not what it was", b"[]", b"{}", b"\xff"])
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(tmp_path: Path, file: str, damage: bytes) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(10, 10), data_digest="d")
    store.save(state(20, 10), data_digest="d")
    (store.path(20) / file).write_bytes(damage)
    with pytest.raises(DataError, match=r"step-00000020.*Remove"):
        store.load(20)
    if file == "meta.json":
        with pytest.raises(DataError, match=r"step-00000020.meta\.json.*Remove"):
            store.best()
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
    meta = store.meta(10) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (store.path(10) / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"state\.pt: holds something else than tensors"):
        store.load(10)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def recorded_sync(descriptor: int) -> None:
        sync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])

    def recorded_rename(old: Path, new: Path) -> None:
        rename(old, new)
        done.append("rename")

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    CheckpointStore(tmp_path / "checkpoints").save(state(10), data_digest="d")
    assert done == ["state.pt", "meta.json", ".partial", "rename", "checkpoints"]
