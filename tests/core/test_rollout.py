"""Rollout rows against full matrices (Eq. 2-4)."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from attention_maps import full_map, full_rollout, taps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ivtp.core import rollout
from ivtp.core.rollout import (
    attention_row,
    column_sum_in_blocks,
    importance,
    past_mass,
    rollout_row,
    weighted_column_sum,
)
from ivtp.core.tap import AttentionTap

AGGREGATIONS = ("residual", "mean", "max", "multiply", "layer")


def make_taps(
    seed: int, layers: int, length: int, *, causal: bool, padding: int = 0, groups: int = 2
) -> list[AttentionTap]:
    generator = torch.Generator().manual_seed(seed)
    valid = None
    if padding:
        valid = torch.ones(2, length, dtype=torch.bool)
        valid[1, :padding] = False

    def draw(heads: int) -> Tensor:
        return torch.randn(2, heads, length, 8, generator=generator) * 2

    return [AttentionTap(draw(4), draw(4 // groups), draw(4 // groups), 8**-0.5, causal, valid) for _ in range(layers)]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    length=st.integers(2, 40),
    causal=st.booleans(),
    padding=st.integers(0, 1),
    groups=st.sampled_from([1, 2, 4]),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_the_row_is_the_row_of_the_product(
    seed: int, layers: int, length: int, causal: bool, padding: int, groups: int, aggregation: str
) -> None:
    taps = make_taps(seed, layers, length, causal=causal, padding=padding, groups=groups)
    reference = -1 if causal else 0
    if padding and not causal:
        reference = length - 1  # row 1's first token is padding: it is no reference
    row = rollout_row(taps, reference, aggregation)
    expected = full_rollout([full_map(tap) for tap in taps], aggregation)[:, reference]
    torch.testing.assert_close(row.double(), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    length=st.integers(2, 40),
    aggregation=st.sampled_from([a for a in AGGREGATIONS if a != "max"]),  # the highest of mean rows is another thing
)
def test_without_a_reference_the_row_is_the_mean_of_the_products_rows(
    seed: int, layers: int, length: int, aggregation: str
) -> None:
    taps = make_taps(seed, layers, length, causal=False)
    expected = full_rollout([full_map(tap) for tap in taps], aggregation).mean(dim=1)
    torch.testing.assert_close(rollout_row(taps, None, aggregation).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["residual", "multiply", "mean"])
def test_rows_still_sum_to_one(aggregation: str) -> None:
    row = rollout_row(make_taps(3, 3, 20, causal=True, padding=4), -1, aggregation)
    torch.testing.assert_close(row.sum(1), torch.ones(2))


@given(taps(longest=40, blockwise=True), st.integers(1, 50))
def test_the_column_sum_is_that_of_the_full_map_whatever_the_block(
    layer: tuple[AttentionTap, Tensor], block: int
) -> None:
    tap, weights = layer
    expected = (weights[:, None].double() @ full_map(tap)).squeeze(1)
    found = column_sum_in_blocks(tap, weights, block)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, weighted_column_sum(tap, weights), atol=1e-6, rtol=1e-5)


@given(taps(longest=40, blockwise=True), st.data())
def test_a_row_is_that_of_the_full_map(layer: tuple[AttentionTap, Tensor], data: st.DataObject) -> None:
    """Of one number for all samples, and of a number for each; a row that sees no key is nobody's."""
    tap, _ = layer
    batch, length = tap.query.shape[0], tap.query.shape[2]
    rows = data.draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    full = full_map(tap)
    each, same = attention_row(tap, torch.tensor(rows)), attention_row(tap, rows[0])
    for sample, row in enumerate(rows):
        for found, place in ((each, row), (same, rows[0])):
            if full[sample, place].sum() > 0:
                torch.testing.assert_close(found[sample].double(), full[sample, place], atol=1e-6, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    causal=st.booleans(),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_no_tensor_is_as_large_as_the_maps(
    batch: int, groups: int, key_heads: int, causal: bool, aggregation: str
) -> None:
    length, heads = 512, groups * key_heads
    key = torch.randn(batch, length, key_heads, 8).transpose(1, 2)
    tap = AttentionTap(torch.randn(batch, length, heads, 8).transpose(1, 2), key, key, 8**-0.5, causal)
    with LargestTensor() as largest:
        rollout_row([tap, tap], 0, aggregation)
    assert 0 < largest.elements < batch * heads * length * length


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    past=st.integers(1, 80),
    length=st.integers(1, 70),
    padding=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 4]),
    softcap=st.sampled_from([None, 2.0]),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_behind_a_cache_a_row_is_that_of_the_whole(
    seed: int, past: int, length: int, padding: int, groups: int, softcap: float | None, aggregation: str
) -> None:
    """No new token is seen by a cached one: the rows of the new ones are enough."""
    whole = make_taps(seed, 3, past + length, causal=True, padding=min(padding, past), groups=groups)
    whole = [dataclasses.replace(tap, softcap=softcap) for tap in whole]
    taps = [
        AttentionTap(
            *(part[:, :, past:] for part in (tap.query, tap.key, tap.value)),
            tap.scale,
            causal=True,
            softcap=softcap,
            past=past_mass(
                tap.query[:, :, past:],
                tap.key[:, :, :past],
                tap.scale,
                None if tap.valid is None else tap.valid[:, :past],
                softcap,
            ),
        )
        for tap in whole
    ]
    row = rollout_row(taps, length - 1, aggregation)
    torch.testing.assert_close(row, rollout_row(whole, -1, aggregation)[:, past:], atol=1e-5, rtol=1e-4)
    each = torch.tensor([length - 1, length // 2])
    torch.testing.assert_close(
        attention_row(taps[0], each), attention_row(whole[0], past + each)[:, past:], atol=1e-5, rtol=1e-4
    )


def test_torch_takes_over_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, device = rollout._fused_column_sum.__wrapped__, torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose(device) is None


def test_the_answer_is_hidden_from_the_last_row_alone() -> None:
    (tap,) = make_taps(7, 1, 12, causal=True)
    answer = torch.zeros(2, 12, dtype=torch.bool)
    answer[:, 8:11] = True
    blind = AttentionTap(tap.query, tap.key, tap.value, tap.scale, True, None, answer)
    assert (attention_row(blind, -1)[answer] < 1e-6).all()
    torch.testing.assert_close(attention_row(blind, 10), attention_row(tap, 10))


def test_importance_is_a_share_among_visual_tokens() -> None:
    """Eq. 4 by hand: two visual tokens with equal attention, one with twice the value norm."""
    row = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    value = torch.zeros(1, 2, 4, 3)
    value[0, 0, 1] = torch.tensor([3.0, 0.0, 0.0])
    value[0, 1, 1] = torch.tensor([0.0, 4.0, 0.0])  # norm 5 over both heads
    value[0, 0, 2, 0] = 10.0
    value[0, 0, 0, 0] = 99.0  # CLS does not count
    visual = torch.tensor([[False, True, True, False]])
    torch.testing.assert_close(importance(row, value, visual), torch.tensor([[0.0, 1 / 3, 2 / 3, 0.0]]))


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_graph_holds_the_column_sum_uncompiled(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 70, 8).unbind()
    valid = torch.arange(70) >= torch.tensor([[0], [9]]) if padded else None
    tap, weights = AttentionTap(query, key, value, 8**-0.5, causal=True, valid=valid), torch.rand(2, 70)
    expected, compiling = column_sum_in_blocks(tap, weights), []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return column_sum_in_blocks(*arguments, **options)

    monkeypatch.setattr(rollout, "column_sum_in_blocks", watched)
    compiled = torch.compile(weighted_column_sum, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tap, weights), expected)
    assert compiling == [False]
