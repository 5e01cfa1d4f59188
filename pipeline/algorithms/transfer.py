"""Transfer learning: a supervised backbone, frozen, and a new classifier for every episode (Baseline and Baseline++).

Chen, Liu, Kira, Wang, Huang 2019, "A Closer Look at Few-shot Classification", sec. 3.2 and 3.3. The training stage
fits backbone and classifier C(·|W_b) to the meta-train classes by cross-entropy. The fine-tuning stage fixes the
backbone and fits a new classifier C(·|W_n) to the support set by gradient steps.

    linear   Baseline     W^T f(x) + b
    cosine   Baseline++   s · cos(f(x), w_j), one weight vector w_j per class; s is a fixed scale

The outer loop is the training stage: an episode's labels are put back to the classes they stand for
(`TaskBatch.classes`), and the meta-gradient is the derivative of the cross-entropy of its support and query images
over all meta-train classes. Each task's images are normalized by their own batch statistics. The classifier W_b,
"transfer/classifier.weight" [train_classes, F] (and ".bias"), is no part of the adapted learner.

A linear head begins at zero, so that the first steps are the same for every permutation of labels; a cosine head, whose
derivative at zero is undefined, at directions that are the same in every episode. Here every step takes the whole
support set, where the paper draws batches of 4. `fine_tune: all` lets the backbone move as well. With
`inductive_statistics: running` the support set too is normalized by the running averages of pretraining, as a network
in evaluation mode is.

With `training.steps: 0` nothing is pretrained: the weights are those of `training.init_from` or of torchvision.

Disadvantages: nothing prepares the backbone for adaptation; many head steps per episode, each of them with a learning
rate to choose; the pretraining classifier grows with the number of classes, and its labels must be known. Episodes of
few classes make poor batches for supervised training: more tasks per step help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import keys as counters
from pipeline.algorithms.episodic import (
    Support,
    named_gradients,
    needs_features,
    network,
    only_classification,
    per_task,
)
from pipeline.algorithms.gradient_based import FEATURES, GradientBased, linear
from pipeline.algorithms.inner_optimizer import InnerLoopConfig
from pipeline.errors import ConfigError
from pipeline.types import Adapted, MetaGradient, MetaState, Objective, Params, Statistics, TaskBatch, TaskModel

WEIGHT, BIAS = "transfer/classifier.weight", "transfer/classifier.bias"  # [train_classes, F], [train_classes]
RUNNING = "transfer/running/"  # prefix of the running statistics among what steps use
CLASSIFIER_STREAM, HEAD_STREAM = 0x7472616E, 0x68656164  # of the numbers that the classifier and a cosine head begin at


class TransferConfig(InnerLoopConfig):
    """Supervised pretraining, then a new head per episode."""

    name: Literal["transfer"]
    classifier: Literal["linear", "cosine"] = "linear"  # Baseline or Baseline++, in pretraining and in episodes
    cosine_scale: float = Field(default=10.0, gt=0)  # s, of cosines as logits
    fine_tune: Literal["head", "all"] = "head"  # what an episode's steps change
    adaptation_steps: int = Field(default=20, ge=1)
    # of an episode's head; meta-training has no inner steps

    differentiates_steps: ClassVar[bool] = False

    @model_validator(mode="after")
    def _one_normalization(self) -> Self:
        if self.normalization == "inductive":
            raise ValueError(
                "normalization: transfer normalizes support and query images of pretraining together: leave it at "
                "transductive"
            )
        return self

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> Transfer:
        """Raises ConfigError: the task is not a classification, or the model has no head."""
        only_classification(self.name, objective)
        needs_features(self.name, model)
        return Transfer(self, model=model, objective=objective, train_classes=train_classes)


class Transfer(GradientBased):
    """Algorithm: the outer loop is supervised training, the inner loop fits a head.

    train_classes: that meta-training draws from; None where the learner only adapts.
    """

    any_way = True
    config: TransferConfig

    def __init__(
        self, config: TransferConfig, *, model: TaskModel, objective: Objective, train_classes: int | None = None
    ) -> None:
        super().__init__(config, model=model, objective=objective)
        self._train_classes = train_classes

    def init(self, seed: int) -> MetaState:
        state = super().init(seed)
        if self._train_classes is None:
            return state
        like = state.params[self.model.head[0]]
        weight = _directions(counters.make(seed, CLASSIFIER_STREAM), self._train_classes, like)
        classifier = {WEIGHT: weight}
        if self.config.classifier == "linear":
            classifier[BIAS] = weight.new_zeros(self._train_classes)
        return MetaState(state.params | classifier, state.buffers)

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        """Of the cross-entropy over the meta-train classes, mean over an episode's images, summed over episodes."""
        if batch.classes is None or WEIGHT not in state.params:
            raise ConfigError("algorithm.name: transfer trains on classes, and these episodes do not tell theirs.")
        params = {k: v.detach().requires_grad_() for k, v in state.params.items()}
        x = self.model.prepare(torch.cat([batch.support_x, batch.query_x], dim=1))
        y = batch.classes.gather(1, torch.cat([batch.support_y, batch.query_y], dim=1))  # [T, S + Q]
        (keys,) = counters.pass_keys(batch.keys if self.model.stochastic else None, 1)
        tasks = len(y)
        with torch.enable_grad():
            of_model = per_task(network(params), tasks)
            features, observed = self.model.features(of_model, x, observe=self._running, low_precision=True, keys=keys)
            classifier = per_task({k: v for k, v in params.items() if k in (WEIGHT, BIAS)}, tasks)
            outputs = self._classify(features, classifier[WEIGHT], classifier.get(BIAS))
            losses = self.objective.loss(outputs, y)  # [T]
            grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        metrics = {
            "meta_loss": losses.detach().sum(),
            f"train_{self.objective.score_name}": self.objective.score(outputs.detach(), y).sum(),
        }
        statistics = {k: v.detach().sum(dim=0) for k, v in observed.items()}
        return MetaGradient(named_gradients(params, grads), metrics, statistics)

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        params = {k: v for k, v in state.params.items() if k not in (WEIGHT, BIAS)}
        if self._running:
            params |= {RUNNING + k: v for k, v in state.buffers.items()}
        return super().adaptation_path(
            MetaState(params, state.buffers),
            support_x,
            support_y,
            steps=steps,
            inductive=inductive,
            num_classes=num_classes,
            last_only=last_only,
        )

    def _left_alone(self, names: list[str]) -> list[str]:
        body = [name for name in names if name not in self.model.head] if self.config.fine_tune == "head" else []
        return [*self.config.freeze, *body]

    def _start(self, meta_params: Params, support: Support, keys: Tensor | None) -> tuple[Params, Params]:
        """With a new head, whatever the meta-parameters' own is."""
        weight, bias = self.model.head
        like = meta_params[weight]
        classes = support.num_classes or len(like)
        if self.config.classifier == "cosine":
            head = _directions(counters.make(HEAD_STREAM, device=like.device), classes, like)
        else:
            head = like.new_zeros(classes, like.shape[1])
        return super()._start(meta_params | {weight: head, bias: like.new_zeros(classes)}, support, keys)

    def _support_features(self, params: Params, learned: Params, support: Any, keys: Tensor | None) -> Tensor:
        running = {k.removeprefix(RUNNING): v for k, v in learned.items() if k.startswith(RUNNING)}
        return self.model.features(params, support, statistics=running or None, keys=keys)[0]

    def _support_outputs(
        self, adapted: Params, learned: Params, number: int, support: Any, keys: Tensor | None
    ) -> Tensor:
        params = self._params(adapted, learned, number)
        if FEATURES in learned:
            return self._of_head(learned[FEATURES], params)
        return self._of_head(self._support_features(params, learned, support, keys), params)

    def _answer(self, params: Params, query: Any, **how: Any) -> tuple[Tensor, Statistics]:
        features, observed = self.model.features(params, query, **how)
        return self._of_head(features, params), observed

    def _of_head(self, features: Tensor, params: Params) -> Tensor:
        weight, bias = (params[name] for name in self.model.head)
        return self._classify(features, weight, bias)

    def _classify(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Features [T, N, F], weight [T, D, F], bias [T, D] -> [T, N, D]."""
        if self.config.classifier == "linear":
            assert bias is not None
            return linear(features, weight, bias)
        cosines = F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).transpose(1, 2)
        return self.config.cosine_scale * cosines


def _directions(key: Tensor, classes: int, like: Tensor) -> Tensor:
    """[classes, F] uniform in ±1/√F, PyTorch's own start of a linear layer, for weights like `like` [..., F]."""
    features = like.shape[-1]
    drawn = counters.uniform(key, classes * features).view(classes, features).to(like.device, like.dtype)
    return (2 * drawn - 1) / math.sqrt(features)
