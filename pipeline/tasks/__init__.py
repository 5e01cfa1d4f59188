"""The registry of task families: one line each, in `mixture.ONE_SET`. A family's section builds it."""

from pipeline.tasks.mixture import ONE_SET, MixtureConfig

TASK_FAMILIES = (*ONE_SET, MixtureConfig)
