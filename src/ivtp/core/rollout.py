"""Attention rollout over a group of layers, one row of it at a time (Eq. 2-4).

Only the row R[reference] of the rollout is ever needed. With r_e = Â_e[reference] the row of the last layer, the row
of the whole product follows from vector-matrix steps r_{l-1} = r_l Â_{l-1}, each a weighted column sum of one
layer's attention that is computed in blocks of query rows. No (T, T) map of all heads is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 128
"""Query rows whose attention is held at a time: extra memory is B * H * BLOCK * T floats."""


@dataclass(frozen=True)
class AttentionTap:
    """The queries, keys and values of one layer, as its attention used them (rotary positions applied)."""

    query: Tensor  # (B, H, T, d)
    key: Tensor  # (B, H_kv, T, d)
    value: Tensor  # (B, H_kv, T, d)
    scale: float
    causal: bool
    valid: Tensor | None = None
    """(B, T) bool: keys that may be seen; None when there is no padding."""
    hidden_from_last: Tensor | None = None
    """(B, T) bool: keys that the last token alone must not see (the answer, when training on it)."""


def attention_row(tap: AttentionTap, reference: int | Tensor) -> Tensor:
    """Head-averaged attention of one query row (Eq. 2): (B, T), float32.

    `reference` may be negative, or name another row for each sample (B,).
    """
    length = tap.query.shape[2]
    if isinstance(reference, Tensor):
        return _row_of_each(tap, reference)
    reference %= length
    row = _attention(tap, tap.key.float(), reference, reference + 1).mean(dim=(1, 2))  # (B, H, 1, seen) -> (B, seen)
    return nn.functional.pad(row, (0, length - row.shape[1]))


def full_width_row(tap: AttentionTap, reference: int) -> Tensor:
    """Attention of one query row with all heads taken as one: softmax over (B, T) of q k^T / sqrt(H d), float32.

    Needs as many key heads as query heads.
    """
    query = tap.query[:, :, reference].float()  # (B, H, d)
    logits = torch.einsum("bhd,bhtd->bt", query, tap.key.float())
    row: Tensor = (logits * (query.shape[1] * query.shape[2]) ** -0.5).softmax(dim=-1)
    return row


def weighted_column_sum(tap: AttentionTap, weights: Tensor, block: int = BLOCK, first: int = 0) -> Tensor:
    """`weights` (B, T) times the head-averaged attention (T, T) of a layer: (B, T), float32.

    Rows before `first`, whose weights are zero, are left out.
    """
    total = torch.zeros_like(weights)
    key = tap.key.float()
    for start in range(first, tap.query.shape[2], block):
        stop = min(start + block, tap.query.shape[2])
        attention = _attention(tap, key, start, stop)  # (B, H, block, seen)
        row = weights[:, None, None, start:stop] @ attention  # (B, H, 1, seen)
        total[:, : row.shape[3]] += row.squeeze(2).mean(dim=1)
    return total


def rollout_row(taps: Sequence[AttentionTap], reference: int | Tensor, aggregation: str = "residual") -> Tensor:
    """Row `reference` of a group's aggregated attention (Eq. 3): (B, T), float32.

    `residual` multiplies (A + I) / 2 over the layers and `multiply` multiplies A, later layers from the left;
    `mean` and `max` combine the layers' rows element-wise; `layer` is the last layer alone.
    """
    last = attention_row(taps[-1], reference)
    if aggregation == "layer":
        return last
    if aggregation in ("mean", "max"):
        rows = torch.stack([attention_row(tap, reference) for tap in taps[:-1]] + [last])
        return rows.mean(dim=0) if aggregation == "mean" else rows.amax(dim=0)
    row = last
    if aggregation == "residual":
        itself = torch.zeros_like(last)
        itself[torch.arange(len(last), device=last.device), reference] = 1.0
        row = (last + itself) / 2
    for tap in reversed(taps[:-1]):
        stepped = weighted_column_sum(tap, row)
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
    query = query.view(batch, tap.key.shape[1], -1, width)  # (B, H_kv, H/H_kv, d)
    logits = (query @ tap.key.float().transpose(2, 3) * tap.scale).view(batch, heads, length)
    hidden = torch.zeros(batch, length, dtype=torch.bool, device=row.device)
    if tap.causal:
        hidden = torch.arange(length, device=row.device) > row[:, None]
    if tap.valid is not None:
        hidden = hidden | ~tap.valid
    return logits.masked_fill(hidden[:, None], torch.finfo(logits.dtype).min).softmax(dim=-1).mean(dim=1)


def _attention(tap: AttentionTap, key: Tensor, start: int, stop: int) -> Tensor:
    """softmax(Q K^T * scale + M) for the query rows start..stop: (B, H, stop - start, seen), float32.

    `key` is the tap's in float32. A causal layer's rows see no key from `stop` on: seen = `stop`, else T.
    """
    batch, heads, length, width = tap.query.shape
    seen = stop if tap.causal else length
    key = key[:, :, :seen]
    query = tap.query[:, :, start:stop].float().reshape(batch, key.shape[1], -1, width)  # (B, H_kv, H/H_kv * block, d)
    logits = (query @ key.transpose(2, 3) * tap.scale).view(batch, heads, stop - start, seen)
    hidden = _hidden_keys(tap, start, stop, seen)
    if hidden is not None:
        # the most negative number, not -inf: a row without any visible key (padding) must stay free of NaN
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


def _hidden_keys(tap: AttentionTap, start: int, stop: int, seen: int) -> Tensor | None:
    """(B or 1, 1, stop - start, seen) bool, True where a query must not see a key; None when all is visible."""
    hidden: Tensor | None = None
    if tap.causal:
        keys = torch.arange(seen, device=tap.query.device)
        hidden = (keys > keys[start:stop, None])[None, None]  # (1, 1, block, seen)
    if tap.valid is not None:
        padding = ~tap.valid[:, None, None, :seen]  # (B, 1, 1, seen)
        hidden = padding if hidden is None else hidden | padding
    if tap.hidden_from_last is not None and stop == tap.query.shape[2]:
        last = torch.zeros(stop - start, 1, dtype=torch.bool, device=tap.query.device)
        last[-1] = True
        blind = tap.hidden_from_last[:, None, None, :] & last  # (B, 1, block, seen)
        hidden = blind if hidden is None else hidden | blind
    return hidden
