"""What one attention layer computed, as cuts read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionTap:
    """The queries, keys and values of one layer, as its attention used them (rotary positions applied)."""

    query: Tensor  # (B, H, T, d)
    key: Tensor  # (B, H_kv, T, d)
    value: Tensor  # (B, H_kv, T, d)
    scale: float
    causal: bool
    valid: Tensor | None = None
    """(B, T) bool: keys that may be seen; None when there is no padding."""
    hidden_from_last: Tensor | None = None
    """(B, T) bool: keys that the last token alone must not see (the answer, when training on it)."""
    past: Tensor | None = None
    """(B, H, T) what every query also sees of a cache before the first token, where T counts new tokens alone: the
    logarithm of its keys' sum of exponentials, in float32; None without one."""
