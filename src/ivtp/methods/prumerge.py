"""PruMerge: outliers of CLS attention, merged with their neighbours (Shang et al., ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

from torch import Tensor

from ivtp.core.select import highest
from ivtp.methods.base import MethodInfo
from ivtp.methods.outliers import OutlierMerging


class PruMerge(OutlierMerging):
    """Keeps the patches most similar to CLS; each takes up its nearest neighbours, and one token takes up all dropped.

    Similarity is softmax(q k^T) over the full width in the encoder's last layer. To each kept token the 32 others with
    the most similar keys (cosine) are added, kept ones among them, weighted by their similarity to CLS and not
    normalised; the extra token, one of `keep`, is that sum over all dropped ones. Kept tokens come in the order of
    their scores, the extra one last, at the place of the dropped patch that is most similar to CLS. The paper lets the
    interquartile rule choose their number (`iqr_outliers`), which differs between images; here it is `keep`.
    """

    info = MethodInfo(
        title="PruMerge",
        year=2024,
        stage="vision",
        merges=True,
        paper="https://arxiv.org/abs/2403.15388",
    )

    def choose(self, similarity: Tensor, count: int) -> Tensor:
        """The most similar ones."""
        return highest(similarity, count)


METHOD = PruMerge
