"""A trained meta-initialization in a folder: load -> adapt(support) -> predict(query). Knows no MLflow.

    learner = Learner.from_folder(folder)              # or serving.load("models:/omniglot-5w1s@champion")
    adapted = learner.adapt(support_x, support_y)      # arrays [S, C, H, W] in 0…1 and labels [S]
    probabilities = adapted.predict(query_x)           # [Q, classes], columns in the order of adapted.labels

A model's folder holds `model.json` (architecture, algorithm, shapes, preprocessing, origin) and
`meta_params.safetensors`: no pickle. Prediction is inductive unless asked otherwise: one query's answer never
depends on the other queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import config
from pipeline.config import Section
from pipeline.datasets.image_folder import class_folders
from pipeline.datasets.preprocessing import Preprocessing, open_picture, pictures_in
from pipeline.errors import DataError
from pipeline.experiment import AlgorithmSection, Experiment, ModelSection
from pipeline.runs import joined_state, split_state
from pipeline.shown import Shown, shown
from pipeline.tasks.objectives import OBJECTIVES
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tokens import Tokens
from pipeline.types import MetaState, Normalization

MODEL_FILE, STATE_FILE = "model.json", "meta_params.safetensors"


class ModelCard(Section):
    """`model.json`: everything but the numbers."""

    format_version: Literal[1] = 1
    name: str
    model: ModelSection
    algorithm: AlgorithmSection
    objective: Literal["classification", "regression"]
    input_shape: list[int]
    num_outputs: int = Field(ge=1)  # classes an episode may have, or the dimension of the regression target
    dtype: Literal["float32", "float64"]
    normalization: Normalization  # in training; prediction says its own
    preprocessing: Annotated[Preprocessing | Tokens | TableEncoding, Field(discriminator="kind")] | None
    # of pictures, texts or rows of a table; None where inputs are arrays as they are
    n_way: int | None
    k_shot: int
    data_digest: str
    training_classes: list[str]  # sha256 of each meta-training class's images; empty where there are no classes
    checkpoint: dict[str, Any]  # lineage: run folder's name, step, sha256
    experiment: dict[str, Any]  # the configuration it was trained with


def write_model(folder: Path, card: ModelCard, state: MetaState) -> None:
    """Write a model's folder: the card and the meta-parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    save_file(joined_state(state), folder / STATE_FILE)


def card_of(
    experiment: Experiment,
    *,
    objective: str,
    input_shape: Sequence[int],
    num_outputs: int,
    preprocessing: dict[str, Any] | None,
    data_digest: str,
    training_classes: Sequence[str] = (),
    checkpoint: dict[str, Any],
) -> ModelCard:
    """The card of a model trained by `experiment`."""
    content = experiment.to_dict()
    tasks = tasks_of(content["task"])
    return config.validate(
        ModelCard,
        {
            "name": experiment.name,
            "model": content["model"],
            "algorithm": content["algorithm"],
            "objective": objective,
            "input_shape": list(input_shape),
            "num_outputs": num_outputs,
            "dtype": experiment.training.dtype,
            "normalization": content["algorithm"].get("normalization", "transductive"),
            "preprocessing": preprocessing,
            "n_way": max(task.get("eval_n_way") or task.get("n_way") or 0 for task in tasks) or None,
            "k_shot": max(task.get("eval_k_shot") or task["k_shot"] for task in tasks),
            "data_digest": data_digest,
            "training_classes": list(training_classes),
            "checkpoint": checkpoint,
            "experiment": content,
        },
        source="model card",
        stored=True,
    )


