"""The registry of algorithms: one line each. An algorithm's section builds it."""

from pipeline.algorithms.anil import ANILConfig, BOILConfig
from pipeline.algorithms.imaml import IMAMLConfig
from pipeline.algorithms.lstm_meta_learner import LSTMMetaLearnerConfig
from pipeline.algorithms.maml import MAMLConfig
from pipeline.algorithms.maml_plus_plus import MAMLPlusPlusConfig
from pipeline.algorithms.mann import MANNConfig
from pipeline.algorithms.matching import MatchingConfig
from pipeline.algorithms.meta_curvature import MetaCurvatureConfig
from pipeline.algorithms.meta_sgd import MetaSGDConfig
from pipeline.algorithms.proto_maml import ProtoMAMLConfig
from pipeline.algorithms.protonet import ProtoNetConfig
from pipeline.algorithms.reptile import ReptileConfig
from pipeline.algorithms.transfer import TransferConfig

ALGORITHMS = (
    MAMLConfig,
    ANILConfig,
    BOILConfig,
    ReptileConfig,
    IMAMLConfig,
    MetaSGDConfig,
    MAMLPlusPlusConfig,
    MetaCurvatureConfig,
    LSTMMetaLearnerConfig,
    TransferConfig,
    MANNConfig,
    ProtoMAMLConfig,
    ProtoNetConfig,
    MatchingConfig,
)
