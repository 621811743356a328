"""CDPruner: conditional diversity, led by the instruction (Zhang et al., NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

from torch import Tensor

from ivtp.core.diversity import cosine, greedy_map
from ivtp.core.select import ranks
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


class CdPruner(Method):
    """Greedy MAP of a determinantal point process over projected tokens, weighted by their relevance.

    The kernel is r_i S_ij r_j: S the cosine of projected tokens, r the negated cosine of a patch (the encoder's last
    layer, post-normalised and projected by CLIP) with CLIP's embedding of the instruction, min-max normalised over
    the image, 1e-6 added to its numerator. Raster order.
    """

    info = MethodInfo(
        title="CDPruner",
        year=2025,
        stage="vision",
        guided=True,
        paper="https://arxiv.org/abs/2506.10967",
    )
    needs = frozenset({"text_side"})
    reads_clip = True

    def make_plan(self) -> Plan:
        """One cut behind the projector."""
        return one_cut(self.geometry, self.keep, "projected")

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs."""
        return ChoiceCost(2.0 * entering**2 * self.geometry.text_hidden)

    def score(self, window: Window) -> Tensor:
        """The order of the choice."""
        assert window.relevance is not None
        kernel = conditional_kernel(window.hidden, window.relevance)
        return ranks(greedy_map(kernel, window.cut.keep), window.hidden.shape[1])


def conditional_kernel(features: Tensor, similarity: Tensor) -> Tensor:
    """r S r (B, N, N) of `features` (B, N, D) and their CLIP `similarity` (B, N) with the instruction."""
    negated = -similarity.float()
    low, high = negated.amin(dim=1, keepdim=True), negated.amax(dim=1, keepdim=True)
    relevance = (negated - low + 1e-6) / (high - low).clamp_min(1e-12)
    return relevance.unsqueeze(2) * cosine(features) * relevance.unsqueeze(1)


METHOD = CdPruner
