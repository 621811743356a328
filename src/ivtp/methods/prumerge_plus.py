"""PruMerge+: evenly spaced samples beside PruMerge's outliers (Shang et al., ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

import torch
from torch import Tensor

from ivtp.core.select import highest, others
from ivtp.methods.base import MethodInfo
from ivtp.methods.outliers import OutlierMerging


class PruMergePlus(OutlierMerging):
    """PruMerge in which spatial samples join the patches that are most similar to CLS.

    A quarter of the kept tokens are the most similar ones (the paper samples three times as many as it finds outliers),
    the rest lie at an even stride, in raster order, among the other patches. Then as in PruMerge: each takes up its 32
    nearest neighbours, kept or dropped, and one extra token, one of `keep`, all dropped ones.
    """

    info = MethodInfo(
        title="PruMerge+",
        year=2024,
        stage="vision",
        merges=True,
        paper="https://arxiv.org/abs/2403.15388",
    )

    def choose(self, similarity: Tensor, count: int) -> Tensor:
        """A quarter by similarity, three quarters by place."""
        return with_samples(similarity, count)


def with_samples(attention: Tensor, count: int) -> Tensor:
    """Indices (B, count): the highest quarter of `attention` (B, N), then evenly spaced ones of the others."""
    outliers = highest(attention, -(-count // 4))
    rest = others(outliers, attention.shape[1])
    samples = count - outliers.shape[1]
    places = torch.arange(samples, device=rest.device) * rest.shape[1] // max(samples, 1)
    return torch.cat([outliers, rest[:, places]], dim=1)


METHOD = PruMergePlus
