"""The weighted column sum of a layer's attention as a fused Triton kernel (Eq. 3).

A softmax is divided by a sum over the whole row, so two launches are needed: the first leaves the log-sum-exp of each
query row, the second computes the attention again, tile by tile, and adds up its columns. Extra memory is
2 * B * H * T floats, and no tile leaves the chip. A program owns its rows (first launch) or columns (second), which
makes the result deterministic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ivtp.core.tap import AttentionTap


def weighted_column_sum(tap: AttentionTap, weights: Tensor) -> Tensor:
    """`weights` (B, T) times the head-averaged attention (T, T) of a layer's tokens: (B, T), float32, without gradient.

    A query row that sees no key (padding) adds nothing, whatever its weight.
    """
    query, key = tap.query.detach(), tap.token_key.detach()
    batch, heads, length, width = query.shape
    log_sums = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    partial = torch.empty_like(log_sums)  # (B, H, T): column sums of each head
    # half precision goes to the tensor cores as it is; the interpreter, which runs kernels on a CPU, lacks bfloat16
    half = (torch.float16, torch.bfloat16) if query.is_cuda else (torch.float16,)
    wide = query.dtype not in half or key.dtype != query.dtype
    block, warps = (32, 8) if wide else (64, 4)  # up to d = 256 no register spills and 99 KiB of shared memory suffice
    columns = max(16, triton.next_power_of_2(width))  # no product is narrower
    scale = tap.scale * math.log2(math.e)  # powers of 2 are cheaper than those of e
    layer = (query, key, *query.stride(), *key.stride(), scale, length, _flat(tap.valid), _flat(tap.hidden_from_last))
    shape = (heads // key.shape[1], width, columns, block, tap.causal, wide)
    grid = (triton.cdiv(length, block), heads, batch)
    options = {"num_warps": warps, "enable_fp_fusion": True}  # Triton 3.9 warns where the second is left to it
    with torch.cuda.device_of(query):  # a launch goes to the current device, which need not be the layer's
        _log_sum_exp[grid](*layer, log_sums, *shape, **options)
        _column_sums[grid](*layer, log_sums, weights.float().contiguous(), partial, *shape, **options)
    return partial.mean(dim=1)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


@triton.jit(do_not_specialize=["length"])  # each cut changes the length; it is no reason to compile again
def _log_sum_exp(
    query,  # (B, H, T, d)
    key,  # (B, H_kv, T, d)
    query_batch,  # strides
    query_head,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    scale,
    length,
    valid,  # (B, T) or None
    hidden_from_last,  # (B, T) or None
    log_sums,  # (B, H, T) to base 2, written
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_batch + head.to(tl.int64) * query_head
    key += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    queries = start + tl.arange(0, BLOCK)
    rows = _vectors(query, queries, length, query_row, query_column, WIDTH, COLUMNS, WIDE)  # (BLOCK, COLUMNS)
    # finite, so that the differences below are no NaN where a row has seen no key yet
    peak = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    stop = tl.minimum(start + BLOCK, length) if CAUSAL else length
    for first in range(0, stop, BLOCK):
        keys = first + tl.arange(0, BLOCK)
        others = _vectors(key, keys, length, key_row, key_column, WIDTH, COLUMNS, WIDE)  # (BLOCK, COLUMNS)
        logits = tl.dot(rows, tl.trans(others), input_precision="ieee") * scale  # (queries, keys)
        seen = _visible(queries[:, None], keys[None, :], batch, length, valid, hidden_from_last, CAUSAL)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    log_sum = peak + tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(log_sums + (batch * tl.num_programs(1) + head) * length + queries, log_sum, mask=queries < length)


@triton.jit(do_not_specialize=["length"])
def _column_sums(
    query,  # (B, H, T, d)
    key,  # (B, H_kv, T, d)
    query_batch,  # strides
    query_head,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    scale,
    length,
    valid,  # (B, T) or None
    hidden_from_last,  # (B, T) or None
    log_sums,  # (B, H, T)
    weights,  # (B, T)
    partial,  # (B, H, T), written
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_batch + head.to(tl.int64) * query_head
    key += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    log_sums += (batch * tl.num_programs(1) + head) * length
    partial += (batch * tl.num_programs(1) + head) * length
    weights += batch * length
    keys = start + tl.arange(0, BLOCK)
    # keys are the rows of a tile here: a sum along rows stays within a warp
    rows = _vectors(key, keys, length, key_row, key_column, WIDTH, COLUMNS, WIDE)  # (BLOCK, COLUMNS)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start if CAUSAL else 0, length, BLOCK):
        queries = first + tl.arange(0, BLOCK)
        others = _vectors(query, queries, length, query_row, query_column, WIDTH, COLUMNS, WIDE)  # (BLOCK, COLUMNS)
        logits = tl.dot(rows, tl.trans(others), input_precision="ieee") * scale  # (keys, queries)
        seen = _visible(queries[None, :], keys[:, None], batch, length, valid, hidden_from_last, CAUSAL)
        logits = tl.where(seen, logits, float("-inf"))
        log_sum = tl.load(log_sums + queries, mask=queries < length, other=0.0)
        weight = tl.load(weights + queries, mask=queries < length, other=0.0)
        total += tl.sum(tl.exp2(logits - log_sum[None, :]) * weight[None, :], 1)
    tl.store(partial + keys, total, mask=keys < length)


@triton.jit
def _vectors(
    pointer, places, length, stride, stride_column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Rows `places` of one head's (T, d), filled up to COLUMNS with zeros: (places, COLUMNS)."""
    columns = tl.arange(0, COLUMNS)
    inside = (places[:, None] < length) & (columns[None, :] < WIDTH)
    tile = tl.load(pointer + places[:, None] * stride + columns[None, :] * stride_column, mask=inside, other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _visible(queries, keys, batch, length, valid, hidden_from_last, CAUSAL: tl.constexpr):
    """True where a query sees a key; one of both stands in rows, the other in columns."""
    seen = (keys < length) & (queries < length)
    if CAUSAL:
        seen &= keys <= queries
    if valid is not None:
        seen &= tl.load(valid + batch * length + keys, mask=keys < length, other=0) != 0
    if hidden_from_last is not None:
        shown = tl.load(hidden_from_last + batch * length + keys, mask=keys < length, other=0) == 0
        seen &= (queries != length - 1) | shown
    return seen
