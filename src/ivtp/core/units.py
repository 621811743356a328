"""Units: the encoder tokens that a projector makes one visual token of. They lie together, and are cut whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """How the tokens of a sequence form its columns: `lead` tokens alone, then units of `size` tokens each.

    With `size` 1 the columns are the tokens, and everything here hands back what it is given.
    """

    size: int = 1
    lead: int = 0

    def columns(self, tokens: int) -> int:
        """The number of columns that so many tokens form."""
        return self.lead + (tokens - self.lead) // self.size

    def mean(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """The mean of each unit's tokens along `dim`: (..., T, ...) to (..., columns, ...)."""
        return self._pooled(tokens, dim, torch.mean)

    def sum(self, tokens: Tensor) -> Tensor:
        """The sum of each unit's tokens: (B, T) to (B, columns)."""
        return self._pooled(tokens, 1, torch.sum)

    def spread(self, columns: Tensor) -> Tensor:
        """Each column's weight, evenly over its tokens: (B, columns) to (B, T)."""
        if self.size == 1:
            return columns
        each = (columns[:, self.lead :] / self.size).repeat_interleave(self.size, dim=1)
        return torch.cat([columns[:, : self.lead], each], dim=1)

    def tokens(self, columns: Tensor) -> Tensor:
        """The tokens of the `columns` (B, k), of which the first are the `lead`: (B, lead + (k - lead) * size)."""
        if self.size == 1:
            return columns
        first = (columns[:, self.lead :] - self.lead) * self.size + self.lead  # (B, k - lead)
        each = first.unsqueeze(2) + torch.arange(self.size, device=columns.device)
        return torch.cat([columns[:, : self.lead], each.flatten(1)], dim=1)

    def _pooled(self, tokens: Tensor, dim: int, pool: Callable[..., Tensor]) -> Tensor:
        if self.size == 1:
            return tokens
        alone, rest = tokens.tensor_split([self.lead], dim=dim)
        each = rest.reshape(*rest.shape[:dim], -1, self.size, *rest.shape[dim + 1 :])
        return torch.cat([alone, pool(each, dim=dim + 1)], dim=dim)


SINGLE = Units()
"""Every token is a column."""
