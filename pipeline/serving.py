"""Registered models: loading them in Python, and the pyfunc that MLflow serves over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from pipeline.errors import UserError
from pipeline.learner import Learner, ModelCard
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tokens import Tokens

ARTIFACT = "learner"  # the learner's folder among the MLflow model's artifacts
DEFAULT_STEPS = -1  # as in evaluation


def load(uri: str) -> Learner:
    """The registered model at an MLflow URI (`models:/NAME@champion`, `models:/NAME/3`, `runs:/…`) or in a folder.

    Raises TrackingError: no such model or version, or MLflow cannot be reached. DataError: a damaged folder.
    """
    if Path(uri).is_dir():
        return Learner.from_folder(Path(uri))
    from pipeline.tracking import Tracker

    folder = Tracker().fetch_model(uri)
    code = str(folder.parents[1] / "code")  # a user's own network travels with the model
    if code not in sys.path:
        sys.path.append(code)
    return Learner.from_folder(folder)


class PyfuncLearner(PythonModel):
    """The MLflow flavour: support_x, support_y and query_x in, class probabilities (or values) out, adapting each time.

    Parameters: `adaptation_steps` (−1: as in evaluation) and `normalization`.
    """

    def load_context(self, context: Any) -> None:
        self.learner = Learner.from_folder(Path(context.artifacts[ARTIFACT]))

    # no type hint on model_input: MLflow would take it for a schema
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """{"support_x", "support_y", "query_x"} -> [Q, classes], columns in ascending order of the labels.

        Raises MlflowException (HTTP 400): bad input.
        """
        params = params or {}
        steps = params.get("adaptation_steps", DEFAULT_STEPS)
        try:
            adapted = self.learner.adapt(
                model_input["support_x"],
                model_input["support_y"],
                adaptation_steps=None if steps == DEFAULT_STEPS else steps,
            )
            return adapted.predict(model_input["query_x"], normalization=params.get("normalization", "inductive"))
        except UserError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None


def signature(card: ModelCard) -> ModelSignature:
    """The named tensors and parameters of a card's pyfunc.

    Texts are strings. Rows of a table are numbers in the order of the card's columns: NaN where a value is missing, and
    for a category its place among the column's categories, from 0 on.
    """
    number = np.dtype(card.dtype)
    if card.objective == "classification":
        targets = TensorSpec(np.dtype(np.int64), (-1,), "support_y")
    else:
        targets = TensorSpec(number, (-1, card.num_outputs), "support_y")
    if isinstance(card.preprocessing, Tokens):
        one: tuple[np.dtype, tuple[int, ...]] = np.dtype(str), (-1,)
    elif isinstance(card.preprocessing, TableEncoding):
        one = number, (-1, len(card.preprocessing.columns))
    else:
        one = number, (-1, *card.input_shape)
    inputs: list[ColSpec | TensorSpec] = [TensorSpec(*one, "support_x"), targets, TensorSpec(*one, "query_x")]
    params = [
        ParamSpec("adaptation_steps", DataType.long, DEFAULT_STEPS),
        ParamSpec("normalization", DataType.string, "inductive"),
    ]
    return ModelSignature(Schema(inputs), Schema([TensorSpec(number, (-1, -1))]), ParamSchema(params))
