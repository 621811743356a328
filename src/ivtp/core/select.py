"""Which tokens stay. No function here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Host numbers, or a host tensor as it is, on `device`: the host does not wait for what the device is doing."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_highest(scores: Tensor, candidates: Tensor, count: Tensor | int, segment: Tensor | None = None) -> Tensor:
    """Mark the `count` highest-scored candidates of each row; of equal scores the lower index wins.

    `scores` (B, T), `candidates` (B, T) bool, `count` an int or one per row (B,). With `segment` (B, T) the `count`
    highest of each segment, a number of which only candidates share. Returns (B, T) bool.
    """
    ranked = scores.float().masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    if segment is not None:  # one segment behind the other, each by its scores
        ranked = ranked.gather(1, segment.gather(1, ranked).argsort(dim=1, stable=True))
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, places)
    if segment is not None:
        rank = rank - torch.searchsorted(segment.gather(1, ranked), segment)
    limit = count.unsqueeze(1) if isinstance(count, Tensor) else count
    return candidates & (rank < limit)


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest `scores` (B, N), the highest first; of equal ones the lower index."""
    return scores.float().argsort(dim=1, descending=True, stable=True)[:, :count]


def ranks(chosen: Tensor, length: int) -> Tensor:
    """Scores (B, length) that rank `chosen` (B, k) in its order above all others: k, k - 1, ... 1, and 0."""
    values = torch.arange(chosen.shape[1], 0, -1, device=chosen.device, dtype=torch.float32).expand(chosen.shape)
    return torch.zeros(chosen.shape[0], length, device=chosen.device, dtype=torch.float32).scatter(1, chosen, values)


def others(chosen: Tensor, length: int) -> Tensor:
    """Indices (B, length - k), ascending, of what is not among `chosen` (B, k)."""
    taken = torch.zeros(chosen.shape[0], length, dtype=torch.uint8, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : length - chosen.shape[1]]


def right_aligned(keep: Tensor, length: int) -> Tensor:
    """Indices (B, length) that gather the kept columns of `keep` (B, T) in order, at the right end of each row.

    Rows that keep fewer than `length` columns begin with dropped ones; `keep.gather(1, indices)` tells them apart.
    """
    return keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - length :]


def take(tensor: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather `index` (B, k) along `dim` of `tensor` (B, ..., T, ...) for every other dimension alike."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape[0], index.shape[1]
    sizes = list(tensor.shape)
    sizes[0], sizes[dim] = index.shape
    return tensor.expand(index.shape[0], *tensor.shape[1:]).gather(dim, index.view(shape).expand(sizes))


def put(tensor: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The inverse of `take` along dim 1: `tensor` (B, T, ...) with `values` (B, k, ...) at `index` (B, k).

    Where an index comes twice either value may win.
    """
    shape = index.shape + (1,) * (tensor.dim() - 2)
    return tensor.scatter(1, index.view(shape).expand(values.shape), values)


def iqr_outliers(scores: Tensor) -> Tensor:
    """Marks the `scores` (B, N) above Q3 + 1.5 (Q3 - Q1), quartiles interpolated linearly: (B, N) bool."""
    values = scores.float()
    low, high = (torch.quantile(values, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return values > high + 1.5 * (high - low)
