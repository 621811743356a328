"""What resamples patches, against slow references in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivtp.core.resample import context_attention, plane_positions

seeds = st.integers(0, 10_000)


@settings(max_examples=30)
@given(seed=seeds, queries=st.integers(1, 5), patches=st.integers(1, 9), width=st.integers(1, 6))
def test_the_context_is_the_mean_of_what_each_query_finds(seed: int, queries: int, patches: int, width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    query, features = (torch.randn(2, n, width, generator=draw) for n in (queries, patches))
    found = context_attention(query, features)
    for image in range(2):
        total = [0.0] * width
        for q in query[image].tolist():
            logits = [sum(a * b for a, b in zip(q, x, strict=True)) for x in features[image].tolist()]
            shares = [math.exp(logit - max(logits)) for logit in logits]
            for share, x in zip(shares, features[image].tolist(), strict=True):
                for channel in range(width):
                    total[channel] += share / sum(shares) * x[channel] / queries
        assert found[image].tolist() == pytest.approx(total, abs=1e-4)


@settings(max_examples=20)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    side=st.tuples(st.integers(4, 6), st.integers(5, 7)),
    quarter=st.integers(1, 4),
)
def test_a_place_says_where_its_centre_lies(grid: tuple[int, int], side: tuple[int, int], quarter: int) -> None:
    found = plane_positions(grid, side, 4 * quarter).tolist()
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected: list[float] = []
            for cell, cells, size in ((row, grid[0], side[0]), (column, grid[1], side[1])):
                centre = (cell + 0.5) * size / cells - 0.5
                angles = [centre / 10000 ** (k / quarter) for k in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found[row * grid[1] + column] == pytest.approx(expected, abs=1e-4)


def test_a_grid_of_the_patches_own_size_gives_their_places() -> None:
    places = plane_positions((6, 6), (6, 6), 8)
    assert len({tuple(place) for place in places.tolist()}) == 36
    coarse = plane_positions((3, 3), (6, 6), 8)
    nearest = torch.cdist(coarse, places).argmin(dim=1)
    assert all(n // 6 // 2 == i // 3 and n % 6 // 2 == i % 3 for i, n in enumerate(nearest.tolist()))
