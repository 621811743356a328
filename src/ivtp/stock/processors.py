"""What processors do to the sizes of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_pil_idefics3 import _resize_output_size_rescale_to_max_len
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize


def best_tiling(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution, of those that there are, that an image is scaled into before it is cut in tiles.

    All are (height, width) in pixels.
    """
    height, width = select_best_resolution(size, [list(resolution) for resolution in resolutions])
    return height, width


def best_canvas(size: tuple[int, int], tile: tuple[int, int], most: int) -> tuple[int, int]:
    """The columns and rows, `most` tiles in all, of the grid whose shape is nearest to that of an image.

    `size` and `tile` are (height, width) in pixels.
    """
    columns, rows = get_optimal_tiled_canvas(size, tile, 1, most)
    return columns, rows


def whole_blocks(size: tuple[int, int], side: int, fewest: int, most: int) -> tuple[int, int]:
    """What an image of `size` is scaled to: whole blocks of `side` pixels, from `fewest` to `most` of them.

    Both are (height, width) in pixels. Raises `ValueError` for a strip.
    """
    height, width = smart_resize(*size, side, fewest * side**2, most * side**2)
    return height, width


def within(size: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """What an image of `size`, at most `longest` along an edge, is scaled to: whole blocks of `side` pixels.

    Both are (height, width) in pixels; 0 of a strip.
    """
    picture = np.broadcast_to(np.uint8(0), (3, *size))
    height, width = get_resize_output_image_size(picture, longest, side, "channels_first")
    return height, width


def split_grid(size: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """The rows and columns of tiles of `side` pixels of an image of `size` (height, width); (0, 0): it is not split.

    It is scaled until its longer side has `longest` pixels, and then to whole tiles.
    """
    height, width = _resize_output_size_rescale_to_max_len(*size, max_len=longest)
    shape = width / height
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / shape) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * shape) / side)
    return (rows, columns) if rows * columns > 1 else (0, 0)
