"""Attention rollout over a group of layers, one row of it at a time (Eq. 2-4).

Only the row R[reference] of the rollout is ever needed. With r_e = Â_e[reference] the row of the last layer, the row
of the whole product follows from vector-matrix steps r_{l-1} = r_l Â_{l-1}, each a weighted column sum of one
layer's attention. On CUDA a fused kernel computes it tile by tile (`rollout_triton.py`), elsewhere torch in blocks of
query rows; neither holds the (T, T) maps of a long sequence.

Where several tokens form a unit (`AttentionTap.units`), every step is one of tokens, and what a function takes and
gives is by unit: attention that a unit receives is the sum over its tokens, attention that it pays their mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.core.tap import AttentionTap

FEWEST_ROWS, MOST_ROWS = 64, 256
"""Query rows whose attention torch holds at a time: extra memory is B * H * rows * T floats."""
CELLS = 2**22
"""Floats that these rows should not exceed: more than a processor's cache (16 MiB) is slower, not faster."""


def attention_row(tap: AttentionTap, reference: int | Tensor | None) -> Tensor:
    """Head-averaged attention of one query row (Eq. 2): (B, columns), float32, without gradient.

    `reference` may be negative, or name another row for each sample (B,); None is the mean of all tokens' rows.
    """
    return tap.units.sum(_row(tap, reference))


def received(tap: AttentionTap) -> Tensor:
    """(B, columns) attention that each column receives, averaged over heads and all tokens' queries; float32."""
    return attention_row(tap, None)


@torch.no_grad()
def _row(tap: AttentionTap, reference: int | Tensor | None) -> Tensor:
    """`attention_row` for each token: (B, T)."""
    alone = tap.units.size == 1 or (isinstance(reference, int) and 0 <= reference < tap.units.lead)
    if reference is None or not alone:
        return _column_sum(tap, _weights_of(tap, reference))
    # one product with the keys, O(T) of memory: torch is as good as a kernel of our own on every device
    length = tap.query.shape[2]
    if isinstance(reference, Tensor):
        return _row_of_each(tap, reference)
    reference %= length
    attention = _attention(tap, _flat_key(tap), reference, reference + 1, _room(tap, rows=1))  # (B, H, 1, seen)
    row = attention.mean(dim=(1, 2))
    return nn.functional.pad(row, (0, length - row.shape[1]))


def _weights_of(tap: AttentionTap, reference: int | Tensor | None) -> Tensor:
    """(B, T) the tokens' shares in a reference: evenly those of one column, or of all tokens (None)."""
    batch, _, length, _ = tap.query.shape
    device = tap.query.device
    if reference is None:
        return torch.full((batch, length), 1 / length, device=device, dtype=torch.float32)
    itself = torch.zeros(batch, tap.units.columns(length), device=device, dtype=torch.float32)
    itself[torch.arange(batch, device=device), reference] = 1.0
    return tap.units.spread(itself)


def full_width_row(tap: AttentionTap, reference: int) -> Tensor:
    """Attention of one token's query with all heads taken as one: softmax(q k^T / sqrt(H d)), (B, columns), float32.

    Needs as many key heads as query heads.
    """
    query = tap.query[:, :, reference].float()  # (B, H, d)
    logits = torch.einsum("bhd,bhtd->bt", query, tap.token_key.float())
    row: Tensor = (logits * (query.shape[1] * query.shape[2]) ** -0.5).softmax(dim=-1)
    return tap.units.sum(row)


def weighted_column_sum(tap: AttentionTap, weights: Tensor, first: int = 0) -> Tensor:
    """`weights` (B, columns) times the head-averaged attention of a layer: (B, columns), float32, without gradient.

    Rows before `first` have the weight 0 and may be left out.
    """
    return tap.units.sum(_column_sum(tap, tap.units.spread(weights), first))


def _column_sum(tap: AttentionTap, weights: Tensor, first: int = 0) -> Tensor:
    """`weighted_column_sum` of tokens: `weights` (B, T) times (T, T)."""
    plain = tap.blocks is None and tap.softcap is None and tap.past is None  # the kernel knows none of them
    fused = _fused_column_sum(tap.query.device) if tap.query.is_cuda and plain else None
    if fused:
        return fused(tap, weights)
    if torch.compiler.is_compiling():
        seen = tap.causal, tap.valid, tap.hidden_from_last, tap.blocks, tap.softcap, tap.past
        parts = tap.query, tap.token_key, tap.scale, *seen
        uncompiled: Tensor = _uncompiled_column_sum(*parts, weights, first)
        return uncompiled
    return column_sum_in_blocks(tap, weights, first=first)


