"""DivPrune: the most diverse subset of projected tokens (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

from torch import Tensor

from ivtp.core.diversity import cosine, max_min
from ivtp.core.select import ranks
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


class DivPrune(Method):
    """Solves the max-min diversity problem greedily on the cosine distance of projected tokens.

    The first token is the one whose nearest neighbour is farthest, each next one the farthest from its nearest among
    those chosen. Raster order.
    """

    info = MethodInfo(
        title="DivPrune",
        year=2025,
        stage="vision",
        paper="https://arxiv.org/abs/2503.02175",
    )

    def make_plan(self) -> Plan:
        """One cut behind the projector."""
        return one_cut(self.geometry, self.keep, "projected")

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs."""
        return ChoiceCost(2.0 * entering**2 * self.geometry.text_hidden)

    def score(self, window: Window) -> Tensor:
        """The order of the choice."""
        return ranks(max_min(1 - cosine(window.hidden), window.cut.keep), window.hidden.shape[1])


METHOD = DivPrune
