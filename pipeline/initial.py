"""The weights that meta-training starts from, where they are not random: `training.init_from` and `model.weights`.

They are read once, when a run is made, by the process that starts it, fitted to the meta-parameters and kept in the
run's folder with their digest. So all workers start from the same bytes, on machines that never saw the file, and a
run that is resumed does not ask for it again.

A source is torchvision's own weights (by `model.weights`), what `pipeline.text_start` makes of meta-training's texts
and of words' vectors (`model.start`, `model.vectors`), a state file (.safetensors, or .pt and .pth with tensors alone),
a folder of a registered model, a registered model (`models:/NAME@ALIAS`), or a run's folder, whose best checkpoint
counts: supervised pretraining with `algorithm.name: transfer`, for one.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline import experiment as experiments
from pipeline import runs, storage, text_start
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Components, Experiment
from pipeline.learner import MODEL_FILE, split_state
from pipeline.learner import STATE_FILE as MODEL_STATE_FILE
from pipeline.models.text import Text, TextConfig
from pipeline.runs import Initial, RunFolder
from pipeline.types import MetaState, Params, Statistics

IN_A_REGISTRY = ("models:/", "runs:/")
PICKLED, SAFE = (".pt", ".pth"), ".safetensors"
NOT_PARAMETERS = ("num_batches_tracked", "running_mean", "running_var")  # of BatchNorm, which may do without them


def resolve(exp: Experiment) -> Initial | None:
    """What a new run starts from; None: random weights.

    Raises ConfigError: the weights are not to be had, or do not fit the network; the message lists names.
    DataError: a damaged file. TrackingError: no such registered model.
    """
    source = experiments.initial_weights(exp)
    if source is None:
        return None
    parts = experiments.build(exp, device=torch.device("cpu"))
    if exp.training.init_from is None and isinstance(exp.model, TextConfig):
        assert isinstance(parts.model, Text)
        params, told = text_start.start(exp.model, parts.model, parts.family, parts.algorithm.init(exp.seed).params)
        return Initial(told, MetaState(params, {}))
    key = "training.init_from" if exp.training.init_from else "model.weights"
    given = _read(exp, source)
    taken = fitted(given, exp, parts, source=f"{key}: {source}")
    return Initial(f"{key}: {source}{_not_taken(given, taken, parts.algorithm.init(exp.seed).params)}", taken)


def _not_taken(given: MetaState, taken: MetaState, fresh: Params) -> str:
    """For the user: what the run begins with besides, and what of the given is of no use to it."""
    names = {**given.params, **given.buffers}
    left = [name for name in names if name not in taken.params.keys() | taken.buffers.keys()]
    stays = [name for name in fresh if name not in taken.params]
    told = [f"fresh: {_some(stays)}"] if stays else []
    told += [f"not taken: {_some(left)}"] if left else []
    return f" ({'; '.join(told)})" if told else ""


def fitted(given: MetaState, exp: Experiment, parts: Components, *, source: str) -> MetaState:
    """Of the given tensors those that a run of `exp` takes, in its dtype.

    Parameters of the network must be there in the same shape, its head's may be missing or of another shape: then the
    head stays fresh. It is left out where the algorithm has none to learn. What algorithms learn besides
    ("ALGORITHM/…") is taken where it fits. Running averages are taken by algorithms that keep them.

    Raises ConfigError: the network's parameters and the given ones are not the same.
    """
    fresh = parts.algorithm.init(exp.seed).params
    head = set(parts.model.head)
    same = {name for name, value in fresh.items() if name in given.params and given.params[name].shape == value.shape}
    if not head <= same:
        same -= head  # a weight and a bias that belong together
    problems = []
    of_network = [name for name in fresh if "/" not in name and name not in head]
    missing = [name for name in of_network if name not in given.params]
    if missing:
        problems.append(f"it has no {_some(missing)}")
    shapes = [
        f"{name} {list(given.params[name].shape)} instead of {list(fresh[name].shape)}"
        for name in of_network
        if name in given.params and name not in same
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    unknown = [
        name
        for name in given.params
        if "/" not in name and name not in fresh.keys() | head and not name.endswith(NOT_PARAMETERS)
    ]
    if unknown:
        problems.append(f"the network has no {_some(unknown)}")
    if problems:
        raise ConfigError(
            f"{source}: does not fit model.name: {exp.model.name}: {'; '.join(problems)}. Only a head "
            f"({', '.join(parts.model.head)}) may differ. Give weights of the same network, or set the model's keys to "
            "what it was trained with."
        )
    params = {name: given.params[name].detach().to(fresh[name].dtype).contiguous() for name in fresh if name in same}
    wrong = [name for name, value in params.items() if not value.isfinite().all()]
    if wrong:
        raise DataError(f"{source}: holds NaN or infinite values in {_some(wrong)}.")
    return MetaState(params, _running(given, exp, fresh))


def _running(given: MetaState, exp: Experiment, fresh: Params) -> Statistics:
    """Running averages, by the names that models give them."""
    if getattr(exp.algorithm, "inductive_statistics", None) != "running":
        return {}
    buffers = {name: value for name, value in given.buffers.items() if "/" not in name}  # else an algorithm's own
    for name, value in given.params.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("running_mean", "running_var") and name not in fresh:
            buffers[f"{layer}.{kind.removeprefix('running_')}"] = value
    # MAML++ keeps them for every number of inner steps: those of another number, or of one, say nothing to it
    per_step = getattr(exp.algorithm, "per_step_statistics", False)
    leading = (exp.algorithm.adaptation_steps + 1,) if per_step else ()
    buffers = {name: value for name, value in buffers.items() if value.shape[:-1] == leading}
    dtype = next(iter(fresh.values())).dtype
    return {name: value.to(dtype).contiguous() for name, value in buffers.items()}


def _read(exp: Experiment, source: str) -> MetaState:
    if exp.training.init_from is None and not exp.model.in_a_file:
        return MetaState(exp.model.download(), {})
    if source.startswith(IN_A_REGISTRY):
        from pipeline.tracking import Tracker

        return _model_folder(Tracker().fetch_model(source))
    place = storage.location(source)
    if source.endswith((SAFE, *PICKLED)):
        return _state_file(place)
    if (place / MODEL_FILE).exists():
        return _model_folder(place)
    try:
        run = runs.find_run(place)
    except DataError:
        raise ConfigError(
            f"training.init_from: {source} is no state file (.safetensors, .pt, .pth), no model's folder and no run's. "
            "A registered model is written models:/NAME@champion or models:/NAME/VERSION."
        ) from None
    return _best_of(run)


def _best_of(run: RunFolder) -> MetaState:
    step = run.checkpoints.best()
    if step is None:
        step = run.checkpoints.latest()
    if step is None:
        raise ConfigError(f"training.init_from: the run {run.path} has no checkpoint yet. Train it first.")
    return run.checkpoints.load_meta(step)


def _model_folder(folder: storage.Location) -> MetaState:
    return split_state(_tensors(folder / MODEL_STATE_FILE))


def _state_file(place: storage.Location) -> MetaState:
    tensors = _tensors(place)
    if tensors and all(name.startswith(("params/", "buffers/")) for name in tensors):
        return split_state(tensors)  # of a model of this package
    return MetaState(tensors, {})


def _tensors(place: storage.Location) -> dict[str, Tensor]:
    """The named tensors in a file. Raises ConfigError: it is not there. DataError: it holds anything else."""
    try:
        content = place.read_bytes()
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read ({error.strerror or error}).") from error
    try:
        if place.name.endswith(SAFE):
            return safetensors.torch.load(content)
        loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises to load it all the same
        raise DataError(
            f"{place}: holds something else than tensors and plain values, so it is not loaded. Save a state dict: "
            "torch.save(network.state_dict(), FILE)."
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: not a state file ({reason}).") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise DataError(f"{place}: is no state dict (names and tensors), nor one under the key state_dict.")
    return dict(loaded)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
