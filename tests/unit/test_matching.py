"""Matching networks against a loop over tasks, queries and support examples."""

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.matching import MatchingConfig
from pipeline.models.mlp import MLPConfig
from pipeline.tasks.objectives import Classification
from pipeline.types import TaskBatch

TASKS, CLASSES, INPUTS = 2, 3, 4


def test_meta_gradient_agrees_with_a_sequential_reference() -> None:
    """Attention over the support set by cosine, summed over each class's labels; unbalanced support sets."""
    scale = 4.0
    model = MLPConfig(name="mlp", hidden=[6]).build(input_shape=(INPUTS,), num_outputs=9, dtype=torch.float64)
    algorithm = MatchingConfig(name="matching", scale=scale).build(model=model, objective=Classification())
    generator = torch.Generator().manual_seed(1)

    def x(examples: int) -> Tensor:
        return torch.randn(TASKS, examples, INPUTS, generator=generator, dtype=torch.float64)

    support_y = torch.tensor([[0, 2, 1, 1, 0, 0], [2, 2, 2, 0, 1, 2]])
    query_y = torch.tensor([[0, 1, 2, 1], [1, 0, 0, 2]])
    batch = TaskBatch(x(6), support_y, x(4), query_y, classes=torch.zeros(TASKS, CLASSES, dtype=torch.int64))
    state = algorithm.init(0)
    state.params["layer1.bias"] += 1  # features that are not all zero
    gradient = algorithm.meta_grad(state, batch, step=0)

    leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    total = torch.zeros((), dtype=torch.float64)
    probabilities = torch.zeros(TASKS, 4, CLASSES, dtype=torch.float64)
    for task in range(TASKS):
        support, query = (
            (part[task] @ leaves["layer1.weight"].T + leaves["layer1.bias"]).clamp_min(0)
            for part in (batch[0], batch[2])
        )
        for i, q in enumerate(query):
            cosines = torch.stack([(q @ s) / (q.norm() * s.norm()) for s in support])
            attention = (scale * cosines).softmax(0)
            p = torch.stack([attention[support_y[task] == label].sum() for label in range(CLASSES)])
            probabilities[task, i] = p.detach()
            total = total - p[query_y[task, i]].log() / len(query)
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert set(gradient.grads) == {"layer1.weight", "layer1.bias"}
    assert float(gradient.metrics["meta_loss"]) == pytest.approx(float(total.detach()), rel=1e-12)
    for name, want in expected.items():
        torch.testing.assert_close(gradient.grads[name], want, rtol=1e-10, atol=1e-12, msg=name)

    (adapted,) = algorithm.adaptation_path(
        state, batch.support_x, support_y, steps=0, inductive=True, num_classes=CLASSES
    )
    answers = Classification().answers(algorithm.predict(adapted, batch.query_x, "inductive"))
    torch.testing.assert_close(answers, probabilities, rtol=1e-10, atol=1e-12)


def test_an_episode_without_a_number_of_classes_has_the_models() -> None:
    model = MLPConfig(name="mlp", hidden=[6]).build(input_shape=(INPUTS,), num_outputs=9, dtype=torch.float64)
    algorithm = MatchingConfig(name="matching").build(model=model, objective=Classification())
    x = torch.rand(1, 9, INPUTS, dtype=torch.float64)
    (adapted,) = algorithm.adaptation_path(algorithm.init(0), x, torch.arange(9)[None], steps=0, inductive=True)
    assert algorithm.predict(adapted, x, "inductive").shape == (1, 9, 9)
