"""Selection of tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.select import keep_highest, put, right_aligned, take

rows = st.integers(1, 4)
columns = st.integers(1, 30)


@given(rows, columns, st.integers(0, 30), st.integers(0, 1000), st.booleans())
def test_the_highest_candidates_stay(batch: int, length: int, count: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, length, generator=generator)
    scores = (scores * 3).round() if ties else scores
    candidates = torch.rand(batch, length, generator=generator) > 0.3
    keep = keep_highest(scores, candidates, count)
    for row in range(batch):
        pool = [i for i in range(length) if candidates[row, i]]
        best = sorted(pool, key=lambda i: (-float(scores[row, i]), i))[:count]
        assert sorted(best) == keep[row].nonzero().flatten().tolist()


def test_each_row_may_have_its_own_count() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    keep = keep_highest(scores, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2]))
    assert keep.tolist() == [[True, False, False], [False, True, True]]


@given(rows, columns, st.integers(0, 30), st.integers(0, 1000), st.booleans())
def test_each_segment_keeps_its_own_highest(batch: int, length: int, count: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, length, generator=generator)
    scores = (scores * 3).round() if ties else scores
    segment = torch.randint(-1, 3, (batch, length), generator=generator)
    keep = keep_highest(scores, segment >= 0, count, segment)
    for row in range(batch):
        best: list[int] = []
        for number in range(3):
            pool = [i for i in range(length) if segment[row, i] == number]
            best += sorted(pool, key=lambda i: (-float(scores[row, i]), i))[:count]
        assert keep[row].nonzero().flatten().tolist() == sorted(best)


@given(rows, columns, st.integers(0, 1000))
def test_kept_columns_end_up_at_the_right_in_order(batch: int, length: int, seed: int) -> None:
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.5
    width = int(keep.sum(1).max())
    index = right_aligned(keep, width)
    for row in range(batch):
        kept = keep[row].nonzero().flatten().tolist()
        assert index[row, width - len(kept) :].tolist() == kept


def test_take_gathers_along_any_dimension() -> None:
    tensor = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    index = torch.tensor([[4, 0], [1, 3]])
    taken = take(tensor, index, dim=2)
    assert torch.equal(taken[0], tensor[0][:, [4, 0]])
    assert torch.equal(taken[1], tensor[1][:, [1, 3]])


@given(st.integers(1, 3), st.integers(1, 6), st.data())
def test_put_is_the_inverse_of_take(batch: int, length: int, data: st.DataObject) -> None:
    count, tail = data.draw(st.integers(0, length)), data.draw(st.sampled_from([(), (4,), (2, 3)]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensor = torch.randn(batch, length, *tail, generator=draw)
    values = torch.randn(batch, count, *tail, generator=draw)
    index = torch.stack([torch.randperm(length, generator=draw)[:count] for _ in range(batch)])
    changed = put(tensor, index, values)
    assert torch.equal(take(changed, index), values)
    for b in range(batch):
        rest = sorted(set(range(length)) - set(index[b].tolist()))
        assert torch.equal(changed[b, rest], tensor[b, rest])
    assert torch.equal(put(changed, index, take(tensor, index)), tensor)
