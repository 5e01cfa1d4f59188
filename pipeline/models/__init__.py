"""The registry of models: one line each. A model's section builds it."""

from pipeline.models.conv4 import Conv4Config
from pipeline.models.mlp import MLPConfig
from pipeline.models.module import ModuleConfig
from pipeline.models.resnet12 import ResNet12Config
from pipeline.models.text import TextConfig
from pipeline.models.torchvision_model import TorchvisionConfig

MODELS = (Conv4Config, MLPConfig, TextConfig, ResNet12Config, TorchvisionConfig, ModuleConfig)
