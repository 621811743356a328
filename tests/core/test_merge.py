"""Pooling of the patch grid, and which tokens merge: against `naive`, choices index by index."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ivtp.core.merge import match_halves, nearest_grid, pool_grid
from tests.methods import naive

CLEAR = 2e-5
"""A decision that is won by less is left to rounding."""
SOME = settings(max_examples=30)

seeds = st.integers(0, 10_000)
batches = st.integers(1, 3)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clear(gaps: list[float]) -> bool:
    return all(gap > CLEAR for gap in gaps)


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


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 40), data=st.data())
def test_the_most_similar_of_the_first_half_go_into_the_second(
    seed: int, batch: int, length: int, data: st.DataObject
) -> None:
    """One round, with a CLS token that stays and without."""
    metric = normal(seed, batch, length, 4)
    cls = data.draw(st.integers(0, 1))
    removed = data.draw(st.integers(0, (length - cls) // 2))
    gaps: list[float] = []
    expected = [naive.match(sample, removed, gaps, cls)[0] for sample in metric.double().tolist()]
    assume(clear(gaps))
    goes, _ = match_halves(metric, length - removed, protected=cls)
    assert goes.tolist() == expected
    for b in range(batch):
        assert torch.equal(match_halves(metric[b : b + 1], length - removed, protected=cls)[0][0], goes[b])


def test_cls_never_merges() -> None:
    metric = normal(0, 1, 9, 4)
    metric[0, 3] = metric[0, 0]
    goes, _ = match_halves(metric, 3, protected=1)  # two rounds
    assert goes[0, 0] == 0
    assert (goes[0, 1:] != 0).all()
    assert len(set(goes[0].tolist())) == 3


def test_of_equally_similar_tokens_the_first_merge_and_of_padding_the_last_leaves() -> None:
    metric, itself = torch.ones(1, 8, 4), torch.arange(8)
    goes, _ = match_halves(metric, 6)
    assert itself[goes[0] != itself].tolist() == [0, 2]
    padding = torch.tensor([[True, False, True, False, False, True, False, False]])
    goes, _ = match_halves(metric, 6, padding=padding)
    assert goes.tolist() == [[0, 1, -1, 3, 4, -1, 6, 7]]


@SOME
@given(seed=seeds, batch=batches, length=st.integers(1, 40), data=st.data())
def test_what_is_redundant_merges(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    """Also by more than half, and among padding, which leaves first and takes nothing in."""
    metric = normal(seed, batch, length, 4)
    keep = data.draw(st.integers(1, length))
    padding = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    )
    gaps: list[float] = []
    samples = metric.double().tolist()
    expected = [
        naive.merge_redundant(sample, keep, hidden, gaps)
        for sample, hidden in zip(samples, padding.tolist(), strict=True)
    ]
    assume(clear(gaps))
    goes, distinct = match_halves(metric, keep, padding=padding)
    assert goes.tolist() == expected
    itself = torch.arange(length)
    for b in range(batch):
        assert int((goes[b] == itself).sum()) == keep
        assert torch.equal(match_halves(metric[b : b + 1], keep, padding=padding[b : b + 1])[0][0], goes[b])
        stay = goes[b] == itself
        if (stay & padding[b]).any():
            assert stay[~padding[b]].all(), "padding leaves first"
        assert (goes[b][padding[b] & ~stay] == -1).all()
        assert not padding[b][goes[b][~padding[b] & ~stay]].any(), "nothing goes into padding"
    if not padding.any():
        assert torch.equal(goes, match_halves(metric, keep)[0])
        if keep < length <= 2 * keep:  # one round
            for b in range(batch):
                other = [max(row[1 - i % 2 :: 2]) for i, row in enumerate(naive.cosines(samples[b]))]
                expected_distinct = 1 - torch.tensor(other, dtype=torch.float64)
                torch.testing.assert_close(distinct[b].double(), expected_distinct, atol=1e-5, rtol=1e-5)
