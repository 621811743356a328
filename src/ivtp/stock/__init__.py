"""Every name of transformers and accelerate that is not theirs to promise, and that we lean on all the same.

One function a name; `tests/stock` holds each against the installed release and says what breaks without it.
"""

from ivtp.stock.attention import decoder_mask, heeds_softcap, kernel, kernel_name, set_kernel
from ivtp.stock.caches import CACHE_NAMES, cache_name, contents, fill, is_filled, is_offloading, keep_whole
from ivtp.stock.forwards import execution_device, floating_dtype, forward_slot, is_checkpointed, reruns_hooks
from ivtp.stock.generation import ENCODES_AHEAD, EXPAND, encodes_ahead, is_drafting, set_image_features
from ivtp.stock.mrope import grid_positions, later_positions, patch_embeddings, patch_places, patch_windows
from ivtp.stock.processors import best_canvas, best_tiling, split_grid, whole_blocks, within

__all__ = [
    "CACHE_NAMES",
    "ENCODES_AHEAD",
    "EXPAND",
    "best_canvas",
    "best_tiling",
    "cache_name",
    "contents",
    "decoder_mask",
    "encodes_ahead",
    "execution_device",
    "fill",
    "floating_dtype",
    "forward_slot",
    "grid_positions",
    "heeds_softcap",
    "is_checkpointed",
    "is_drafting",
    "is_filled",
    "is_offloading",
    "keep_whole",
    "kernel",
    "kernel_name",
    "later_positions",
    "patch_embeddings",
    "patch_places",
    "patch_windows",
    "reruns_hooks",
    "set_image_features",
    "set_kernel",
    "split_grid",
    "whole_blocks",
    "within",
]
