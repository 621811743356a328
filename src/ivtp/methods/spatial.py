"""Spatial pooling: the patch grid averaged to a coarser one, as a baseline of the IVTP paper."""

from __future__ import annotations

import math

import torch

from ivtp.core.merge import nearest_grid, pool_grid
from ivtp.methods.base import Cut, Merged, Method, MethodInfo, Plan, Window


class Spatial(Method):
    """Averages the encoder's patch grid (24 x 24) to the grid whose size is nearest to `keep` (8 x 8 for 64).

    Each pooled token takes the place of the patch at the centre of its cell. Where `keep` is no product of two sides
    (a prime, say), the nearest product is kept; the trace states the number.
    """

    info = MethodInfo(
        title="Spatial pooling",
        year=2024,
        stage="vision",
        guided=False,
        trainable=False,
        merges=True,
        paper="https://doi.org/10.1007/978-3-031-72643-9_13",
    )

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        rows, columns = nearest_grid(self.keep, *self._side())
        return Plan((Cut("vision", self.geometry.vision_layers - 1, rows * columns, place="behind"),))

    def merge(self, window: Window) -> Merged:
        """The pooled grid; every patch goes into the centre of a cell that covers it."""
        first, side = self.geometry.vision_cls, self._side()
        pooled, centres, into = pool_grid(window.hidden[:, first:], side, nearest_grid(self.keep, *side))
        hidden = window.hidden.index_copy(1, centres + first, pooled)
        columns = torch.cat([torch.full_like(into[:first], -1), into + first])
        return Merged(hidden, columns.expand(hidden.shape[0], -1))

    def _side(self) -> tuple[int, int]:
        side = math.isqrt(self.geometry.num_patches)
        return side, self.geometry.num_patches // side


METHOD = Spatial
