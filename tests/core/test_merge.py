"""Pooling of the patch grid."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.merge import nearest_grid, pool_grid


def test_sixty_four_of_24_by_24_is_8_by_8() -> None:
    assert nearest_grid(64, 24, 24) == (8, 8)
    assert nearest_grid(576, 24, 24) == (24, 24)
    assert nearest_grid(1, 24, 24) == (1, 1)


@given(st.integers(1, 36))
def test_the_grid_is_the_nearest_there_is(tokens: int) -> None:
    rows, columns = nearest_grid(tokens, 6, 6)
    nearest = min(abs(r * c - tokens) for r in range(1, 7) for c in range(1, 7))
    assert abs(rows * columns - tokens) == nearest


def test_a_cell_is_the_mean_of_its_patches() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)
    pooled, centres, sources = pool_grid(patches, (4, 4), (2, 2))
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert centres.tolist() == [0, 2, 8, 10]
    assert sources.view(4, 4)[:2].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2]]


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_patch_has_a_representative_that_stays(rows: int, columns: int) -> None:
    _, centres, sources = pool_grid(torch.zeros(1, 36, 2), (6, 6), (rows, columns))
    assert len(set(centres.tolist())) == rows * columns
    assert set(sources.tolist()) == set(centres.tolist())


def test_the_full_grid_changes_nothing() -> None:
    patches = torch.randn(2, 36, 3, generator=torch.Generator().manual_seed(0))
    pooled, centres, _ = pool_grid(patches, (6, 6), (6, 6))
    assert torch.equal(pooled, patches)
    assert centres.tolist() == list(range(36))