@torch.no_grad()
def column_sum_in_blocks(tap: AttentionTap, weights: Tensor, block: int | None = None, first: int = 0) -> Tensor:
    """`weights` (B, T) times the attention (T, T) of the tokens in plain torch, `block` query rows at a time."""
    batch, heads, length, _ = tap.query.shape
    block = block or min(max(CELLS // (batch * heads * length), FEWEST_ROWS), MOST_ROWS)
    total = torch.zeros_like(weights)
    key = _flat_key(tap)
    room = _room(tap, min(block, length))
    for start in range(first, length, block):
        stop = min(start + block, length)
        attention = _attention(tap, key, start, stop, room)  # (B, H, block, seen)
        row = weights[:, None, None, start:stop] @ attention  # (B, H, 1, seen)
        total[:, : row.shape[3]] += row.squeeze(2).mean(dim=1)
    return total


@torch.library.custom_op("ivtp::column_sum", mutates_args=())
def _uncompiled_column_sum(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    valid: Tensor | None,
    hidden_from_last: Tensor | None,
    blocks: Tensor | None,
    softcap: float | None,
    past: Tensor | None,
    weights: Tensor,
    first: int,
) -> Tensor:
    """`column_sum_in_blocks` as one operator of a compiled graph.

    Compiled, it would take twice as long: Inductor gives up the memory that the blocks share.
    """
    tap = AttentionTap(query, key, key, scale, causal, valid, hidden_from_last, blocks, softcap, past)
    return column_sum_in_blocks(tap, weights, first=first)


@_uncompiled_column_sum.register_fake
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[-2])


def rollout_row(taps: Sequence[AttentionTap], reference: int | Tensor | None, aggregation: str = "residual") -> Tensor:
    """Row `reference` of a group's aggregated attention (Eq. 3), or the mean of its rows (None): (B, columns), float32.

    `residual` multiplies (A + I) / 2 over the layers and `multiply` multiplies A, later layers from the left;
    `mean` and `max` combine the layers' rows element-wise; `layer` is the last layer alone.
    """
    return taps[-1].units.sum(_rolled_out(taps, reference, aggregation))


def _rolled_out(taps: Sequence[AttentionTap], reference: int | Tensor | None, aggregation: str) -> Tensor:
    """`rollout_row` for each token: (B, T)."""
    last = _row(taps[-1], reference)
    if aggregation == "layer":
        return last
    if aggregation in ("mean", "max"):
        rows = torch.stack([_row(tap, reference) for tap in taps[:-1]] + [last])
        return rows.mean(dim=0) if aggregation == "mean" else rows.amax(dim=0)
    row = (last + _weights_of(taps[-1], reference)) / 2 if aggregation == "residual" else last
    for tap in reversed(taps[:-1]):
        stepped = _column_sum(tap, row)
        row = (stepped + row) / 2 if aggregation == "residual" else stepped
    return row


def importance(row: Tensor, value: Tensor, visual: Tensor) -> Tensor:
    """Share of each visual token in the reference's attention, weighted by value norms (Eq. 4).

    `row` (B, T), `value` (B, H_kv, T, d) of the group's last layer, `visual` (B, T) bool. Returns (B, T), float32,
    summing to 1 over the visual tokens of a sample and 0 elsewhere.
    """
    norms: Tensor = torch.linalg.vector_norm(value.float(), dim=(1, 3))  # (B, T), all heads concatenated
    weighted = row * norms * visual
    total: Tensor = weighted.sum(dim=1, keepdim=True)
    return weighted / total.clamp_min(torch.finfo(weighted.dtype).tiny)


def _row_of_each(tap: AttentionTap, row: Tensor) -> Tensor:
    """`attention_row` of another row (B,) for each sample."""
    batch, heads, length, width = tap.query.shape
    query = tap.query[torch.arange(batch, device=row.device), :, row].float()  # (B, H, d)
    query = query.view(batch, tap.token_key.shape[1], -1, width)  # (B, H_kv, H/H_kv, d)
    logits = (query @ tap.token_key.float().transpose(2, 3) * tap.scale).view(batch, heads, length)
    logits = _capped(logits, tap.softcap)
    hidden = torch.zeros(batch, length, dtype=torch.bool, device=row.device)
    if tap.causal:
        hidden = torch.arange(length, device=row.device) > row[:, None]
    if tap.blocks is not None:
        hidden = hidden & ~_in_one_block(tap.blocks, tap.blocks.gather(1, row[:, None]))
    if tap.valid is not None:
        hidden = hidden | ~tap.valid
    if tap.hidden_from_last is not None:
        hidden = hidden | (tap.hidden_from_last & (row == length - 1)[:, None])
    logits = logits.masked_fill(hidden[:, None], torch.finfo(logits.dtype).min)
    attention = logits.softmax(dim=-1)
    if tap.past is not None:
        past = tap.past.gather(2, row[:, None, None].expand(-1, heads, 1))  # (B, H, 1)
        attention = attention * _own_share(logits.unsqueeze(2), past).squeeze(2)
    return attention.mean(dim=1)


@functools.cache
def _fused_column_sum(device: torch.device) -> Callable[[AttentionTap, Tensor], Tensor] | None:
    """The Triton version, or None where it cannot run; torch gives the same result."""
    if torch.cuda.get_device_capability(device) < (8, 0):  # Triton's matrix products need an Ampere or later
        return None
    try:
        import triton

        from ivtp.core.rollout_triton import weighted_column_sum as fused

        triton.runtime.driver.active.get_current_target()  # builds Triton's launcher
    except Exception:  # no Triton, or no C compiler, whose absence shows as whatever the build ran into
        return None
    return fused


def _flat_key(tap: AttentionTap) -> Tensor:
    """(B * H_kv, T, d), float32."""
    return tap.token_key.float().flatten(0, 1)


def _room(tap: AttentionTap, rows: int) -> Tensor:
    """Memory for the attention of some query rows: allocated once, since fresh pages cost more than the softmax."""
    batch, heads, length, _ = tap.query.shape
    return torch.empty(batch * heads * rows * length, dtype=torch.float32, device=tap.query.device)


def _attention(tap: AttentionTap, key: Tensor, start: int, stop: int, room: Tensor) -> Tensor:
    """softmax(Q K^T * scale + M) for the query rows start..stop: (B, H, stop - start, seen), float32, in `room`.

    `key` is the tap's as `_flat_key` gives it. A causal layer's rows see no key from `stop` on, unless it has blocks:
    seen = `stop`, else T.
    """
    batch, heads, length, width = tap.query.shape
    seen = stop if tap.causal and tap.blocks is None else length
    query = tap.query[:, :, start:stop].float().reshape(key.shape[0], -1, width)  # (B * H_kv, H/H_kv * block, d)
    logits = room[: batch * heads * (stop - start) * seen].view(key.shape[0], -1, seen)
    torch.baddbmm(logits, query, key[:, :seen].transpose(1, 2), beta=0, alpha=tap.scale, out=logits)
    logits = _capped(logits, tap.softcap).view(batch, heads, stop - start, seen)
    _hide(tap, logits, start)
    if tap.past is None:
        return torch.softmax(logits, dim=-1, out=logits)
    share = _own_share(logits, tap.past[:, :, start:stop])
    return torch.softmax(logits, dim=-1, out=logits).mul_(share)


def _own_share(logits: Tensor, past: Tensor) -> Tensor:
    """(B, H, block, 1) what of the attention with these logits (B, H, block, T) the past (B, H, block) leaves them."""
    return torch.sigmoid(logits.logsumexp(dim=-1, keepdim=True) - past.unsqueeze(-1))


@torch.no_grad()
def past_mass(query: Tensor, key: Tensor, scale: float, valid: Tensor | None, softcap: float | None = None) -> Tensor:
    """`AttentionTap.past` (B, H, T) of queries (B, H, T, d) and the keys (B, H_kv, P, d) of a cache before them.

    `valid` (B, P) bool marks keys that may be seen; None: all. `softcap` is `AttentionTap.softcap`.
    """
    batch, heads, length, width = query.shape
    block = min(max(CELLS // (batch * heads * key.shape[2]), FEWEST_ROWS), MOST_ROWS)
    grouped = query.float().view(batch, key.shape[1], -1, length, width)
    keys = key.float().transpose(2, 3).unsqueeze(2)  # (B, H_kv, 1, d, P)
    found = []
    for start in range(0, length, block):
        logits = grouped[..., start : start + block, :] @ keys * scale  # (B, H_kv, H/H_kv, block, P)
        logits = _capped(logits, softcap)
        if valid is not None:
            logits.masked_fill_(~valid[:, None, None, None], torch.finfo(logits.dtype).min)
        found.append(logits.logsumexp(dim=-1))
    return torch.cat(found, dim=-1).view(batch, heads, length)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, in place, as `AttentionTap.softcap` bends them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _in_one_block(query: Tensor, key: Tensor) -> Tensor:
    """Where the tokens of two tensors of `AttentionTap.blocks` see each other whatever their order."""
    return (query == key) & (query >= 0)


def _hide(tap: AttentionTap, logits: Tensor, start: int) -> None:
    """Write over the logits (B, H, block, seen) of keys that the query rows from `start` on must not see."""
    block, seen = logits.shape[2:]
    # the most negative number, not -inf: a row without any visible key (padding) must stay free of NaN
    lowest = torch.finfo(logits.dtype).min
    if tap.causal:  # earlier keys are seen by all rows of the block
        later = torch.ones(block, seen - start, dtype=torch.bool, device=logits.device).triu(1)
        if tap.blocks is not None:
            rows, keys = tap.blocks[:, start : start + block], tap.blocks[:, start:]
            later = (later & ~_in_one_block(rows.unsqueeze(2), keys.unsqueeze(1))).unsqueeze(1)
        logits[..., start:].masked_fill_(later, lowest)
    if tap.valid is not None:
        logits.masked_fill_(~tap.valid[:, None, None, :seen], lowest)
    if tap.hidden_from_last is not None and start + block == tap.query.shape[2]:
        logits[:, :, -1].masked_fill_(tap.hidden_from_last[:, None], lowest)
