"""The Triton kernel on a CPU, in Triton's interpreter. `test_rollout_triton.py` runs this file in a process of its own:

TRITON_INTERPRET=1 python -m pytest --noconftest tests/core/interpreted_rollout.py

since Triton reads the variable when it is imported, and its interpreted and compiled functions do not mix.
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_maps import full_map, taps
from hypothesis import given, settings
from torch import Tensor

from ivtp.core.rollout import column_sum_in_blocks
from ivtp.core.tap import AttentionTap

assert os.environ.get("TRITON_INTERPRET") == "1", "see the top of this file"

from ivtp.core.rollout_triton import weighted_column_sum  # noqa: E402

torch.set_num_threads(1)


def assert_as_torch(layer: tuple[AttentionTap, Tensor]) -> None:
    tap, weights = layer
    found = weighted_column_sum(tap, weights)
    expected = (weights[:, None].double() @ full_map(tap)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, column_sum_in_blocks(tap, weights), atol=1e-6, rtol=1e-5)


@settings(deadline=None, derandomize=True, database=None, max_examples=15)
@given(taps(longest=80))
def test_the_kernel_gives_what_torch_gives(layer: tuple[AttentionTap, Tensor]) -> None:
    assert_as_torch(layer)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(taps(longest=200))
def test_the_kernel_gives_what_torch_gives_on_many_layers(layer: tuple[AttentionTap, Tensor]) -> None:
    assert_as_torch(layer)


def test_rows_that_see_nothing_add_nothing() -> None:
    query = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(40)[None] >= 35
    found = weighted_column_sum(AttentionTap(query, query, query, 0.25, True, valid), torch.ones(1, 40))
    assert (found[~valid] == 0).all()
    torch.testing.assert_close(found.sum(), torch.tensor(5.0))
