"""TrainState <-> a folder, atomically and without pickle.

    RUN/checkpoints/step-00000500/state.pt     read with weights_only=True
    RUN/checkpoints/step-00000500/meta.json    step, digest of the data, best so far, sha256 of state.pt

A checkpoint is written beside its place and renamed into it, so one that is there is whole; in an object store, one
is there when its meta.json is. Writing the same step again replaces it. Only the latest and the best are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import storage
from pipeline.errors import DataError
from pipeline.storage import Location
from pipeline.training.outer import Plateau, load_optimizer
from pipeline.training.plan import Plan
from pipeline.types import MetaState, Params, Statistics

STATE_FILE, META_FILE = "state.pt", "meta.json"
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
    classes: Statistics | None = None  # what the family weights meta-training's classes by; None: they are uniform
    plan: Plan | None = None  # None before the first step, and in checkpoints of older versions
    frozen: frozenset[str] = frozenset()  # meta-parameters that the outer optimizer does not have

    @property
    def learned(self) -> Params:
        """The meta-parameters that outer steps change."""
        return {name: value for name, value in self.meta.params.items() if name not in self.frozen}


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole, ascending."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        steps = [int(path.name.removeprefix("step-")) for path in folders if STEP_NAME.fullmatch(path.name)]
        return sorted(step for step in steps if isinstance(self.folder, Path) or self._is_marked(step))

    def _is_marked(self, step: int) -> bool:
        """In an object store a checkpoint's files come one by one, meta.json last."""
        return (self.path(step) / META_FILE).exists()

    def path(self, step: int) -> Location:
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
        path = self.path(step) / META_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not content.keys() >= {"best_step", "sha256"}:
                raise ValueError("not the content of a checkpoint's meta.json")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Remove {path.parent} to go on without it.") from error
        return content

    def save(self, state: TrainState, *, data_digest: str) -> Location:
        """Write the state's checkpoint and drop the ones that are neither the latest nor the best."""
        content = {
            "step": state.step,
            "params": {name: value.detach() for name, value in state.meta.params.items()},
            "buffers": dict(state.meta.buffers),
            "optimizer": state.optimizer.state_dict(),
            "plateau": state.plateau.to_dict(),
            "best": {"step": state.best.step, "score": state.best.score},
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            "classes": state.classes,
            "plan": state.plan and state.plan._asdict(),
        }
        stream = io.BytesIO()
        torch.save(content, stream)
        saved = stream.getvalue()
        meta = {
            "step": state.step,
            "best_step": state.best.step,
            "best_score": state.best.score,
            "data_digest": data_digest,
            "sha256": hashlib.sha256(saved).hexdigest(),
        }
        final = self.path(state.step)
        storage.write_folder(final, {STATE_FILE: saved, META_FILE: (json.dumps(meta, indent=1) + "\n").encode()})
        for step in self.steps():
            if step not in (state.step, state.best.step):
                storage.remove_folder(self.path(step))
        return final

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The content of a checkpoint. Raises DataError: missing or damaged, with its path."""
        path = self.path(step) / STATE_FILE
        try:
            meta = self.meta(step)
            saved = path.read_bytes()
            if hashlib.sha256(saved).hexdigest() != meta["sha256"]:
                raise DataError(f"{path}: damaged (its sha256 differs from meta.json's). Remove {path.parent}.")
            content = torch.load(io.BytesIO(saved), map_location=device, weights_only=True)
        except pickle.UnpicklingError:  # torch's own message advises to load it all the same
            raise DataError(
                f"{path}: holds something else than tensors and plain values, so it is not loaded: it was not written "
                f"by this package. Remove {path.parent} to go on without it."
            ) from None
        except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
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
        load_optimizer(state.optimizer, content["optimizer"])
        state.step = content["step"]
        state.plateau = Plateau(**content["plateau"])
        state.best = Best(**content["best"])
        state.skipped = content["skipped"]
        state.skipped_in_a_row = content["skipped_in_a_row"]
        state.classes = content.get("classes")
        state.plan = Plan(**content["plan"]) if content.get("plan") else None