def tasks_of(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of a task's families: of a mixture those of its sets, else its own."""
    return [part["task"] for part in task["sets"]] if "sets" in task else [task]


class Learner:
    """A meta-initialization, ready to adapt."""

    def __init__(self, card: ModelCard, state: MetaState) -> None:
        self.card = card
        self.state = state
        self.objective = OBJECTIVES[card.objective]
        self.dtype: torch.dtype = getattr(torch, card.dtype)
        self.model = card.model.build(
            input_shape=tuple(card.input_shape), num_outputs=card.num_outputs, dtype=self.dtype
        )
        self.algorithm = card.algorithm.build(model=self.model, objective=self.objective)

    @classmethod
    def from_folder(cls, folder: Path) -> Learner:
        """Raises DataError: the folder is not a model's, or a part of it is damaged."""
        try:
            content = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / STATE_FILE)
        except Exception as error:
            raise DataError(f"{folder}: not a whole model of this package ({error}).") from error
        card = config.validate(ModelCard, content, source=str(folder / MODEL_FILE), stored=True)
        return cls(card, split_state(tensors))

    def adapt(
        self,
        support_x: Any,
        support_y: Sequence[Any] | np.ndarray | Tensor,
        *,
        adaptation_steps: int | None = None,
    ) -> AdaptedLearner:
        """Adapt to a support set: x [S, *input_shape] (images in 0…1) and y [S] labels of any kind, or [S, D] targets.

        A model of texts takes S strings, one of tables S rows: an array [S, columns], a DataFrame or a list of dicts.
        adaptation_steps: by default as in evaluation. Fewer classes than in training leave the other outputs unused;
        more are for algorithms whose head is made for the episode (`any_way`). Classes may differ in examples.

        Raises DataError: wrong shapes or values, one class only, or more classes than the head has outputs.
        """
        examples = shown(support_x, self.card.preprocessing, self.card.input_shape, self.dtype)
        x = examples.support
        steps = self.algorithm.eval_steps if adaptation_steps is None else adaptation_steps
        if steps < 0:
            raise DataError(f"adaptation_steps: {steps} is negative; give 0 or more.")
        labels, y = self._targets(support_y, len(x))
        classes = len(labels) if labels else None
        (adapted,) = self.algorithm.adaptation_path(
            self.state, x[None], y[None], steps=steps, inductive=True, num_classes=classes, last_only=True
        )
        return AdaptedLearner(self, adapted, labels, examples)

    def adapt_folder(self, folder: str | Path, *, adaptation_steps: int | None = None) -> AdaptedLearner:
        """Adapt to pictures: a folder per class (FOLDER/CLASS/*.png), of any size. Raises DataError."""
        files = [(name, file) for name, path in class_folders(Path(folder)).items() for file in pictures_in(path)]
        if len({name for name, _ in files}) < 2:
            raise DataError(f"{folder}: holds the pictures of one class only. Adapting needs a folder for each of two.")
        return self.adapt(
            self.pictures(file for _, file in files), [name for name, _ in files], adaptation_steps=adaptation_steps
        )

    def pictures(self, files: Iterable[str | Path]) -> np.ndarray:
        """Picture files -> float [N, C, H, W] in 0…1, with size and polarity as in training. Raises DataError."""
        if not isinstance(self.card.preprocessing, Preprocessing):
            raise DataError(f"{self.card.name}: was not trained on pictures; call adapt with what it was trained on.")
        arrays = [self.card.preprocessing(open_picture(file)) for file in files]
        return np.stack(arrays).transpose(0, 3, 1, 2).astype(np.float32) / 255

    def _targets(self, y: Any, examples: int) -> tuple[list[Any], Tensor]:
        values = np.asarray(y)
        if len(values) != examples:
            raise DataError(f"support_y: {len(values)} entries for {examples} examples in support_x.")
        if self.card.objective == "regression":
            targets = torch.as_tensor(values).to(self.dtype).reshape(examples, -1)
            if targets.shape[1] != self.card.num_outputs:
                raise DataError(f"support_y: expected {self.card.num_outputs} values each, got {targets.shape[1]}.")
            return [], targets
        labels, positions = np.unique(values, return_inverse=True)
        if len(labels) < 2:
            raise DataError("support_y: the support set holds one class only; adapting needs two or more.")
        if len(labels) > self.card.num_outputs and not self.algorithm.any_way:
            raise DataError(
                f"support_y: {len(labels)} classes, but {self.card.name} was trained for {self.card.num_outputs}-way "
                f"tasks: its head has that many outputs. Give at most {self.card.num_outputs} classes, or train with "
                "a larger task.n_way."
            )
        return labels.tolist(), torch.from_numpy(positions.reshape(-1).astype(np.int64))


class AdaptedLearner:
    """A learner after its support set. `labels` names the columns of its probabilities (empty for regression)."""

    def __init__(self, learner: Learner, adapted: Any, labels: list[Any], examples: Shown) -> None:
        self.learner = learner
        self.labels = labels
        self._examples = examples
        self._adapted = adapted

    def predict(self, query_x: Any, *, normalization: Normalization = "inductive") -> np.ndarray:
        """[Q, *input_shape], Q texts or Q rows -> class probabilities [Q, classes], or predicted values [Q, D].

        normalization: inductive (a query's answer does not depend on the other queries) or transductive.
        Raises DataError: wrong shape, or an unknown normalization.
        """
        if normalization not in ("inductive", "transductive"):
            raise DataError(f"normalization: {normalization!r}; choose inductive or transductive.")
        x = self._examples.query(query_x)
        with torch.no_grad():
            outputs = self.learner.algorithm.predict(self._adapted, x.unsqueeze(0), normalization)[0]
            used = outputs[:, : len(self.labels)] if self.labels else outputs
            return self.learner.objective.answers(used).numpy()

    def predict_pictures(
        self, files: Sequence[str | Path], *, normalization: Normalization = "inductive"
    ) -> np.ndarray:
        """Class probabilities [files, classes] of picture files. Raises DataError."""
        return self.predict(self.learner.pictures(files), normalization=normalization)
