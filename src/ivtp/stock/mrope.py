"""Positions on several axes, as Qwen2-VL's decoder turns its tokens by them, and what its encoder knows of a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


def grid_positions(multimodal: Any, ids: Tensor, mask: Tensor | None, grids: Tensor, image_token: int) -> Tensor:
    """Positions (3, B, T) of prompts `ids` (B, T), in whose slots are images of `grids` (I, 3), time, height and width.

    The model remembers by how much its later positions differ from their columns, as in a forward of its own.
    """
    kinds = (ids == image_token).int()
    position: Tensor
    position, differences = multimodal.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=mask)
    multimodal.rope_deltas = differences.to(multimodal.device)
    return position


def later_positions(multimodal: Any, counted: Tensor) -> Tensor:
    """Positions (1, B, T) of what comes behind a prompt, from those `counted` (B, T) one a column."""
    differences: Tensor = multimodal.rope_deltas
    each = len(counted) // len(differences)
    return (counted + differences.repeat_interleave(each, dim=0).to(counted.device)).unsqueeze(0)


def patch_places(rows: int, columns: int, merge: int) -> Tensor:
    """(rows * columns, 2) where the patches of a grid lie, `merge` x `merge` of a block behind each other."""
    places: Tensor = get_vision_position_ids(torch.tensor([[1, rows, columns]]), merge)
    return places


def patch_windows(rows: int, columns: int, config: Any) -> tuple[Tensor, Tensor]:
    """Which block of a grid of `rows` x `columns` patches comes where (n,), window by window; where each begins (w+1,).

    The windows are counted in patches, the blocks are those of `config.spatial_merge_size`.
    """
    order, ends = get_vision_window_index(
        torch.tensor([[1, rows, columns]]), config.spatial_merge_size, config.window_size, config.patch_size
    )
    return order, ends


def patch_embeddings(rows: int, columns: int, tower: Any) -> tuple[Tensor, Tensor]:
    """Which embeddings of places (T, 4) of `tower`, by what weights (T, 4), make that of each patch of a grid.

    The patches are in the order of `patch_places`.
    """
    places, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, rows, columns]]),
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.spatial_merge_size,
    )
    return places, weights
