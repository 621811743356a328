"""What one attention layer computed, as cuts read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ivtp.core.units import SINGLE, Units


@dataclass(frozen=True)
class AttentionTap:
    """The queries, keys and values of one layer, as its attention used them (rotary positions applied)."""

    query: Tensor  # (B, H, T, d)
    token_key: Tensor  # (B, H_kv, T, d)
    token_value: Tensor  # (B, H_kv, T, d)
    scale: float
    causal: bool
    valid: Tensor | None = None
    """(B, T) bool: keys that may be seen; None when there is no padding."""
    hidden_from_last: Tensor | None = None
    """(B, T) bool: keys that the last token alone must not see (the answer, when training on it)."""
    units: Units = SINGLE
    """How the T tokens form the columns that are cut."""

    @property
    def key(self) -> Tensor:
        """(B, H_kv, columns, d): the tokens' own, of a unit their mean."""
        return self.units.mean(self.token_key, dim=2)

    @property
    def value(self) -> Tensor:
        """(B, H_kv, columns, d), likewise."""
        return self.units.mean(self.token_value, dim=2)
