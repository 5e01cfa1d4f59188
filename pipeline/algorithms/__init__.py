"""The registry of algorithms: one line each. An algorithm's section builds it."""

from pipeline.algorithms.anil import ANILConfig, BOILConfig
from pipeline.algorithms.lstm_meta_learner import LSTMMetaLearnerConfig
from pipeline.algorithms.maml import MAMLConfig

ALGORITHMS = (MAMLConfig, ANILConfig, BOILConfig, LSTMMetaLearnerConfig)
