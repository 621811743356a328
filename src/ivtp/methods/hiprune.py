"""HiPrune: anchors, their neighbours and registers (Liu et al., 2025, arXiv 2508.00553)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core.rollout import received
from ivtp.core.select import highest, ranks
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window


@dataclass(frozen=True)
class Options:
    """`alpha`: share of the kept tokens for anchors and their neighbours; `layer`: the middle layer (0-based)."""

    alpha: float = 0.1
    layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} is no share; use a number from 0 to 1")


class HiPrune(Method):
    """Keeps anchors of a middle encoder layer with their four neighbours, and registers of the last.

    A patch is rated by the attention that it receives, averaged over heads and queries. An anchor and its neighbours
    are five tokens, so a share `alpha` of `keep` gives alpha * keep / 5 anchors, rounded; registers, the patches that
    the last layer whose output the projector reads attends to most, fill the rest. Raster order. The middle is the
    paper's object layer, the 9th of 24 (`layer` 8), in that proportion in other encoders. Our reading: every query
    counts, CLS included, and there are never more anchors than fit with all their neighbours.
    """

    info = MethodInfo(
        title="HiPrune",
        year=2025,
        stage="vision",
        paper="https://arxiv.org/abs/2508.00553",
    )
    Options = Options
    needs = frozenset({"grid"})

    def make_plan(self) -> Plan:
        """One cut behind the encoder that reads two layers in full."""
        last = self.geometry.vision_layers - 1
        middle = self.options.layer
        if middle is None:
            middle = max(1, self.geometry.vision_depth * 9 // 24) - 1
        if not 0 <= middle < last:
            raise ConfigError(f"layer={middle} is no layer before the encoder's last one; use 0..{last - 1}")
        return Plan((Cut("vision", last, self.keep, place="behind", taps=(middle, last)),))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The attention that each token receives, of both layers."""
        return ChoiceCost(rows=("all", "all"))

    @property
    def anchors(self) -> int:
        """How many there are."""
        share: float = self.options.alpha
        return min(round(share * self.keep / 5), self.keep // 5)

    def score(self, window: Window) -> Tensor:
        """Anchors and neighbours, then registers."""
        first, size = self.geometry.vision_cls, self.geometry
        middle, deep = (received(tap)[:, first:] for tap in window.taps)
        side = math.isqrt(size.num_patches)
        chosen = anchors_and_registers(middle, deep, (side, size.num_patches // side), self.anchors, window.cut.keep)
        return ranks(chosen + first, window.hidden.shape[1])


def anchors_and_registers(middle: Tensor, deep: Tensor, side: tuple[int, int], anchors: int, keep: int) -> Tensor:
    """HiPrune's choice (B, keep) by two layers' scores (B, N) of a grid of `side` = (rows, columns)."""
    (rows, columns), near = side, torch.zeros_like(middle, dtype=torch.bool)
    near = near.scatter(1, highest(middle, anchors), True).view(-1, rows, columns)
    grown = near.clone()
    for shift, dim in ((1, 1), (-1, 1), (1, 2), (-1, 2)):
        moved = near.roll(shift, dim)
        edge = 0 if shift == 1 else near.shape[dim] - 1
        moved.select(dim, edge).fill_(False)  # roll wraps around the border
        grown |= moved
    return highest(deep + grown.flatten(1) * (deep.amax(dim=1, keepdim=True) + 1), keep)


METHOD = HiPrune
