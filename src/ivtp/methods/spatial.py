"""Spatial pooling: the patch grid averaged to a coarser one, as a baseline of the IVTP paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ivtp.core.merge import nearest_grid, pool_grid
from ivtp.methods.base import Merged, Method, MethodInfo, Plan, Window, check_choice, one_cut


@dataclass(frozen=True)
class Options:
    """`how`: average cells of the grid, or drop the patches that are most like their neighbours."""

    how: Literal["pool", "drop"] = "pool"

    def __post_init__(self) -> None:
        check_choice("how", self.how, ("pool", "drop"))


class Spatial(Method):
    """Averages the encoder's patch grid (24 x 24) to the grid whose size is nearest to `keep` (8 x 8 for 64).

    Each pooled token takes the place of the patch at the centre of its cell. Where `keep` is no product of two sides
    of at most the grid's, the nearest product is kept; the trace states the number. A small prime is pooled to strips.
    `how="drop"` keeps `keep` patches instead: those with the lowest mean cosine to their up to four neighbours, in
    raster order.
    """

    info = MethodInfo(
        title="Spatial pooling",
        year=2024,
        stage="vision",
        merges=True,
        paper="https://doi.org/10.1007/978-3-031-72643-9_13",
    )
    Options = Options
    needs = frozenset({"grid"})

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        keep = self.keep
        if self.options.how == "pool":
            keep = math.prod(nearest_grid(keep, *self._side()))
        return one_cut(self.geometry, keep, "behind")

    def merge(self, window: Window) -> Merged | None:
        """The pooled grid; every patch goes into the centre of a cell that covers it."""
        if self.options.how == "drop":
            return None
        first, side = self.geometry.vision_cls, self._side()
        pooled, centres, into = pool_grid(window.hidden[:, first:], side, nearest_grid(self.keep, *side))
        hidden = window.hidden.index_copy(1, centres + first, pooled)
        columns = torch.cat([torch.full_like(into[:first], -1), into + first])
        return Merged(hidden, columns.expand(hidden.shape[0], -1))

    def score(self, window: Window) -> Tensor:
        """The less a patch is like its neighbours, the higher."""
        first = self.geometry.vision_cls
        return nn.functional.pad(-local_similarity(window.hidden[:, first:], self._side()), (first, 0))

    def _side(self) -> tuple[int, int]:
        side = math.isqrt(self.geometry.num_patches)
        return side, self.geometry.num_patches // side


def local_similarity(patches: Tensor, side: tuple[int, int]) -> Tensor:
    """Mean cosine (B, N) of `patches` (B, N, D), a grid of `side` = (rows, columns), to their up to four neighbours."""
    rows, columns = side
    unit = nn.functional.normalize(patches.float(), dim=-1).view(patches.shape[0], rows, columns, -1)
    total = unit.new_zeros(unit.shape[:3])
    count = unit.new_zeros(rows, columns)
    below = (unit[:, 1:] * unit[:, :-1]).sum(-1)  # (B, rows - 1, columns)
    beside = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    for part, number in ((total, below), (count, torch.ones_like(below[0]))):
        part[..., 1:, :] += number
        part[..., :-1, :] += number
    for part, number in ((total, beside), (count, torch.ones_like(beside[0]))):
        part[..., 1:] += number
        part[..., :-1] += number
    return (total / count.clamp_min(1)).flatten(1)


METHOD = Spatial
