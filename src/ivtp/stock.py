"""Every name of transformers and accelerate that is not theirs to promise, and that we lean on all the same.

One function a name; `tests/test_stock.py` holds each against the installed release and says what breaks without it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.image_processing_utils import select_best_resolution
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# ---- forwards and where they run --------------------------------------------------------------------------------


def forward_slot(module: nn.Module) -> str:
    """The instance attribute that holds the real forward: accelerate keeps it behind its own."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate's hooks, on it or on its parts, keep offloaded weights elsewhere."""
    for part in module.modules():
        for hook in _hooks(getattr(part, "_hf_hook", None)):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def _hooks(hook: Any) -> Iterator[Any]:
    """One hook of accelerate, or those of a sequence."""
    yield from getattr(hook, "hooks", ()) or (() if hook is None else (hook,))


def floating_dtype(module: nn.Module) -> torch.dtype:
    """What a module computes in: quantised weights are integers, its norms are not."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def is_checkpointed(layer: Any) -> bool:
    """Whether the layer runs under gradient checkpointing, and so without a cache."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def reruns_hooks(layer: Any) -> bool:
    """Whether gradient checkpointing recomputes this layer with its hooks, as transformers before 5.23 do."""
    checkpointed = next((c for c in type(layer).__mro__ if c.__name__ == "GradientCheckpointingLayer"), object)
    return "__call__" in checkpointed.__dict__ and is_checkpointed(layer)


# ---- `generate` -------------------------------------------------------------------------------------------------

EXPAND = "_expand_inputs_for_generation"
"""The method by which `generate` repeats a prompt and its images for beams and samples."""
ENCODES_AHEAD = "_supports_mm_encoder_outputs"
"""The method by which a model says that `generate` may encode the images before the prefill (from 5.18 on)."""


def encodes_ahead(model: Any) -> bool:
    """Whether `generate` would encode the images itself before the prefill."""
    return hasattr(model, ENCODES_AHEAD)


def set_image_features(output: Any, features: Tensor | None) -> None:
    """Put projected image features (slots, D) where this release's output keeps them."""
    if hasattr(output, "image_outputs"):
        output.image_outputs = BaseModelOutputWithPooling(pooler_output=features)
    else:
        output.image_hidden_states = features


def best_tiling(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution, of those that there are, that an image is scaled into before it is cut in tiles.

    All are (height, width) in pixels.
    """
    height, width = select_best_resolution(size, [list(resolution) for resolution in resolutions])
    return height, width


# ---- attention --------------------------------------------------------------------------------------------------


def kernel_name(config: Any) -> str:
    """What computes the attention of the modules that have this config: "sdpa", "eager", "flash_attention_2", ..."""
    return str(config._attn_implementation)


def set_kernel(config: Any, name: str) -> None:
    """Let modules that have this config compute their attention by the kernel of that name."""
    config._attn_implementation = name


def kernel(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The function that computes the attention of `module` as `config` says; eager ones stand beside their module."""
    eager = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward")
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return found


def decoder_mask(
    config: Any, hidden: Tensor, valid: Tensor | None, visible: Callable[..., Tensor] | None, cache: Cache | None
) -> Any:
    """The mask of a decoder with `config`, for `hidden` (B, T, D) behind `cache`; None where its kernel needs none.

    `valid` (B, cached + T) marks padding, `visible(batch, head, query, key)` may hide more.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        and_mask_function=visible,
        **{_MASKS_CACHE: cache},
    )


# ---- caches -----------------------------------------------------------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values")
"""What a cache is called among a forward's arguments: from 5.24 on, and before."""


def cache_name(function: Callable[..., Any]) -> str:
    """Which of `CACHE_NAMES` a forward of a model or a layer, or a function that makes masks, takes."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(function).parameters)


_MASKS_CACHE = cache_name(create_causal_mask)


def is_offloading(cache: Any) -> bool:
    """Whether a cache keeps its layers elsewhere until they are needed."""
    return bool(getattr(cache, "offloading", False))


def is_filled(layer: Any) -> bool:
    """Whether a cache layer holds tokens: those of layers that never ran have no tensors."""
    return bool(getattr(layer, "is_initialized", False))


def contents(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, d) of a cache layer that is filled."""
    return layer.keys, layer.values


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let a cache layer hold these keys and values (B, H, T, d) alone."""
    if not is_filled(layer):
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
