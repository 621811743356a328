"""IVTP+: IVTP's groups and pseudo CLS token, but what leaves the encoder merges; a variant of this project."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ivtp.core.diversity import nearest_better
from ivtp.core.merge import match_halves, mean_by_size, rounds, sizes
from ivtp.core.schedule import groups
from ivtp.core.select import take
from ivtp.methods.base import ChoiceCost, Cut, Merged, MethodInfo, Plan, Window
from ivtp.methods.groups import GroupWise


class IvtpPlus(GroupWise):
    """IVTP's groups and guide; in the encoder redundant tokens merge, in the decoder those that stay differ.

    Encoder: at the end of a group the tokens are split in turn, and those of the first half that are most similar to
    one of the second, by the cosine of the layer's keys averaged over the heads, merge into it, a mean weighted by the
    number of patches that each stands for: ToMe's bipartite soft matching (Bolya et al., ICLR 2023, arXiv 2210.09461,
    section 3), but once a group, in raster order and without a bias on attention. CLS does not choose: it looks at a
    few of many objects. Decoder: a token's importance in the rollout from the pseudo CLS token (IVTP, Eq. 2-7), times
    1 - its cosine with the most similar more important one, of the keys of the group's last layer; the highest stay.
    More than `keep` by 1/18 of all patches, and at least 1/9 of them, leave the encoder, but no more than four times
    `keep` and 64; one ratio in each stage.
    """

    info = MethodInfo(
        title="IVTP+",
        year=2026,
        stage="both",
        guided=True,
        merges=True,
        paper="(variant of IVTP)",
    )
    heeds_padding = True

    def make_plan(self) -> Plan:
        """IVTP's cuts, of which those in the encoder read one layer each."""
        size, options = self.geometry, self.options
        vision, llm = (groups(n, options.group_layers) for n in (size.vision_layers, options.llm_layers))
        plan = self.group_plan(vision, llm, between(size.num_patches, self.keep))
        cuts = (dataclasses.replace(cut, taps=cut.taps[-1:]) if cut.where == "vision" else cut for cut in plan.cuts)
        return dataclasses.replace(plan, cuts=tuple(cuts))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """In the encoder the cosines of the halves, over the width of one head; in the decoder rollout and cosines."""
        if cut.where == "llm":
            cosines = 2.0 * entering**2 * self.geometry.text_kv_heads * self.geometry.text_head_dim
            return dataclasses.replace(self.rollout_cost(cut), flops=cosines)
        width = self.geometry.vision_hidden // self.geometry.vision_heads
        pairs = sum((n + 1) // 2 * (n // 2) for n in rounds(entering, cut.keep)[:-1])
        return ChoiceCost(2.0 * pairs * width, rows=("none",))

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4, and less the more a token resembles a better one that shares its budget."""
        worth, keys = super().score(window), window.taps[-1].key.transpose(1, 2).flatten(2)  # (B, T, H_kv * d)
        for tokens, entered, _ in window.budgets:
            columns = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(entered)]  # theirs come first
            own = worth.gather(1, columns).masked_fill(~tokens.gather(1, columns), -1.0)
            less = own * (1 - nearest_better(own, take(keys, columns)))
            worth = torch.where(tokens, worth.scatter(1, columns, less), worth)
        return worth

    def merge(self, window: Window) -> Merged | None:
        """Merged tokens in the encoder, at the columns of those that the others went into; in the decoder none."""
        if window.cut.where == "llm":
            return None
        assert window.sources is not None
        first, key = self.geometry.vision_cls, window.taps[-1].key.float().mean(dim=1)  # (B, T, d)
        padding = None if window.padding is None else window.padding[:, first:]
        goes, distinct = match_halves(key[:, first:], window.cut.keep, padding=padding)
        columns = torch.arange(first, device=goes.device).expand(len(goes), -1)
        into = torch.cat([columns, torch.where(goes < 0, -1, goes + first)], dim=1)
        hidden = mean_by_size(window.hidden, into, sizes(window.sources, window.patch))
        return Merged(hidden, into, scores=nn.functional.pad(distinct, (first, 0)))


def between(patches: int, keep: int) -> int:
    """Tokens of an image that leave the encoder where `keep` remain at the end; of 576 patches 96 for 64, 64 for 16.

    Of an image in tiles these shares are dearer than IVTP's where few remain: four for each that remains are enough.
    """
    return min(patches, max(keep + patches // 18, patches // 9), max(4 * keep, 64))


METHOD = IvtpPlus
