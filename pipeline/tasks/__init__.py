"""The registry of task families: one line each. A family's section builds it."""

from pipeline.tasks.images import ImagesConfig
from pipeline.tasks.regression import RegressionConfig
from pipeline.tasks.sinusoid import SinusoidConfig

TASK_FAMILIES = (ImagesConfig, SinusoidConfig, RegressionConfig)
