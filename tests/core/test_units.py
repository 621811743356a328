"""Columns of several tokens against full matrices, whose rows are averaged and whose columns are added up."""

from __future__ import annotations

import pytest
import torch
from attention_maps import full_map, full_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ivtp.core.rollout import attention_row, full_width_row, received, rollout_row, weighted_column_sum
from ivtp.core.select import take
from ivtp.core.tap import AttentionTap
from ivtp.core.units import Units


def members(units: Units, tokens: int) -> Tensor:
    """(columns, T), float64: which tokens each column is made of, one by one."""
    rows = [[place] for place in range(units.lead)]
    rows += [list(range(start, start + units.size)) for start in range(units.lead, tokens, units.size)]
    table = torch.zeros(len(rows), tokens, dtype=torch.float64)
    for column, own in enumerate(rows):
        table[column, own] = 1
    return table


def pooled(full: Tensor, units: Units) -> Tensor:
    """(B, columns, columns) of (B, T, T): a column pays the mean of its tokens, and receives their sum."""
    table = members(units, full.shape[-1])
    return table / table.sum(dim=1, keepdim=True) @ full @ table.T


@st.composite
def layers(draw: st.DrawFn) -> list[AttentionTap]:
    """Layers of an encoder, or of a decoder, grouped heads included."""
    units = Units(draw(st.integers(1, 4)), draw(st.integers(0, 1)))
    length = units.lead + units.size * draw(st.integers(1, 6))
    group, causal = draw(st.sampled_from([1, 2])), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def vectors(heads: int) -> Tensor:
        return 2 * torch.randn(2, heads, length, 8, generator=generator)

    return [
        AttentionTap(vectors(4), vectors(4 // group), vectors(4 // group), 8**-0.5, causal, units=units)
        for _ in range(draw(st.integers(1, 3)))
    ]


def columns_of(tap: AttentionTap) -> int:
    return tap.units.columns(tap.query.shape[2])


@settings(max_examples=40)
@given(layers(), st.data())
def test_a_row_of_any_column_is_that_of_the_full_map(taps: list[AttentionTap], data: st.DataObject) -> None:
    last = columns_of(taps[0]) - 1
    own = data.draw(st.lists(st.integers(0, last), min_size=2, max_size=2))
    full = pooled(full_map(taps[0]), taps[0].units)
    for reference in (own[0], own[0] - last - 1, torch.tensor(own)):
        expected = full[torch.arange(2), torch.as_tensor(reference)]
        torch.testing.assert_close(attention_row(taps[0], reference).double(), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(layers(), st.sampled_from(["residual", "mean", "max", "multiply", "layer"]))
def test_the_rollout_is_one_of_tokens_pooled_at_its_end(taps: list[AttentionTap], aggregation: str) -> None:
    """Of the first column, CLS where there is one, or the last; without a reference the mean of all tokens' rows."""
    units, maps = taps[0].units, [full_map(tap) for tap in taps]
    reference = -1 if taps[0].causal else 0
    own = members(units, maps[0].shape[-1])[reference]
    if aggregation == "max":  # of the column's rows, not of each token's
        rows = torch.stack([own @ full / own.sum() for full in maps]).amax(dim=0)
    else:
        rows = own @ full_rollout(maps, aggregation) / own.sum()
    expected = rows @ members(units, rows.shape[-1]).T
    torch.testing.assert_close(rollout_row(taps, reference, aggregation).double(), expected, atol=1e-5, rtol=1e-4)
    if aggregation != "max":
        whole = full_rollout(maps, aggregation).mean(dim=1) @ members(units, rows.shape[-1]).T
        torch.testing.assert_close(rollout_row(taps, None, aggregation).double(), whole, atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(layers(), st.integers(0, 10_000))
def test_weights_of_columns_are_spread_over_their_tokens(taps: list[AttentionTap], seed: int) -> None:
    tap = taps[0]
    weights = torch.rand(2, columns_of(tap), generator=torch.Generator().manual_seed(seed))
    expected = (weights[:, None].double() @ pooled(full_map(tap), tap.units)).squeeze(1)
    torch.testing.assert_close(weighted_column_sum(tap, weights).double(), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=20)
@given(layers())
def test_a_column_has_the_mean_of_its_tokens_keys_and_values(taps: list[AttentionTap]) -> None:
    tap = taps[0]
    table = members(tap.units, tap.query.shape[2])
    table = table / table.sum(dim=1, keepdim=True)
    torch.testing.assert_close(tap.key.double(), table @ tap.token_key.double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tap.value.double(), table @ tap.token_value.double(), atol=1e-6, rtol=1e-5)
    full = full_map(tap).mean(dim=1) @ members(tap.units, tap.query.shape[2]).T
    torch.testing.assert_close(received(tap).double(), full, atol=1e-5, rtol=1e-4)


def test_one_query_over_the_full_width() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 9, 8, generator=generator).unbind()
    plain = full_width_row(AttentionTap(query, key, key, 1.0, False), 0)
    by_unit = full_width_row(AttentionTap(query, key, key, 1.0, False, units=Units(4, 1)), 0)
    torch.testing.assert_close(by_unit, torch.stack([plain[:, 0], plain[:, 1:5].sum(1), plain[:, 5:].sum(1)], dim=1))


@given(st.integers(1, 4), st.integers(0, 1), st.integers(1, 6), st.data())
def test_units_are_cut_whole(size: int, lead: int, count: int, data: st.DataObject) -> None:
    """What is taken of the tokens has, unit by unit, the means of what is taken of the columns."""
    units = Units(size, lead)
    stay = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    columns = torch.tensor([[*range(lead), *(lead + unit for unit in stay)]])
    tokens = torch.randn(1, lead + count * size, 3, generator=torch.Generator().manual_seed(0))
    left = take(tokens, units.tokens(columns))
    assert left.shape[1] == lead + len(stay) * size
    torch.testing.assert_close(units.mean(left), take(units.mean(tokens), columns))


@pytest.mark.parametrize("lead", [0, 1])
def test_columns_of_single_tokens_are_handed_back_as_they_are(lead: int) -> None:
    units, tokens, index = Units(1, lead), torch.randn(2, 5, 3), torch.tensor([[0, 2]])
    assert units.mean(tokens) is tokens
    assert units.sum(tokens[..., 0]).equal(tokens[..., 0])
    assert units.spread(tokens[..., 0]).equal(tokens[..., 0])
    assert units.tokens(index) is index
