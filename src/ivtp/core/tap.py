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
    blocks: Tensor | None = None
    """(B, T) the block of each token of a causal layer, -1: of none. Those of a block see each other whatever their
    order; None: there are no blocks."""
    softcap: float | None = None
    """What the size of a logit stays below: x becomes softcap * tanh(x / softcap); None: it stays as it is."""
    past: Tensor | None = None
    """(B, H, T) what every query also sees of a cache before the first token, where T counts new tokens alone: the
    logarithm of its keys' sum of exponentials, in float32; None without one."""
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
