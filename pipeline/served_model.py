"""The script that MLflow keeps with a registered model (models-from-code): it names the object that answers."""

import mlflow

from pipeline.serving import PyfuncLearner

mlflow.models.set_model(PyfuncLearner())
