"""Which patch of the picture went where, painted on the picture as the model sees it."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from ivtp.errors import ConfigError
from ivtp.trace import PruneTrace

OUTLINE = (255, 176, 0)
TINT = (74, 134, 232)


class Fate(IntEnum):
    """What became of a patch."""

    KEPT = 0
    DROPPED_IN_DECODER = 1
    DROPPED_IN_ENCODER = 2


def as_seen(image: Image.Image, square: int) -> Image.Image:
    """The picture as CLIP's processor crops it: short side scaled to `square`, then the middle square."""
    return ImageOps.fit(image.convert("RGB"), (square, square), Image.Resampling.BICUBIC)


def fates(trace: PruneTrace, row: int = 0, image: int = 0) -> NDArray[np.uint8]:
    """The `Fate` of every patch (grid, grid) of one image of sample `row`.

    Raises `ConfigError` when the trace holds no such sample or image, or patches that form no square.
    """
    if not 0 <= row < len(trace.images):
        last = len(trace.images) - 1
        raise ConfigError(f"row={row} is not in this batch of {last + 1}; use 0..{last}")
    if not 0 <= image < trace.images[row]:
        raise ConfigError(f"image={image} is not in sample {row}, which holds {trace.images[row]} image(s)")
    grid = math.isqrt(trace.num_patches)
    if grid**2 != trace.num_patches:
        raise ConfigError(f"{trace.num_patches} patches form no square, so they cannot be drawn on one")
    result = np.full(trace.num_patches, Fate.DROPPED_IN_ENCODER, dtype=np.uint8)
    result[_of_image(trace, row, image, encoder_only=True)] = Fate.DROPPED_IN_DECODER
    result[_of_image(trace, row, image, encoder_only=False)] = Fate.KEPT
    return result.reshape(grid, grid)


def _of_image(trace: PruneTrace, row: int, image: int, *, encoder_only: bool) -> NDArray[np.int64]:
    kept = trace.kept("vision" if encoder_only else None)[row].cpu().numpy()  # (k,)
    first = image * trace.num_patches
    return kept[(kept >= first) & (kept < first + trace.num_patches)] - first


def paint(picture: Image.Image, fate: NDArray[np.uint8]) -> Image.Image:
    """Dim the dropped patches of a square picture and outline the kept ones.

    Dropped in the encoder: dark grey. Dropped in the decoder: blue and hatched. The result's side is the
    multiple of the grid that is nearest to the picture's.
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
    dimmed = np.where(where == Fate.DROPPED_IN_DECODER, tinted, 0.28 * grey)
    painted = Image.fromarray(np.where(where == Fate.KEPT, colour, dimmed).clip(0, 255).astype(np.uint8))
    if (fate != Fate.KEPT).any():
        _outline(painted, fate == Fate.KEPT, cell)
    return painted


def _outline(picture: Image.Image, kept: NDArray[np.bool_], cell: int) -> None:
    """Lines where a kept patch meets one that is not (or the rim)."""
    pen = ImageDraw.Draw(picture)
    rim = np.pad(kept, 1)
    for row, column in zip(*np.nonzero(kept), strict=True):
        top, left = int(row) * cell, int(column) * cell
        bottom, right = top + cell - 1, left + cell - 1
        for neighbour, line in (
            (rim[row, column + 1], (left, top, right, top)),
            (rim[row + 2, column + 1], (left, bottom, right, bottom)),
            (rim[row + 1, column], (left, top, left, bottom)),
            (rim[row + 1, column + 2], (right, top, right, bottom)),
        ):
            if not neighbour:
                pen.line(line, fill=OUTLINE, width=1)
