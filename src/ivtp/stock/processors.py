"""What processors do to the sizes of images."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.image_processing_utils import select_best_resolution


def best_tiling(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution, of those that there are, that an image is scaled into before it is cut in tiles.

    All are (height, width) in pixels.
    """
    height, width = select_best_resolution(size, [list(resolution) for resolution in resolutions])
    return height, width
