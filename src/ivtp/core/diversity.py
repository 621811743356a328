"""Greedy choices of tokens that differ from one another. All take float tensors and return int64 indices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivtp.core.select import take


def cosine(features: Tensor) -> Tensor:
    """Cosine similarity of all pairs of (B, N, D): (B, N, N), float32."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def nearest_better(scores: Tensor, features: Tensor) -> Tensor:
    """Cosine of each of `features` (B, N, D) with the most similar one of a higher score, not below 0: (B, N), float32.

    `scores` (B, N); 0 where none is higher.
    """
    better = scores.unsqueeze(1) > scores.unsqueeze(2)
    return cosine(features).masked_fill(~better, 0.0).amax(dim=2).clamp_min(0)


def max_min(distance: Tensor, count: int) -> Tensor:
    """Points (B, count), in the order of their choice, each the farthest from its nearest among those before it.

    `distance` (B, N, N), symmetric. The first is the point whose nearest neighbour is farthest. Of equals the lower
    index is chosen.
    """
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    loneliest = distance.masked_fill(itself, float("inf")).amin(dim=2).argmax(dim=1)  # (B,)
    return farthest(distance, loneliest.unsqueeze(1), torch.ones_like(loneliest), count)


def farthest(distance: Tensor, given: Tensor, held: Tensor, count: int) -> Tensor:
    """Points (B, count): the first `held` (B,) of each row of `given` (B, k), then each the farthest from those before.

    `distance` (B, N, N), symmetric; a point is as far from a set as from its nearest member. Of equals the lower index
    is chosen; no point comes twice unless it is given twice.
    """
    rows = torch.arange(distance.shape[0], device=distance.device)
    nearest = torch.full_like(distance[:, 0], float("inf"))  # (B, N)
    chosen: list[Tensor] = []
    for step in range(count):
        point = nearest.argmax(dim=1)  # (B,)
        if step < given.shape[1]:
            point = torch.where(held > step, given[:, step], point)
        chosen.append(point)
        nearest = torch.minimum(nearest, distance[rows, point])
        nearest[rows, point] = float("-inf")
    return torch.stack(chosen, dim=1)


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Items (B, count) of a determinantal point process, in the order of their choice.

    `kernel` (B, N, N), positive semi-definite. Each item is the one that raises the determinant most (Chen et al.,
    2018, algorithm 1: incremental Cholesky factors). Beyond the kernel's rank the order is that of rounding errors; no
    item comes twice.
    """
    rows = torch.arange(kernel.shape[0], device=kernel.device)
    size = kernel.diagonal(dim1=1, dim2=2)  # (B, N): squared norms
    gain = size.clone()  # of what the chosen items do not span
    noise = 4 * torch.finfo(kernel.dtype).eps * size
    factors = kernel.new_zeros(kernel.shape[0], count, kernel.shape[1])
    chosen: list[Tensor] = []
    for step in range(count):
        item = gain.argmax(dim=1)  # (B,)
        chosen.append(item)
        before = factors[:, :step]  # (B, step, N)
        known = (before[rows, :, item].unsqueeze(1) @ before).squeeze(1)  # (B, N)
        left = gain[rows, item]
        real = left > noise[rows, item]
        factor = (kernel[rows, item] - known) / torch.where(real, left, 1.0).sqrt().unsqueeze(1)
        factors[:, step] = factor * real.unsqueeze(1)
        gain = gain - factors[:, step].square()
        gain[rows, torch.stack(chosen)] = float("-inf")
    return torch.stack(chosen, dim=1)


def coverage(similarity: Tensor, weight: Tensor, count: int) -> Tensor:
    """Points (B, count), in the order of their choice, each with the largest `weight` times its gain in coverage.

    `similarity` (B, N, M) of every point to what is to be covered, which may be the points themselves; `weight` (B, N)
    non-negative. A set covers a target as well as its most similar member does, but never less than an empty set, with
    0; coverage is the sum over all targets.
    """
    rows = torch.arange(similarity.shape[0], device=similarity.device)
    covered = torch.zeros_like(similarity[:, 0])  # (B, M)
    free = torch.ones_like(weight, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        gain = (similarity - covered.unsqueeze(1)).clamp_min(0).sum(dim=2)  # (B, N) of every candidate
        point = (gain * weight).masked_fill(~free, -1.0).argmax(dim=1)
        chosen.append(point)
        covered = torch.maximum(covered, similarity[rows, point])
        free[rows, point] = False
    return torch.stack(chosen, dim=1)


def drop_duplicates(features: Tensor, count: int, step: int) -> Tensor:
    """Which `count` of (B, R, D) are left, when the most similar ones go, at most `step` a round.

    A round compares the first, third, fifth ... with the second, fourth ...: those of the former whose best cosine
    with one of the latter is highest go. What stays of the former, the most similar first, comes before the latter in
    the next round, and in the result.
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    left = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)  # (B, R)
    while left.shape[1] > count:
        first, second = left[:, ::2], left[:, 1::2]
        if not second.shape[1]:  # one token is left, and none may stay
            return left[:, :0]
        gone = min(step, left.shape[1] - count, first.shape[1])
        best = (take(unit, first) @ take(unit, second).transpose(1, 2)).amax(dim=2)  # (B, len(first))
        order = best.argsort(dim=1, descending=True, stable=True)[:, gone:]
        left = torch.cat([first.gather(1, order), second], dim=1)
    return left
