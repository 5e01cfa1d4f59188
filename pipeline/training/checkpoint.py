"""TrainState <-> a folder, atomically and without pickle.

    RUN/checkpoints/step-00000500/state.pt     read with weights_only=True
    RUN/checkpoints/step-00000500/meta.json    step, digest of the data, best so far, sha256 of state.pt

A checkpoint is written beside its place and renamed into it, so one that is there is whole. Writing the same step
again replaces it. Only the latest and the best are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError
from pipeline.files import sync
from pipeline.training.outer import Plateau
from pipeline.types import MetaState

STEP_NAME = re.compile(r"step-[0-9]{8}")  # exactly: a user's step-00000100.bak is none of ours


@dataclass
class Best:
    """The best validation so far."""

    step: int | None = None
    score: float | None = None

    def improves(self, score: float, *, higher_is_better: bool) -> bool:
        if not math.isfinite(score):
            return False
        return self.score is None or (score > self.score if higher_is_better else score < self.score)


@dataclass
class TrainState:
    """Everything the rest of training depends on. The data position is `step`; there is no other."""

    step: int  # completed outer steps
    meta: MetaState
    optimizer: torch.optim.Optimizer
    plateau: Plateau = field(default_factory=Plateau)
    best: Best = field(default_factory=Best)
    skipped: int = 0  # outer steps left out because something was not finite
    skipped_in_a_row: int = 0


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole, ascending."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names if STEP_NAME.fullmatch(name))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """The step of the best validated checkpoint; None before the first validation, or where it was removed."""
        latest = self.latest()
        step = None if latest is None else self.meta(latest)["best_step"]
        return step if step in self.steps() else None

    def meta(self, step: int) -> dict[str, Any]:
        """The content of a checkpoint's meta.json. Raises DataError: missing or damaged, with its path."""
        path = self.path(step) / "meta.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not content.keys() >= {"best_step", "sha256"}:
                raise ValueError("not the content of a checkpoint's meta.json")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Remove {path.parent} to go on without it.") from error
        return content

    def save(self, state: TrainState, *, data_digest: str) -> Path:
        """Write the state's checkpoint and drop the ones that are neither the latest nor the best."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".partial-*"):  # of a killed process; the run is ours alone
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            staging.chmod(0o755)
            content = {
                "step": state.step,
                "params": {k: v.detach() for k, v in state.meta.params.items()},
                "buffers": dict(state.meta.buffers),
                "optimizer": state.optimizer.state_dict(),
                "plateau": state.plateau.to_dict(),
                "best": {"step": state.best.step, "score": state.best.score},
                "skipped": state.skipped,
                "skipped_in_a_row": state.skipped_in_a_row,
            }
            torch.save(content, staging / "state.pt")
            meta = {
                "step": state.step,
                "best_step": state.best.step,
                "best_score": state.best.score,
                "data_digest": data_digest,
                "sha256": hashlib.sha256((staging / "state.pt").read_bytes()).hexdigest(),
            }
            (staging / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            for written in (staging / "state.pt", staging / "meta.json", staging):
                sync(written)
            final = self.path(state.step)
            if final.exists():
                shutil.rmtree(final)
            os.rename(staging, final)
            sync(self.folder)  # the rename too survives a power cut
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for step in self.steps():
            if step not in (state.step, state.best.step):
                shutil.rmtree(self.path(step))
        return final

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The content of a checkpoint. Raises DataError: missing or damaged, with its path."""
        path = self.path(step) / "state.pt"
        try:
            meta = self.meta(step)
            if hashlib.sha256(path.read_bytes()).hexdigest() != meta["sha256"]:
                raise DataError(f"{path}: damaged (its sha256 differs from meta.json's). Remove {path.parent}.")
            content = torch.load(path, map_location=device, weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Remove {path.parent} to go on without it.") from error
        return content

    def load_meta(self, step: int, device: torch.device | str = "cpu") -> MetaState:
        """Only the meta-parameters and buffers of a checkpoint."""
        content = self.load(step, device)
        return MetaState(content["params"], content["buffers"])

    def restore(self, state: TrainState, step: int, device: torch.device | str) -> None:
        """Put a checkpoint into a freshly made state, in place."""
        content = self.load(step, device)
        with torch.no_grad():
            for name, leaf in state.meta.params.items():
                leaf.copy_(content["params"][name])
        state.meta = MetaState(state.meta.params, content["buffers"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.step = content["step"]
        state.plateau = Plateau(**content["plateau"])
        state.best = Best(**content["best"])
        state.skipped = content["skipped"]
        state.skipped_in_a_row = content["skipped_in_a_row"]
