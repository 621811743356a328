"""What resamples an image's patches into fewer tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def context_attention(query: Tensor, features: Tensor) -> Tensor:
    """LLaMA-VID's context token (I, D): the mean over M text-guided queries of what each finds among the patches.

    `query` (I, M, D), `features` (I, N, D); `mean(softmax(Q X^T) X)`, without a scale (arXiv 2311.17043, Eq. 1).
    """
    weights = (query @ features.transpose(1, 2)).float().softmax(dim=-1).mean(dim=1)  # (I, N)
    return (weights.unsqueeze(1).to(features.dtype) @ features).squeeze(1)


def plane_positions(grid: tuple[int, int], side: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines (r * c, width) of where the cells of a `grid` have their centres on a plane of `side` patches.

    Both are (rows, columns); a `grid` of the plane's own size gives the places of its patches. The first half of
    the channels says the row, the second the column, each with frequencies from 1 down to 1/10000 (ViT's and MAE's
    two-dimensional encoding). `width` is a multiple of 4.
    """
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (
        ((torch.arange(cells) + 0.5) * size / cells - 0.5)[:, None] * rates
        for cells, size in zip(grid, side, strict=True)
    )
    down, right = (torch.cat([angle.sin(), angle.cos()], dim=-1) for angle in (rows, columns))  # (cells, width / 2)
    shape = (*grid, width // 2)
    return torch.cat([down[:, None].expand(shape), right[None].expand(shape)], dim=-1).flatten(0, 1)
