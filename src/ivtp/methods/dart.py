"""DART: keep what duplicates the pivots least (Wen et al., EMNLP 2025, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivtp.core.select import keep_highest, on_device, take
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, check_layer


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
    keys in that layer: L1, over all heads, turned by the positions of a prompt without padding. One pivot after the
    other, in the order of the prompt, takes an equal part of what `keep` leaves: of the free tokens those whose hidden
    states, behind the decoder's last norm, have the lowest cosine with it. Text pivots only choose. Positions stay.
    Of several images each has pivots of its own, beside those of the question, unless they share a budget. So the
    authors' code, but that exactly `keep` tokens stay: there the pivots are not counted, and the parts are rounded down
    to whole tokens and taken in the order of a Python set. Our reading: where the parts are unequal the earlier pivots
    take one more, and a question shorter than its pivots has fewer.
    """

    info = MethodInfo(
        title="DART",
        year=2025,
        stage="llm",
        guided=True,
        paper="https://arxiv.org/abs/2502.11494",
    )
    Options = Options
    reads = frozenset({"budget"})
    reads_text = reads_states = True

    def make_plan(self) -> Plan:
        """One cut behind layer K (0-based: K - 1)."""
        layer = check_layer("layer", self.options.layer, self.geometry) - 1
        return Plan((Cut("llm", layer, self.keep, place="behind", taps=(layer,)),))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """Cosines of all tokens with the visual pivots and with those of the question."""
        pairs = 2 * self.options.pivots * (entering + text_tokens)
        return ChoiceCost(2.0 * pairs * self.geometry.text_hidden, rows=("none",))

    def score(self, window: Window) -> Tensor:
        """1 for what stays, 0 for what leaves."""
        assert window.text is not None
        assert window.normed is not None
        assert window.keys is not None
        norms: Tensor = torch.linalg.vector_norm(window.keys.float(), ord=1, dim=(1, 3))  # (B, T)
        kept = torch.zeros_like(window.visual)
        for tokens, _, keeps in window.budgets:
            budget = on_device(list(keeps), norms.device)
            kept |= least_similar(window.normed, norms, tokens, window.text > 0, budget, self.options.pivots)
        return kept.float()


def least_similar(hidden: Tensor, norms: Tensor, visual: Tensor, text: Tensor, budget: Tensor, pivots: int) -> Tensor:
    """DART's choice (B, T) bool of the `visual` (B, T) columns of `hidden` (B, T, D), `budget` (B,) of each row.

    `norms` (B, T) of the keys choose `pivots` of the visual columns and of the `text` columns (B, T).
    """
    own, own_there = _largest(norms, visual, budget.clamp_max(pivots), pivots)
    asked, asked_there = _largest(norms, text, torch.full_like(budget, pivots), pivots)
    kept = torch.zeros_like(visual).scatter(1, own, own_there)
    index, there = torch.cat([own, asked], dim=1), torch.cat([own_there, asked_there], dim=1)
    unit = nn.functional.normalize(hidden.float(), dim=-1)
    left = budget - kept.sum(dim=1)
    similarity = take(unit, index) @ unit.transpose(1, 2)  # (B, pivots, T)
    turn, turns = there.cumsum(dim=1) - 1, there.sum(dim=1).clamp_min(1)
    for pivot in range(index.shape[1]):
        part = (left // turns + (turn[:, pivot] < left % turns)) * there[:, pivot]
        kept = kept | keep_highest(-similarity[:, pivot], visual & ~kept, part)
    return kept


def _largest(norms: Tensor, columns: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `count` (B,) marked columns with the largest norm, as they come, among (B, `most`), and which those are."""
    chosen = keep_highest(norms, columns, count)
    index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return index, chosen.gather(1, index)


METHOD = Dart
