"""Groups of records that are alike, in an order that a resumed run finds again."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ivtp.training.sampling import GroupedSampler


@given(
    records=st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=60),
    group=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_groups_are_of_one_modality_and_leave_nobody_out(
    records: list[tuple[int, bool]], group: int, seed: int
) -> None:
    lengths, shown = [length for length, _ in records], [image for _, image in records]
    sampler = GroupedSampler(lengths, shown, group, seed)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert set(order) == set(range(len(records)))
    for start in range(0, len(order), group):
        assert len({shown[place] for place in order[start : start + group]}) == 1
    filled = {kind: -sum(image is kind for image in shown) % group for kind in (True, False)}
    assert len(order) == len(records) + sum(filled.values())
    assert max(lengths) in [lengths[place] for place in order[:group]]
    assert order == list(GroupedSampler(lengths, shown, group, seed))


def test_lengths_of_a_group_are_close_and_epochs_differ() -> None:
    lengths = [place % 100 for place in range(800)]
    sampler = GroupedSampler(lengths, [True] * 800, 8, 0)
    first = list(sampler)
    spread = [max(part) - min(part) for part in ([lengths[i] for i in first[s : s + 8]] for s in range(0, 800, 8))]
    assert sum(spread) / len(spread) < 10  # 80 at random
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert Counter(second) == Counter(first)
