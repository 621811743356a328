"""Kernels of attention modules, and the masks that they are given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ivtp.stock.caches import cache_name

_MASKS_CACHE = cache_name(create_causal_mask)


def kernel_name(config: Any) -> str:
    """What computes the attention of the modules that have this config: "sdpa", "eager", "flash_attention_2", ..."""
    return str(config._attn_implementation)


def set_kernel(config: Any, name: str) -> None:
    """Let modules that have this config compute their attention by the kernel of that name."""
    config._attn_implementation = name


def heeds_softcap(config: Any) -> bool:
    """Whether the kernel of that config bends logits as a model asks: PyTorch's own cannot, and lets them be."""
    return kernel_name(config) != "sdpa"


def kernel(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The function that computes the attention of `module` as `config` says; eager ones stand beside their module."""
    eager = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward")
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return found


def decoder_mask(
    config: Any,
    hidden: Tensor,
    valid: Tensor | None,
    visible: Callable[..., Tensor] | None,
    cache: Cache | None,
    blocks: Tensor | None = None,
) -> Any:
    """The mask of a decoder with `config`, for `hidden` (B, T, D) behind `cache`; None where its kernel needs none.

    `valid` (B, cached + T) marks padding, `visible(batch, head, query, key)` may hide more; what is of one
    of `blocks` (B, cached + T), -1: of none, sees all of it whatever its order.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        and_mask_function=visible,
        block_sequence_ids=blocks,
        **{_MASKS_CACHE: cache},
    )
