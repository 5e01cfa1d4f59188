"""The registry of models: one line each. A model's section builds it."""

from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.models.module import ModuleConfig

MODELS = (Conv4Config, MLPConfig, ModuleConfig)
