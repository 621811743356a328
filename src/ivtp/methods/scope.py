"""SCOPE: saliency and coverage (Deng et al., NeurIPS 2025, arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ivtp.core.diversity import cosine, coverage
from ivtp.core.rollout import attention_row
from ivtp.core.select import ranks
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`alpha`: the exponent of saliency in the score."""

    alpha: float = 1.0


class Scope(Method):
    """Chooses, one by one, the patch with the largest gain in coverage times its saliency to the power `alpha`.

    Coverage sums, over all patches, the cosine with the most similar chosen one (0 at first); saliency is the CLS
    attention of the last layer whose output the projector reads, whose features are compared. Raster order. Our
    reading: the cut lies behind the encoder, where CLS attention is, and `alpha` is 1, the plain product.
    """

    info = MethodInfo(
        title="SCOPE",
        year=2025,
        stage="vision",
        paper="https://arxiv.org/abs/2510.24214",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        return one_cut(self.geometry, self.keep, "behind", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs, and an attention row."""
        return ChoiceCost(2.0 * entering**2 * self.geometry.vision_hidden)

    def score(self, window: Window) -> Tensor:
        """The order of the choice."""
        first = self.geometry.vision_cls
        saliency = attention_row(window.taps[-1], window.reference)[:, first:]
        chosen = coverage(cosine(window.hidden[:, first:]), saliency**self.options.alpha, window.cut.keep)
        return ranks(chosen + first, window.hidden.shape[1])


METHOD = Scope
