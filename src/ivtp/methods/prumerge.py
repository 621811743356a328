"""PruMerge: outliers of CLS attention, merged with their neighbours (Shang et al., ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

from ivtp.core.merge import take_up_neighbours
from ivtp.core.rollout import full_width_row
from ivtp.core.select import highest
from ivtp.methods.base import Cut, Merged, Method, MethodInfo, Plan, Window, last_vision_layer


class PruMerge(Method):
    """Keeps the patches most similar to CLS; each takes up its nearest dropped neighbours, and one token takes up all.

    Similarity is softmax(q k^T) over the full width, not head by head, in the encoder's last layer; features are those
    that the projector reads. To each kept token the 32 dropped ones with the most similar keys (cosine) are added,
    weighted by their similarity to CLS and not normalised; the extra token, one of `keep`, is that sum over all
    dropped ones. Kept tokens come in the order of their scores, the extra one last, at the place of the dropped patch
    that is most similar to CLS. The paper lets the interquartile rule choose their number (`iqr_outliers`), which
    differs between images; here it is `keep`.
    """

    info = MethodInfo(
        title="PruMerge",
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
        kept = highest(attention, window.cut.keep - 1)
        return Merged(*take_up_neighbours(window.hidden, window.taps[-1].key, attention, kept))


METHOD = PruMerge
