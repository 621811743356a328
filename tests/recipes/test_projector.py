"""The projector computes the same in its trained form and in transformers' form."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recipes.micro.projector import Projector


def stock_output(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = nn.functional.gelu(nn.functional.linear(x, weights["linear_1.weight"], weights["linear_1.bias"]))
    return nn.functional.linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])


@given(seed=st.integers(0, 1000), size=st.floats(0.1, 100))
def test_standardising_changes_nothing_that_is_computed(seed: int, size: float) -> None:
    torch.manual_seed(seed)
    projector, x = Projector(8, 6).double(), size * torch.randn(5, 8).double() + 3
    before = projector(x)
    for _ in range(2):
        projector.standardise(x.mean(0), x.std(0))
        torch.testing.assert_close(projector(x), before)
        torch.testing.assert_close(stock_output(projector.stock(), x), before)
    torch.testing.assert_close(Projector.from_weights(projector.stock()).double()(x), before, rtol=1e-5, atol=1e-5)


def test_a_standardised_projector_reads_features_of_unit_size() -> None:
    x = 50 * torch.randn(1000, 8) + 20
    projector = Projector(8, 6)
    weight = projector.linear_1.weight.clone()
    projector.standardise(x.mean(0), x.std(0))
    assert (projector.linear_1.weight / weight).mean() > 40
