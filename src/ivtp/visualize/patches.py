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


def fates(trace: PruneTrace, row: int = 0, image: int = 0) -> NDArray[np.uint8]:
    """The `Fate` of every patch (grid, grid) of one image of sample `row`.

    Raises `ConfigError` when the trace holds no such sample or image, or patches that form no square: those of tiles.
    """
    if not 0 <= row < len(trace.images):
        last = len(trace.images) - 1
        raise ConfigError(f"row={row} is not in this batch of {last + 1}; use 0..{last}")
    if not 0 <= image < trace.images[row]:
        raise ConfigError(f"image={image} is not in sample {row}, which holds {trace.images[row]} image(s)")
    if trace.grids and not trace.grids[row][image]:
        raise ConfigError("an image that is read in tiles cannot be drawn yet; its patches are in trace.kept()")
    grid = math.isqrt(trace.num_patches)
    if grid**2 != trace.num_patches:
        raise ConfigError(f"{trace.num_patches} patches form no square, so they cannot be drawn on one")
    first = image * trace.num_patches
    own = np.arange(first, first + trace.num_patches)
    stands = own.copy()  # the patch that stands for each one, as long as one does
    result = np.full(trace.num_patches, Fate.KEPT, dtype=np.uint8)
    for stage in trace.stages:
        there = stands >= 0
        if stage.sources is not None:
            stands[there] = stage.sources[row].numpy()[stands[there]]
        stands[~np.isin(stands, stage.kept[row].numpy())] = -1
        dropped = Fate.DROPPED_IN_ENCODER if stage.where == "vision" else Fate.DROPPED_IN_DECODER
        result[there & (stands < 0)] = dropped
    result[(stands >= 0) & (stands != own)] = Fate.MERGED
    return result.reshape(grid, grid)


def paint(picture: Image.Image, fate: NDArray[np.uint8]) -> Image.Image:
    """Dim the merged and dropped patches of a square picture and outline the kept ones.

    Merged into a kept one: violet. Dropped in the encoder: grey. Dropped in the decoder: blue and hatched. The result's
    side is the multiple of the grid that is nearest to the picture's.
    """
    grid = len(fate)
    cell = max(1, round(picture.width / grid))
    side = grid * cell
    colour = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)  # (S, S, 3)
    grey = colour.mean(axis=2, keepdims=True)
    where = np.repeat(np.repeat(fate, cell, axis=0), cell, axis=1)[..., None]  # (S, S, 1)
    y, x = np.indices((side, side))
    hatch = ((x + y) % 8 < 2)[..., None]
    tint = np.array(TINT, dtype=np.float32)
    tinted = 0.35 * grey + 0.40 * tint
    tinted = np.where(hatch, 0.3 * tinted + 0.7 * tint, tinted)
    dimmed = np.where(where == Fate.DROPPED_IN_DECODER, tinted, _SHADE * grey + _LIFT)
    merged = 0.50 * grey + 0.40 * np.array(MERGED, dtype=np.float32)
    dimmed = np.where(where == Fate.MERGED, merged, dimmed)
    painted = np.where(where == Fate.KEPT, colour, dimmed).clip(0, 255).astype(np.uint8)
    if (fate != Fate.KEPT).any():
        outline(painted, where[..., 0] == Fate.KEPT, 2 if cell >= _ROOMY else 1)
    return Image.fromarray(painted)


def outline(pixels: NDArray[np.uint8], kept: NDArray[np.bool_], lines: int = 2) -> None:
    """Draw the rim of the kept pixels (S, S) on `pixels` (S, S, 3), inside of it: dark outside, bright inside."""
    inside = kept
    for colour in (EDGE, OUTLINE)[-lines:]:
        near = np.pad(inside, 1)
        height, width = inside.shape
        shifts = [near[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        within: NDArray[np.bool_] = np.logical_and.reduce(shifts)
        pixels[inside & ~within] = colour
        inside = within
