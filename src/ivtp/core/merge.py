"""Tokens that stand for several patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivtp.core.select import highest, on_device, others, put, take


def nearest_grid(tokens: int, rows: int, columns: int) -> tuple[int, int]:
    """The pooled grid (r, c), r <= `rows`, c <= `columns`, whose r * c is nearest to `tokens`.

    Of equally near grids the one whose cells are nearest to square wins, then the larger.
    """
    grids = ((r, c) for r in range(1, rows + 1) for c in range(1, columns + 1))
    return min(grids, key=lambda g: (abs(g[0] * g[1] - tokens), abs(rows / g[0] - columns / g[1]), -g[0] * g[1]))


def pool_grid(patches: Tensor, side: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Average a patch grid down to a coarser one.

    `patches` (B, N, D) in raster order of a `side` = (rows, columns) grid. Returns the pooled tokens (B, r * c, D),
    the patch nearest to the centre of each cell (r * c,) and, for every patch, the one of these that stands for it:
    its own, or that of the first cell that covers it (N,). Cells follow `adaptive_avg_pool2d`: they overlap where the
    grid does not divide the side.
    """
    rows, columns = side
    image = patches.transpose(1, 2).reshape(patches.shape[0], -1, rows, columns)  # (B, D, rows, columns)
    pooled = nn.functional.adaptive_avg_pool2d(image.float(), grid).flatten(2).transpose(1, 2).to(patches.dtype)
    spans = [
        [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        for size, cells in zip(side, grid, strict=True)
    ]
    centres = [
        (top + bottom - 1) // 2 * columns + (left + right - 1) // 2
        for top, bottom in spans[0]
        for left, right in spans[1]
    ]
    cover = [
        next(i for i, (_, stop) in enumerate(spans[0]) if row < stop) * grid[1]
        + next(i for i, (_, stop) in enumerate(spans[1]) if column < stop)
        for row in range(rows)
        for column in range(columns)
    ]
    representatives = on_device(centres, patches.device)
    covering = representatives[on_device(cover, patches.device)]
    return pooled, representatives, covering.index_copy(0, representatives, representatives)


def rounds(tokens: int, keep: int) -> list[int]:
    """Tokens before and behind each round of merging, none of which takes more than half of them; mostly one round."""
    counts = [tokens]
    while counts[-1] > keep:
        counts.append(max(keep, (counts[-1] + 1) // 2))
    return counts


def match_halves(
    metric: Tensor, keep: int, *, protected: int = 0, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which of the tokens (B, T) each goes into, its own index where it is one of the `keep` that stay.

    Bipartite soft matching (ToMe, Bolya et al., ICLR 2023, section 3): the tokens are split in turn, and those of the
    first half that are most similar to one of the second, by the cosine of their `metric` (B, T, d), go into that one;
    in `rounds` where more than half go. Of equally similar ones the lower index goes first. The first `protected`, CLS
    (1) or none (0), stay. `padding` (B, T) bool leaves before all others, the last first, into nothing (-1), and takes
    nothing in. Beside it how distinct each token was before the last round (B, T): 1 - its highest cosine with one of
    the other half, float32.
    """
    batch, tokens, _ = metric.shape
    unit = nn.functional.normalize(metric.float(), dim=-1)
    columns = goes = torch.arange(tokens, device=metric.device).expand(batch, -1)
    distinct = torch.zeros(batch, tokens, device=metric.device, dtype=torch.float32)
    left = columns if padding is None else padding.to(torch.uint8).argsort(dim=1, stable=True)  # behind all others
    for count in rounds(tokens, keep)[1:]:
        first, second = left[:, ::2], left[:, 1::2]
        cosine = take(unit, first) @ take(unit, second).transpose(1, 2)
        if padding is not None:
            hidden = padding.gather(1, left)
            cosine = cosine.masked_fill(hidden[:, ::2].unsqueeze(2) | hidden[:, 1::2].unsqueeze(1), -1.0)
        best, partner = cosine.max(dim=2)
        distinct = distinct.scatter(1, first, 1 - best).scatter(1, second, 1 - cosine.amax(dim=1))
        alike = torch.full(left.shape, float("-inf"), device=left.device, dtype=torch.float32)
        alike[:, ::2] = best
        alike[:, :protected] = float("-inf")
        target = left.clone()
        target[:, ::2] = second.gather(1, partner)
        if padding is not None:
            last_first = 2.0 + torch.arange(left.shape[1], device=left.device)  # above all cosines
            alike, target = torch.where(hidden, last_first, alike), target.masked_fill(hidden, -1)
        stay = others(highest(alike, left.shape[1] - count), left.shape[1])
        target = target.scatter(1, stay, left.gather(1, stay))
        goes = torch.where(goes < 0, -1, columns.scatter(1, left, target).gather(1, goes.clamp_min(0)))
        left = left.gather(1, stay)
    return goes, distinct


def follow(sources: Tensor, patch: Tensor, into: Tensor) -> Tensor:
    """Where every original patch is after columns were merged or dropped.

    `sources` (B, N) names the patch that stands for each one so far (-1: none), `patch` (B, T) that of each column
    (-1: no patch), `into` (B, T) the column that each went into (-1: dropped). Returns the new sources (B, N).
    """
    target = patch.gather(1, into.clamp_min(0)).masked_fill((into < 0) | (patch < 0), -1)  # (B, T)
    lookup = torch.full_like(sources, -1)
    lookup = torch.cat([lookup, lookup[:, :1]], dim=1)  # the last column takes what is no patch
    lookup = lookup.scatter(1, torch.where(patch < 0, sources.shape[1], patch), target)
    lookup[:, -1] = -1
    return lookup.gather(1, torch.where(sources < 0, sources.shape[1], sources))


def sizes(sources: Tensor, patch: Tensor) -> Tensor:
    """How many original patches each column (B, T) stands for, 1 for what is no patch; float32."""
    counts = torch.zeros(sources.shape[0], sources.shape[1] + 1, device=sources.device, dtype=torch.float32)
    counts = counts.scatter_add(
        1, torch.where(sources < 0, sources.shape[1], sources), torch.ones_like(sources).float()
    )
    return torch.where(patch < 0, 1.0, counts.gather(1, patch.clamp_min(0)))


def mean_by_size(hidden: Tensor, into: Tensor, size: Tensor) -> Tensor:
    """What the columns of `hidden` (B, T, D) become when each goes `into` (B, T) another: means weighted by `size`.

    `size` (B, T): how many patches each stands for; what goes into -1 is in no mean. Columns that nothing goes into are
    0. Gradients flow into all that is in a mean (ToMe, section 3).
    """
    count = torch.where(into < 0, 0.0, size).unsqueeze(-1)  # (B, T, 1)
    weighted = hidden.float() * count
    target = into.clamp_min(0).unsqueeze(-1)
    total = torch.zeros_like(weighted).scatter_add(1, target.expand_as(weighted), weighted)
    share = torch.zeros_like(count).scatter_add(1, target, count)
    return (total / share.clamp_min(1)).to(hidden.dtype)


def take_up_neighbours(
    hidden: Tensor, key: Tensor, attention: Tensor, kept: Tensor, neighbours: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """PruMerge's merging: kept patches take up the patches nearest to them, an extra token takes up all dropped ones.

    `hidden` (B, 1 + N, D) with CLS in front, `key` (B, H, 1 + N, d), `attention` (B, N) from CLS, `kept` (B, K)
    patches, K < N. Nearest by the cosine of keys over the full width, among all other patches, kept or dropped; sums
    are of `hidden` as it came, weighted by attention, not normalised. Returns the new hidden states (the extra token at
    the place of the dropped patch with the highest attention), the column (B, 1 + N) that each went into (of a dropped
    one the kept one with the most similar key), and the columns that stay (B, K + 1): `kept` in their order, then the
    extra one.
    """
    patches, weight = hidden[:, 1:], attention.to(hidden.dtype)
    unit = nn.functional.normalize(key.float().transpose(1, 2).flatten(2)[:, 1:], dim=-1)  # (B, N, H * d)
    similarity = take(unit, kept) @ unit.transpose(1, 2)  # (B, K, N)
    others_only = similarity.scatter(2, kept.unsqueeze(-1), float("-inf"))
    near = others_only.argsort(dim=2, descending=True, stable=True)[..., : min(neighbours, patches.shape[1] - 1)]
    goes = torch.zeros_like(similarity, dtype=hidden.dtype).scatter(2, near, 1) * weight.unsqueeze(1)
    merged = take(patches, kept) + goes @ patches
    rest = others(kept, patches.shape[1])  # (B, R)
    left = weight.gather(1, rest)  # (B, R)
    extra = left.unsqueeze(1) @ take(patches, rest)  # (B, 1, D)
    leader = rest.gather(1, left.argmax(dim=1, keepdim=True))  # (B, 1)
    order = torch.cat([kept, leader], dim=1) + 1
    new = put(hidden, order, torch.cat([merged, extra], dim=1))
    alone = (leader + 1).expand(-1, rest.shape[1])
    target = kept.gather(1, take(similarity, rest, dim=2).argmax(dim=1)) + 1 if kept.shape[1] else alone  # (B, R)
    into = torch.full(hidden.shape[:2], -1, device=hidden.device).scatter(1, rest + 1, target)
    return new, into.scatter(1, order, order), order
