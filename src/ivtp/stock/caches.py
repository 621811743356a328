"""What a cache is called, and what its layers hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

CACHE_NAMES = ("cache", "past_key_values")
"""What a cache is called among a forward's arguments: from 5.24 on, and before."""


def cache_name(function: Callable[..., Any]) -> str:
    """Which of `CACHE_NAMES` a forward of a model or a layer, or a function that makes masks, takes."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(function).parameters)


def is_offloading(cache: Any) -> bool:
    """Whether a cache keeps its layers elsewhere until they are needed."""
    return bool(getattr(cache, "offloading", False))


def is_filled(layer: Any) -> bool:
    """Whether a cache layer holds tokens: those of layers that never ran have no tensors."""
    return bool(getattr(layer, "is_initialized", False))


def keep_whole(cache: Any) -> None:
    """Let those layers of a cache that are empty keep all tokens, also where they would keep a window's."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and not is_filled(layer):
            cache.layers[number] = DynamicLayer()


def contents(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, d) of a cache layer that is filled."""
    return layer.keys, layer.values


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let a cache layer hold these keys and values (B, H, T, d) alone."""
    if not is_filled(layer):
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
