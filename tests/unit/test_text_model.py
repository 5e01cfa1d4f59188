"""The text model: sums of embeddings, their derivatives, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import keys
from pipeline.models.bag import bag
from pipeline.models.text import Text, TextConfig

TASKS, EXAMPLES, LENGTH, ROWS, UNITS = 2, 3, 5, 7, 4


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def numbers(high: int = ROWS) -> Tensor:
    return torch.randint(0, high, (TASKS, EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))


def one_by_one(table: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([(t[r] * (r != 0).unsqueeze(-1)).sum(1) for t, r in zip(table, rows, strict=True)])


def test_bags_are_sums_of_rows_with_their_derivatives() -> None:
    table, rows = random(TASKS, ROWS, UNITS).requires_grad_(), numbers()
    torch.testing.assert_close(bag(table, rows), one_by_one(table, rows))
    torch.autograd.gradcheck(lambda t: bag(t, rows), table)
    torch.autograd.gradgradcheck(lambda t: bag(t, rows).sin(), table)


def test_a_table_of_all_tasks_gets_the_sum_of_their_gradients_and_each_task_its_own() -> None:
    shared, rows, weights = random(ROWS, UNITS).requires_grad_(), numbers(), random(TASKS, EXAMPLES, UNITS)
    expanded = shared.expand(TASKS, ROWS, UNITS)
    each, whole = torch.autograd.grad((bag(expanded, rows) * weights).sum(), (expanded, shared))
    copies = shared.detach().repeat(TASKS, 1, 1).requires_grad_()
    (expected,) = torch.autograd.grad((one_by_one(copies, rows) * weights).sum(), copies)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(whole, expected.sum(0))


def model(**options: Any) -> Text:
    config = TextConfig(name="text", **{"buckets": ROWS, "embedding": UNITS, **options})
    return config.build(input_shape=(LENGTH,), num_outputs=3, dtype=torch.float64)


def of_tasks(made: Text) -> dict[str, Tensor]:
    return {k: torch.stack([v * (1 + 0.1 * t) for t in range(TASKS)]) for k, v in made.init(0).items()}


@pytest.mark.parametrize("hidden", [[], [6]])
def test_features_are_scaled_sums_and_tasks_do_not_see_each_other(hidden: list[int]) -> None:
    made = model(hidden=hidden)
    params, x = of_tasks(made), numbers(high=1000)
    assert list(params) == made.parameter_names
    features, _ = made.features(params, x)
    rows = torch.where(x == 0, 0, 1 + (x - 1) % ROWS)
    expected = one_by_one(params["embedding.weight"], rows) / (rows > 0).sum(-1, keepdim=True).sqrt()
    if hidden:
        layer = torch.einsum("tni,toi->tno", expected, params["layer1.weight"])
        expected = (layer + params["layer1.bias"][:, None]).relu()
    torch.testing.assert_close(features, expected)
    outputs, _ = made.apply(params, x)
    for task in range(TASKS):
        alone, _ = made.apply({k: v[task : task + 1] for k, v in params.items()}, x[task : task + 1])
        torch.testing.assert_close(alone[0], outputs[task])


def test_fresh_features_have_unit_variance_however_long_a_text_is() -> None:
    made = model(buckets=5000, embedding=64)
    params = {k: v[None] for k, v in made.init(0).items()}
    for length in (1, 20):
        x = torch.randint(1, 2**31, (1, 100, length), generator=torch.Generator().manual_seed(0))
        x = torch.cat([x, torch.zeros(1, 100, 3, dtype=torch.int64)], dim=-1)  # padding does not count
        assert abs(float(made.features(params, x)[0].var()) - 1) < 0.1


def test_dropped_tokens_follow_from_the_keys_and_are_left_out() -> None:
    made = model(dropout=0.5, buckets=997)
    assert made.stochastic
    params, x = of_tasks(made), numbers(high=1000)
    key = keys.bits(keys.make(3), TASKS)
    dropped, _ = made.features(params, x, keys=key)
    torch.testing.assert_close(made.features(params, x, keys=key)[0], dropped)
    assert not torch.allclose(made.features(params, x)[0], dropped)
    left = keys.uniform(key, EXAMPLES * LENGTH).view(x.shape) >= 0.5
    torch.testing.assert_close(made.features(params, x * left)[0], dropped)


@pytest.mark.parametrize("units", [UNITS, None])
def test_centered_features_are_bags_of_length_one_less_the_center(units: int | None) -> None:
    made = model(embedding=units, center=True)
    params, x = of_tasks(made), numbers(high=1000)
    x[0, 0] = 0  # a text without tokens
    params["center"] = random(TASKS, made.sizes[0])
    rows = torch.where(x == 0, 0, 1 + (x - 1) % ROWS)
    table = params["embedding.weight"]
    if units is None:
        table = torch.diag_embed(table)[..., 1:]
        table[:, 0] = 0
    expected = torch.nn.functional.normalize(one_by_one(table, rows), dim=-1) - params["center"][:, None]
    expected[0, 0] = 0
    torch.testing.assert_close(made.features(params, x)[0], expected)


def test_without_vectors_a_text_is_its_weighted_counts_and_every_derivative_is_right() -> None:
    made = model(embedding=None, buckets=5, hidden=[3])
    assert made.init(0)["embedding.weight"].tolist() == [0, 1, 1, 1, 1, 1]
    made = model(embedding=None, buckets=5, center=True)
    x = torch.tensor([[[1, 1, 3, 0], [5, 2, 6, 1], [0, 0, 0, 0]]])
    weight, center = 1 + random(1, 6).square().requires_grad_(), random(1, 5).requires_grad_()

    def features(weight: Tensor, center: Tensor) -> Tensor:
        return made.features({"embedding.weight": weight, "center": center}, x)[0]

    bags = features(weight, torch.zeros_like(center))[0]
    torch.testing.assert_close(
        bags[0], torch.nn.functional.normalize(weight[0, 1:] * torch.tensor([2, 0, 1, 0, 0]), dim=0)
    )
    torch.autograd.gradcheck(features, (weight, center))
    torch.autograd.gradgradcheck(features, (weight, center))
