"""PruMerge+: PruMerge with uniformly spaced tokens beside the outliers (Shang et al., ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

import torch
from torch import Tensor

from ivtp.core.merge import take_up_neighbours
from ivtp.core.rollout import full_width_row
from ivtp.core.select import highest, others
from ivtp.methods.base import Cut, Merged, Method, MethodInfo, Plan, Window, last_vision_layer


class PruMergePlus(Method):
    """PruMerge in which spatial samples join the patches that are most similar to CLS.

    A quarter of the kept tokens are the most similar ones (the paper samples three times as many as it finds outliers),
    the rest lie at an even stride, in raster order, among the other patches. Then as in PruMerge: each takes up its 32
    nearest dropped neighbours, and one extra token, one of `keep`, all dropped ones.
    """

    info = MethodInfo(
        title="PruMerge+",
        year=2024,
        stage="vision",
        guided=False,
        trainable=False,
        merges=True,
        paper="https://arxiv.org/abs/2403.15388",
    )
    keeps_all = False

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        size = self.geometry
        tap = last_vision_layer(size)
        flops = 2.0 * (self.keep - 1) * (size.num_patches - self.keep + 1) * size.vision_hidden
        return Plan((Cut("vision", size.vision_layers - 1, self.keep, place="behind", taps=(tap,), flops=flops),))

    def merge(self, window: Window) -> Merged:
        """Kept tokens with their neighbours, and the extra one."""
        attention = full_width_row(window.taps[-1], 0)[:, 1:]
        kept = with_samples(attention, window.cut.keep - 1)
        return Merged(*take_up_neighbours(window.hidden, window.taps[-1].key, attention, kept))


def with_samples(attention: Tensor, count: int) -> Tensor:
    """Indices (B, count): the highest quarter of `attention` (B, N), then evenly spaced ones of the others."""
    outliers = highest(attention, -(-count // 4))
    rest = others(outliers, attention.shape[1])
    samples = count - outliers.shape[1]
    places = torch.arange(samples, device=rest.device) * rest.shape[1] // max(samples, 1)
    return torch.cat([outliers, rest[:, places]], dim=1)


METHOD = PruMergePlus
