"""ToMe: merge the most similar tokens in every layer (Bolya et al., ICLR 2023, arXiv 2210.09461)."""

from __future__ import annotations

import torch

from ivtp.core.merge import match_halves, mean_by_size, sizes
from ivtp.core.schedule import halving
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window


class ToMe(Method):
    """Bipartite soft matching between attention and MLP of every encoder layer.

    The tokens, CLS included, are split in turn; the r of the one half that are most similar to one of the other, by
    the cosine of their keys averaged over the heads, merge into it: a mean weighted by the number of patches that
    each stands for. CLS, where there is one, never merges. Attention is proportional: the logarithm of a token's size
    is added to its logits. r is the same in every layer, up to rounding, so that `keep` remain; where that is more than
    half of the tokens, earlier layers merge more. A merged token stands at the place of the one that the others went
    into.
    """

    info = MethodInfo(
        title="ToMe",
        year=2023,
        stage="vision",
        merges=True,
        paper="https://arxiv.org/abs/2210.09461",
    )

    def make_plan(self) -> Plan:
        """A cut inside every encoder layer."""
        size = self.geometry
        counts = halving(size.num_patches, self.keep, size.vision_layers)
        if counts is None:
            least = -(-size.num_patches // 2**size.vision_layers)
            raise ConfigError(
                f"keep={self.keep} needs more merging than {size.vision_layers} layers do; use {least} up"
            )
        return Plan(tuple(Cut("vision", i, k, taps=(i,), sized=True) for i, k in enumerate(counts)))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosines of the two halves, over the width of one head."""
        width = self.geometry.vision_hidden // self.geometry.vision_heads
        return ChoiceCost(2.0 * (entering / 2) ** 2 * width, rows=("none",))

    def merge(self, window: Window) -> Merged:
        """Merged tokens at the columns of the tokens that the others went into, in ToMe's order."""
        assert window.sources is not None
        first, tokens = self.geometry.vision_cls, window.hidden.shape[1]
        keep = first + window.cut.keep
        metric = window.taps[-1].key.float().mean(dim=1)  # (B, T, d)
        into, _ = match_halves(metric, keep, protected=first)
        hidden = mean_by_size(window.hidden, into, sizes(window.sources, window.patch))
        order = torch.arange(tokens, device=into.device).expand_as(into)
        if keep < tokens:  # the first half, ascending, then the second
            order = (order % 2 + 2 * (into != order)).argsort(dim=1, stable=True)[:, :keep]
        return Merged(hidden, into, order[:, first:])


METHOD = ToMe
