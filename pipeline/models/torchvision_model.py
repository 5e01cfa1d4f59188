"""torchvision's classification networks, from random or pretrained weights.

The network is torchvision's own with a head for the episode's classes; its parameters keep torchvision's names, so
that a state dict of that library fits. `weights` is resolved once, by the driver (`pipeline/initial.py`): the workers
and a registered model get the numbers from the run, and need neither the file nor the network.

Inputs in 0…1 are normalized by ImageNet's mean and deviation, as torchvision's weights expect, and images with one
channel are repeated to three.

BatchNorm: `episode` normalizes by the statistics of the pass, like the package's own networks; `pretrained` by the
running statistics that came with the weights, as a frozen network in evaluation mode does. With few images per
episode the second is the steadier one where the images resemble those of the pretraining, and the worse one elsewhere.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config import Section
from pipeline.errors import ConfigError
from pipeline.kernels import Kernel, Precision
from pipeline.models.module import Batching, BatchNormStatistics, ModuleModel
from pipeline.storage import absolute
from pipeline.types import Inputs, Params

NO_WEIGHTS = "none"
STATE_FILES = (".pt", ".pth", ".safetensors")
ENUM_NAME = re.compile(r"\w+\.\w+")  # of torchvision, e.g. ResNet18_Weights.IMAGENET1K_V1
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


class TorchvisionConfig(Section):
    """A network of torchvision.models."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images",)

    name: Literal["torchvision"]
    architecture: str = Field(pattern=r"^\w+$", examples=["resnet18", "resnet50"])
    weights: str = NO_WEIGHTS
    # none, a state file (.pt, .pth, .safetensors), or torchvision's name (ResNet18_Weights.IMAGENET1K_V1), which is
    # downloaded unless it is in torch's cache
    batch_norm: BatchNormStatistics = "episode"  # what it normalizes by; pretrained: statistics that come with weights
    batching: Batching = "auto"  # of tasks, as for model.name: module
    dropout: bool = False  # in meta-training, where the network has any

    @field_validator("weights", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return NO_WEIGHTS if value is None else value

    @model_validator(mode="after")
    def _weights_are_a_name_or_a_file(self) -> Self:
        if self.weights != NO_WEIGHTS and not self.in_a_file and not ENUM_NAME.fullmatch(self.weights):
            raise ValueError(
                f"weights: {self.weights!r} is neither none, nor a file ({', '.join(STATE_FILES)}), nor a name like "
                "ResNet18_Weights.IMAGENET1K_V1"
            )
        return self

    @property
    def in_a_file(self) -> bool:
        return self.weights.endswith(STATE_FILES)

    def build(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: Kernel = "auto",
        precision: Precision = "float32",
    ) -> ModuleModel:
        """The network, whose `init` is random: `weights` come from the run.

        Raises ConfigError: no such architecture, or it cannot take the task's images.
        """
        kernels.only_stock_ops(self.name, kernel, precision)
        if len(input_shape) != 3 or input_shape[0] not in (1, 3):
            raise ConfigError(
                f"model.name: torchvision's networks take images of 1 or 3 channels, the task has inputs "
                f"{list(input_shape)}."
            )

        def make() -> nn.Module:
            import torchvision

            try:
                module: nn.Module = torchvision.models.get_model(
                    self.architecture, weights=None, num_classes=num_outputs
                )
            except ValueError as error:
                raise ConfigError(
                    f"model.architecture: {self.architecture!r} is no classification network of torchvision ({error})."
                ) from error
            for buffer, values in (("input_mean", MEAN), ("input_deviation", DEVIATION)):
                module.register_buffer(
                    buffer, torch.tensor(values, dtype=torch.float64).view(3, 1, 1), persistent=False
                )
            module.register_forward_pre_hook(_as_pretrained)
            return module

        model = ModuleModel(make, dtype=dtype, batching=self.batching, dropout=self.dropout, batch_norm=self.batch_norm)
        model.check(input_shape, num_outputs, name=self.architecture, key="model.architecture")
        return model

    def absolute(self) -> TorchvisionConfig:
        """With an absolute path of the weights: a run is resumed from any folder."""
        return self.model_copy(update={"weights": absolute(self.weights)}) if self.in_a_file else self

    def download(self) -> Params:
        """The state dict of torchvision's own weights by `weights`' name, from torch's cache or the network.

        Raises ConfigError: no such name, or it is to be had from neither.
        """
        import torchvision

        try:
            choices = torchvision.models.get_model_weights(self.architecture)
        except ValueError as error:
            raise ConfigError(f"model.architecture: {self.architecture!r} is not torchvision's ({error}).") from error
        kind, _, name = self.weights.partition(".")
        if kind != choices.__name__ or name not in choices.__members__:
            names = ", ".join(f"{choices.__name__}.{member}" for member in choices.__members__)
            raise ConfigError(f"model.weights: {self.weights} is none of {self.architecture}'s: {names}.")
        try:
            return dict(choices[name].get_state_dict(progress=False, check_hash=True, map_location="cpu"))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"model.weights: {self.weights} is not in torch's cache ({torch.hub.get_dir()}) and cannot be "
                f"downloaded ({error}). Give a state file, fetch it where there is a network, or set weights: none."
            ) from error


def _as_pretrained(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Images [N, 1 or 3, H, W] in 0…1 -> [N, 3, H, W] as ImageNet's were when the weights were trained."""
    return (inputs[0] - module.get_buffer("input_mean")) / module.get_buffer("input_deviation")
