"""VisionZip: dominant tokens and merged contextual ones (Yang et al., CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivtp.core.rollout import attention_row
from ivtp.core.select import highest, others, put, take
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window, one_cut


class VisionZip(Method):
    """Keeps the CLS token, the patches that it attends to most, and a few tokens that the other patches merge into.

    Of 64 tokens 54 are dominant, CLS among them, and 10 contextual, in that proportion for any `keep`. Attention and
    keys are those of the last layer whose output the projector reads (the encoder's second-to-last), attention summed
    and keys averaged over the heads. Contextual targets lie at a uniform stride among the remaining patches; each
    other one goes to the target with the most similar key, and a target becomes itself plus the mean of those.
    Dominant tokens come first, in raster order. CLS stands at the place of the highest-scored patch that has no place
    of its own.
    """

    info = MethodInfo(
        title="VisionZip",
        year=2024,
        stage="vision",
        merges=True,
        paper="https://arxiv.org/abs/2412.04467",
    )
    needs = frozenset({"cls"})
    keeps_all = False

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        return one_cut(self.geometry, self.keep, "behind", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """An attention row, which contextual token each other patch goes to, and their sums."""
        width = self.geometry.vision_hidden
        keys = width / self.geometry.vision_heads
        return ChoiceCost(2.0 * (entering - cut.keep) * contextual_count(cut.keep) * (keys + width))

    def merge(self, window: Window) -> Merged:
        """CLS, dominant and contextual tokens."""
        tap, hidden, keep = window.taps[-1], window.hidden, window.cut.keep
        attention = attention_row(tap, reference=0)[:, 1:] * tap.query.shape[1]  # (B, N), summed over the heads
        contextual = contextual_count(keep)
        dominant = highest(attention, keep - contextual - 1).sort(dim=1).values
        rest = others(dominant, attention.shape[1])
        metric = tap.key.float().mean(dim=1)[:, 1:]  # (B, N, d)
        targets, members, merged, choice = merge_contextual(hidden[:, 1:], metric, rest, contextual)
        placed = torch.cat([dominant, targets], dim=1)
        stand_in = attention.scatter(1, placed, float("-inf")).argmax(dim=1, keepdim=True)  # CLS's place
        into = torch.full_like(window.patch, -1).scatter(1, members + 1, targets.gather(1, choice) + 1)
        own = torch.cat([stand_in, placed], dim=1) + 1
        into = into.scatter(1, own, own)
        hidden = put(put(hidden, targets + 1, merged), stand_in + 1, hidden[:, :1])
        return Merged(hidden, into, order=own, stand_ins=own[:, :1])


def contextual_count(keep: int) -> int:
    """Contextual tokens among `keep`: 10 of 64."""
    return round(keep * 10 / 64)


def merge_contextual(hidden: Tensor, metric: Tensor, rest: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """VisionZip's contextual tokens.

    `hidden` (B, N, D), `metric` (B, N, d), `rest` (B, R) the indices that are not dominant. Returns the targets
    (B, count), the other indices of `rest` (B, R - count), the merged tokens (B, count, D) and which target each other
    one went to (B, R - count).
    """
    batch, left = rest.shape
    stride = max(1, left // max(count, 1))
    chosen = torch.arange(0, left, stride, device=rest.device)[:count].expand(batch, -1)
    targets, members = rest.gather(1, chosen), rest.gather(1, others(chosen, left))
    if count == 0 or left == count:
        return targets, members[:, :0], take(hidden, targets), members[:, :0]
    unit = nn.functional.normalize(metric.float(), dim=-1)
    choice = (take(unit, members) @ take(unit, targets).transpose(1, 2)).argmax(dim=2)  # (B, R - count)
    goes = nn.functional.one_hot(choice, count).to(hidden.dtype)  # (B, R - count, count)
    mean = goes.transpose(1, 2) @ take(hidden, members) / goes.sum(dim=1).clamp_min(1).unsqueeze(-1)
    return targets, members, take(hidden, targets) + mean, choice


METHOD = VisionZip
