"""What families share that read an image as a whole and in tiles, most with a newline behind each row of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivtp.errors import InputError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.stock import best_tiling

SCALES = 1.1
"""A grid that is longer by this factor than the largest one is scaled down to that."""


class TilesHost(LlavaLike):
    """Images of any size: the whole, scaled down, and behind it the tiles of one of a few resolutions."""

    media: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    pads = True

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """In the tiles whose resolution shows most of the image."""
        return in_tiles((size[1], size[0]), *_tiling(config), cls.limit(config))

    @classmethod
    def limit(cls, config: Any) -> int | None:
        """So many tiles of patches are shown, and larger grids scaled down to that; None: all are shown."""
        return None

    @property
    def most_patches(self) -> int:
        """Those of the whole, and of the most tiles that there can be."""
        config: Any = self.model.config
        resolutions, pixels, _ = _tiling(config)
        tiles: float = max((height // pixels) * (width // pixels) for height, width in resolutions)
        limit = self.limit(config)
        tiles = tiles if limit is None else min(tiles, limit * SCALES**2)
        return int(self.size.num_patches * (1 + tiles))

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """The whole image, then the rows of its tiles, each with a newline behind it."""
        sizes, pixels = inputs.get("image_sizes"), inputs["pixel_values"]
        if sizes is None:
            raise InputError("images of this model need their image_sizes; pass all that the processor gives")
        pixel_sizes = [(int(width), int(height)) for height, width in sizes.tolist()]
        beside = self.images_beside(len(pixel_sizes), inputs)
        config: Any = self.model.config
        found = [self.visual(config, size, count) for size, count in zip(pixel_sizes, beside, strict=True)]
        given = len(pixels) if pixels.dim() == 5 else sum(len(v.tiles) for v in found)
        if given != (len(found) if pixels.dim() == 5 else len(pixels)):
            raise InputError(
                f"pixel_values of shape {tuple(pixels.shape)} do not fit {len(found)} image_sizes; "
                "pass both as the processor gives them"
            )
        return found

    def images_beside(self, count: int, inputs: dict[str, Any]) -> list[int]:
        """How many images the prompt of each of the `count` images of a call has, where that matters; else 1."""
        return [1] * count

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The tiles of each image, without those that fill up a batch."""
        pixels, counts = inputs["pixel_values"], [len(visual.tiles) for visual in visuals]
        if pixels.dim() == 5:
            return [own[:count] for own, count in zip(pixels, counts, strict=True)]
        return list(pixels.split(counts))

    def separator(self) -> Tensor | None:
        """The newline."""
        inner: Any = self.multimodal
        newline: Tensor = inner.image_newline
        return newline


def _tiling(config: Any) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """The resolutions (height, width), pixels along a tile and patches along it."""
    pixels = config.vision_config.image_size
    return tuple(map(tuple, config.image_grid_pinpoints)), pixels, pixels // config.vision_config.patch_size


@cache
def in_tiles(
    size: tuple[int, int], resolutions: tuple[tuple[int, int], ...], pixels: int, side: int, limit: int | None
) -> Visual:
    """An image of `size` (height, width), in tiles of `pixels` with `side` x `side` patches, scaled to `limit` tiles.

    Of a grid that is scaled down the patch nearest to each slot is the one that the slot holds.
    """
    height, width = best_tiling(size, resolutions)
    rows, columns = height // pixels, width // pixels
    first = side * side
    shown = _shown(size, rows * side, columns * side)  # (rows, columns) bool of all patches: not padding
    lines = shown.any(dim=1).nonzero().flatten()
    across = shown.any(dim=0).nonzero().flatten()
    grid = (len(lines), len(across))
    ratio = math.sqrt(grid[0] * grid[1] / ((limit or 1) * first))
    scaled = None
    if limit is not None and ratio > SCALES:
        token = torch.arange(rows * columns * first).view(rows, columns, side, side).transpose(1, 2)
        scaled = first + token.reshape(rows * side, -1)[lines][:, across]
        grid = (int(grid[0] // ratio), int(grid[1] // ratio))
        lines, across = (of[_nearest(len(of), count)] for of, count in zip((lines, across), grid, strict=True))
    patch = torch.full(shown.shape, -1)
    patch[lines.unsqueeze(1), across] = first + torch.arange(grid[0] * grid[1]).view(grid)
    tiles = patch.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, first)
    whole = torch.arange(first)
    slots = torch.cat([patch[lines.unsqueeze(1), across], torch.full((grid[0], 1), -1)], dim=1).flatten()
    grids = ((side, side), grid) if all(grid) else ((side, side),)
    return Visual(grids, torch.cat([whole, slots]), torch.cat([whole[None], tiles]), scaled)


@cache
def tiles_in_line(tiles: int, each: int) -> Visual:
    """An image whose tiles lie one behind the other, `each` with so many tokens; the last one shows the whole."""
    tokens, side = torch.arange(tiles * each), math.isqrt(each)
    return Visual(((side, side),) * tiles, tokens, tokens.view(tiles, each), whole=tiles - 1)


def _nearest(length: int, count: int) -> Tensor:
    """Of a line of `length` the places nearest to `count` even ones, all different."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def _shown(size: tuple[int, int], rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: where a picture of `size` (height, width), scaled to fit in, lies between its padding."""
    height, width = size
    shown = torch.zeros(rows, columns, dtype=torch.bool)
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        shown[border : rows - border] = True
    else:
        border = (columns - int(round(width * (rows / height), 7))) // 2
        shown[:, border : columns - border] = True
    return shown
