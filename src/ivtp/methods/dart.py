"""DART: keep what duplicates the pivots least (Wen et al., EMNLP 2025, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivtp.core.select import keep_highest, on_device, take
from ivtp.errors import ConfigError
from ivtp.methods.base import Cut, Method, MethodInfo, Plan, Window, check_layer


@dataclass(frozen=True)
class Options:
    """`layer`: decoder layers that see all tokens; `pivots`: how many visual tokens, and how many of the text."""

    layer: int = 2
    pivots: int = 4

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise ConfigError(f"pivots={self.pivots!r} leaves nothing to compare with; use a whole number from 1 up")


class Dart(Method):
    """Keeps pivots, and for each of them the visual tokens that are least similar to it.

    Behind decoder layer K, the pivots are the visual tokens, and the question's tokens, with the largest norm of their
    keys (L2 over all heads: rotary positions, and so padding, do not change it). One pivot after the other, visual
    ones first, takes an equal part of what `keep` leaves: of the free tokens those with the lowest cosine of hidden
    states. Text pivots only choose. Positions stay. Our reading: where the parts are unequal the earlier pivots take
    one more, and a question shorter than its pivots has fewer.
    """

    info = MethodInfo(
        title="DART",
        year=2025,
        stage="llm",
        guided=True,
        trainable=False,
        merges=False,
        paper="https://arxiv.org/abs/2502.11494",
    )
    Options = Options
    reads = frozenset({"budget"})
    reads_text = True

    def make_plan(self) -> Plan:
        """One cut behind layer K (0-based: K - 1)."""
        size = self.geometry
        layer = check_layer("layer", self.options.layer, size) - 1
        flops = 2.0 * 2 * self.options.pivots * size.num_patches * size.text_hidden
        return Plan((Cut("llm", layer, self.keep, place="behind", taps=(layer,), keys_only=True, flops=flops),))

    def score(self, window: Window) -> Tensor:
        """1 for what stays, 0 for what leaves."""
        assert window.text is not None
        norms: Tensor = torch.linalg.vector_norm(window.taps[-1].key.float(), dim=(1, 3))  # (B, T)
        kept = torch.zeros_like(window.visual)
        for tokens, images in window.budgets:
            budget = on_device([n * window.cut.keep for n in images], norms.device)
            kept |= least_similar(window.hidden, norms, tokens, window.text > 0, budget, self.options.pivots)
        return kept.float()


def least_similar(hidden: Tensor, norms: Tensor, visual: Tensor, text: Tensor, budget: Tensor, pivots: int) -> Tensor:
    """DART's choice (B, T) bool of the `visual` (B, T) columns of `hidden` (B, T, D), `budget` (B,) of each row.

    `norms` (B, T) of the keys choose `pivots` of the visual columns and of the `text` columns (B, T).
    """
    own, asked = (_largest(norms, columns, pivots) for columns in (visual, text))  # (B, pivots) and whether each is one
    own_there = own[1] & (torch.arange(own[0].shape[1], device=norms.device) < budget.unsqueeze(1))
    kept = torch.zeros_like(visual).scatter(1, own[0], own_there) & visual
    index, there = torch.cat([own[0], asked[0]], dim=1), torch.cat([own_there, asked[1]], dim=1)
    unit = nn.functional.normalize(hidden.float(), dim=-1)
    left = budget - kept.sum(dim=1)
    similarity = take(unit, index) @ unit.transpose(1, 2)  # (B, pivots, T)
    turn, turns = there.cumsum(dim=1) - 1, there.sum(dim=1).clamp_min(1)
    for pivot in range(index.shape[1]):
        part = (left // turns + (turn[:, pivot] < left % turns)) * there[:, pivot]
        kept = kept | keep_highest(-similarity[:, pivot], visual & ~kept, part)
    return kept


def _largest(norms: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` marked columns (B, k) with the largest norm, and which of them are marked at all."""
    index = norms.masked_fill(~columns, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :count]
    return index, columns.gather(1, index)


METHOD = Dart
