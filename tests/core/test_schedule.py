"""Schedules: the paper's counts and their bounds."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.schedule import groups, linear, uniform_ratio


def test_the_published_cost_comes_from_these_counts() -> None:
    assert uniform_ratio(576, 64, 12) == [480, 399, 333, 277, 231, 192, 160, 133, 111, 92, 77, 64]


def test_the_last_group_may_be_shorter() -> None:
    assert [list(g) for g in groups(23, 3)][-2:] == [[18, 19, 20], [21, 22]]
    assert len(groups(23, 3)) == 8


@given(st.integers(1, 3000), st.data(), st.integers(1, 40))
def test_counts_never_grow_and_end_at_the_target(tokens: int, data: st.DataObject, steps: int) -> None:
    keep = data.draw(st.integers(1, tokens))
    for counts in (uniform_ratio(tokens, keep, steps), linear(tokens, keep, steps)):
        assert len(counts) == steps
        assert counts[-1] == keep
        assert all(a >= b >= 1 for a, b in pairwise([tokens, *counts]))
