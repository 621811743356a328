"""What PruMerge and PruMerge+ share: the patches that CLS sees as outliers stay, and take up the others."""

from __future__ import annotations

from torch import Tensor

from ivtp.core.merge import take_up_neighbours
from ivtp.core.rollout import full_width_row
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, Plan, Window


class OutlierMerging(Method):
    """Keeps some patches by their similarity to CLS, and merges the others into them (PruMerge and PruMerge+).

    Similarity is softmax(q k^T) over the full width, not head by head, in the encoder's last layer; features are those
    that the projector reads. One of `keep` is an extra token that takes up all dropped ones.
    """

    needs = frozenset({"cls"})
    keeps_all = False

    def choose(self, similarity: Tensor, count: int) -> Tensor:
        """Indices (B, count) of the patches that stay, in their order, by `similarity` (B, N) to CLS."""
        raise NotImplementedError

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        last = self.geometry.vision_depth - 1  # also where the projector reads an earlier layer
        return Plan((Cut("vision", self.geometry.vision_layers - 1, self.keep, place="behind", taps=(last,)),))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """Similarity of keys, and the weighted sums."""
        kept = cut.keep - 1
        sums = kept * entering + entering - kept  # neighbours of the kept ones, and all dropped ones
        return ChoiceCost(2.0 * (kept * entering + sums) * self.geometry.vision_hidden)

    def merge(self, window: Window) -> Merged:
        """Kept tokens with their neighbours, and the extra one."""
        tap = window.taps[-1]
        similarity = full_width_row(tap, 0)[:, 1:]
        kept = self.choose(similarity, window.cut.keep - 1)
        hidden, into, order = take_up_neighbours(window.hidden, tap.key, similarity, kept)
        return Merged(hidden, into, order, stand_ins=order[:, -1:])
