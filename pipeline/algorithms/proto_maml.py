"""Proto-MAML: MAML whose head begins as the classifier by nearest prototype.

Triantafillou, Zhu, Dumoulin, Lamblin, Evci, Xu, Goroshin, Gelada, Swersky, Manzagol, Larochelle 2020, "Meta-Dataset: A
Dataset of Datasets for Learning to Learn from Few Examples". The squared Euclidean distance to a prototype c_w is a
linear layer (Snell et al. 2017, eq. 8): W_w = 2 c_w, b_w = −‖c_w‖² (section 3). Each task's head starts as that, then
all of the network makes MAML's inner steps. The meta-gradient flows through the initialization of the head to the body.

The head is the episode's and no meta-parameter: it has as many rows as the episode has classes.

Disadvantages: MAML's (the graph of the inner steps, a delicate inner rate), and one more pass over the support set. The
head's weights are as large as the features, which makes a good inner rate smaller than MAML's.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pipeline.algorithms.episodic import (
    Support,
    needs_body,
    needs_features,
    network,
    one_hot,
    only_classification,
    per_task,
)
from pipeline.algorithms.gradient_based import FEATURES, GradientBased
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.algorithms.metric_based import class_means, without_head
from pipeline.algorithms.protonet import nearest_prototype
from pipeline.keys import fold
from pipeline.types import MetaState, Objective, Params, TaskModel

OF_PROTOTYPES = 0x70726F746F  # the stream of the pass that makes them, apart from the inner steps'


class ProtoMAMLConfig(InnerLoopConfig):
    """MAML from a head of prototypes."""

    name: Literal["proto_maml"]
    through_initialization: bool = True  # of the head; false: the meta-gradient takes the prototypes as constants

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> ProtoMAML:
        """Raises ConfigError: the task is no classification, or the model has no features, or a head alone."""
        only_classification(self.name, objective)
        needs_features(self.name, model)
        needs_body(self.name, model)
        return ProtoMAML(self, model=model, objective=objective)


class ProtoMAML(GradientBased):
    """Algorithm: inner steps from each task's own head."""

    config: ProtoMAMLConfig
    any_way = True

    def init(self, seed: int) -> MetaState:
        return MetaState(without_head(self.model, seed), {})

    def _initial(self, meta_params: Params, support: Support, keys: Tensor | None) -> Params:
        keys = None if keys is None else fold(keys, OF_PROTOTYPES)
        # by tensors of its own: the inner gradient of the body takes the head as given, not as a function of the body
        features = self.model.features(network(per_task(meta_params, support.tasks)), support.x, keys=keys)[0]
        classes = self._num_outputs if support.num_classes is None else support.num_classes
        prototypes = class_means(features, one_hot(support.y, classes, features.dtype))
        if not self.config.through_initialization:
            prototypes = prototypes.detach().requires_grad_()  # inner steps have a gradient of them all the same
        params = per_task(meta_params, support.tasks)
        params |= dict(zip(self.model.head, nearest_prototype(prototypes), strict=True))
        return params | {FEATURES: features} if self._features_stay() else params
