"""Which patch of the picture went where, painted on the picture as the model sees it."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ivtp.errors import ConfigError
from ivtp.trace import PruneTrace

OUTLINE = (255, 176, 0)
EDGE = (31, 36, 48)
"""Around the outline: one of the two is seen on any picture."""
TINT = (74, 134, 232)
MERGED = (150, 96, 200)
_SHADE = 0.45
"""Of the grey picture in a dropped patch; lifted, so that dark places keep their shapes."""
_LIFT = 30.0
_ROOMY = 8
"""Pixels of a patch that leave something to be seen inside of two lines."""


class Fate(IntEnum):
    """What became of a patch."""

    KEPT = 0
    DROPPED_IN_DECODER = 1
    DROPPED_IN_ENCODER = 2
    MERGED = 3


def as_seen(image: Image.Image, square: int) -> Image.Image:
    """The picture as CLIP's processor crops it: short side scaled to `square`, then the middle square."""
    return ImageOps.fit(image.convert("RGB"), (square, square), Image.Resampling.BICUBIC)


def cut_off(image: Image.Image) -> str:
    """What to say of a picture whose ends the model did not see; nothing of a square."""
    width, height = image.size
    share = round(100 * min(width, height) / max(width, height))
    side = "width" if width > height else "height"
    return "" if share == 100 else f"the model saw the middle {share}% of the {side} ({width} x {height} pixels)"


def fates(trace: PruneTrace, row: int = 0, image: int = 0) -> list[NDArray[np.uint8]]:
    """The `Fate` of every patch of one image of sample `row`: (rows, columns) for each of its grids.

    There is one grid; of an image that is read in tiles there are two, of the whole and of the tiles, or one for each
    tile and that of the whole (`laid_out` joins them). Raises `ConfigError` when the trace holds no such sample or
    image, or patches that have no place on a picture.
    """
    if not 0 <= row < len(trace.images):
        last = len(trace.images) - 1
        raise ConfigError(f"row={row} is not in this batch of {last + 1}; use 0..{last}")
    if not 0 <= image < trace.images[row]:
        raise ConfigError(f"image={image} is not in sample {row}, which holds {trace.images[row]} image(s)")
    patches = trace.patches[row] if trace.patches else (trace.num_patches,) * trace.images[row]
    grids = trace.grids[row][image] if trace.grids else ((math.isqrt(patches[image]),) * 2,)
    if any(len(grid) != 2 for grid in grids) or sum(map(math.prod, grids)) != patches[image]:
        raise ConfigError(f"the {patches[image]} patches form no grid to draw; trace.kept() names those that stay")
    own = sum(patches[:image]) + np.arange(patches[image])
    stands = own.copy()  # the patch that stands for each one, as long as one does
    result = np.full(len(own), Fate.KEPT, dtype=np.uint8)
    for stage in trace.stages:
        there = stands >= 0
        if stage.sources is not None:
            stands[there] = stage.sources[row].numpy()[stands[there]]
        stands[~np.isin(stands, stage.kept[row].numpy())] = -1
        dropped = Fate.DROPPED_IN_ENCODER if stage.where == "vision" else Fate.DROPPED_IN_DECODER
        result[there & (stands < 0)] = dropped
    result[(stands >= 0) & (stands != own)] = Fate.MERGED
    ends = np.cumsum([math.prod(grid) for grid in grids])
    return [part.reshape(grid) for part, grid in zip(np.split(result, ends[:-1]), grids, strict=True)]


def laid_out(maps: list[NDArray[np.uint8]], shape: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """The maps of the whole and of all its tiles, of an image of `shape` (width, height) that has one for each tile.

    Their rows and columns are those whose shape is nearest to the image's. Other images' maps are as they were.
    """
    if len(maps) < 3:
        return maps
    *tiles, whole = maps
    count = len(tiles)
    grids = ((count // columns, columns) for columns in range(1, count + 1) if count % columns == 0)
    rows, columns = min(grids, key=lambda grid: abs(shape[0] / shape[1] - grid[1] / grid[0]))
    return [whole, np.block([tiles[row * columns : (row + 1) * columns] for row in range(rows)])]


def paint(picture: Image.Image, fate: NDArray[np.uint8]) -> Image.Image:
    """Dim the merged and dropped patches (rows, columns) of a picture and outline the kept ones.

    Merged into a kept one: violet. Dropped in the encoder: grey. Dropped in the decoder: blue and hatched. The result's
    sides are the multiples of the grid that are nearest to the picture's.
    """
    rows, columns = fate.shape
    high, wide = max(1, round(picture.height / rows)), max(1, round(picture.width / columns))
    size = (columns * wide, rows * high)
    colour = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)  # (H, W, 3)
    grey = colour.mean(axis=2, keepdims=True)
    where = np.repeat(np.repeat(fate, high, axis=0), wide, axis=1)[..., None]  # (H, W, 1)
    y, x = np.indices((rows * high, columns * wide))
    hatch = ((x + y) % 8 < 2)[..., None]
    tint = np.array(TINT, dtype=np.float32)
    tinted = 0.35 * grey + 0.40 * tint
    tinted = np.where(hatch, 0.3 * tinted + 0.7 * tint, tinted)
    dimmed = np.where(where == Fate.DROPPED_IN_DECODER, tinted, _SHADE * grey + _LIFT)
    merged = 0.50 * grey + 0.40 * np.array(MERGED, dtype=np.float32)
    dimmed = np.where(where == Fate.MERGED, merged, dimmed)
    painted = np.where(where == Fate.KEPT, colour, dimmed).clip(0, 255).astype(np.uint8)
    if (fate != Fate.KEPT).any():
        outline(painted, where[..., 0] == Fate.KEPT, 2 if min(high, wide) >= _ROOMY else 1)
    return Image.fromarray(painted)


def outline(pixels: NDArray[np.uint8], kept: NDArray[np.bool_], lines: int = 2) -> None:
    """Draw the rim of the kept pixels (H, W) on `pixels` (H, W, 3), inside of it: dark outside, bright inside."""
    inside = kept
    for colour in (EDGE, OUTLINE)[-lines:]:
        near = np.pad(inside, 1)
        height, width = inside.shape
        shifts = [near[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        within: NDArray[np.bool_] = np.logical_and.reduce(shifts)
        pixels[inside & ~within] = colour
        inside = within
