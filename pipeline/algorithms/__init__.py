"""The registry of algorithms: one line each. An algorithm's section builds it."""

from pipeline.algorithms.maml import MAMLConfig

ALGORITHMS = (MAMLConfig,)
