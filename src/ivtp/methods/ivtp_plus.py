"""IVTP+: IVTP's groups and guides, but what leaves the encoder merges (a variant of this project)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivtp.core.merge import mean_by_size, sizes
from ivtp.core.schedule import groups
from ivtp.core.select import highest, take
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, GroupOptions, GroupWise, Merged, MethodInfo, Plan, Window


@dataclass(frozen=True)
class Options(GroupOptions):
    """`importance`: in the encoder, the power of a token's importance beside its redundancy; 0: redundancy alone."""

    importance: float = 0.25

    def __post_init__(self) -> None:
        value = self.importance
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ConfigError(f"importance={value!r} is no power; use a number from 0 up")
        super().__post_init__()


class IvtpPlus(GroupWise):
    """TODO"""

    info = MethodInfo(
        title="IVTP+",
        year=2026,
        stage="both",
        guided=True,
        merges=True,
        paper="(variant of IVTP)",
    )
    Options = Options
    heeds_padding = True

    def make_plan(self) -> Plan:
        """Cuts as IVTP's, with counts of their own for each stage."""
        size, options = self.geometry, self.options
        vision, llm = (groups(n, options.group_layers) for n in (size.vision_layers, options.llm_layers))
        return self.group_plan(vision, llm, between(size.num_patches, self.keep))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The rollout and, in the encoder, the cosines of the two halves over the width of one head."""
        width = self.geometry.vision_hidden // self.geometry.vision_heads
        pairs = sum((n + 1) // 2 * (n // 2) for n in rounds(entering, cut.keep)[:-1]) if cut.where == "vision" else 0
        return ChoiceCost(2.0 * pairs * width, rows=(*("all" for _ in cut.taps[:-1]), "one"))

    def merge(self, window: Window) -> Merged | None:
        """Merged tokens in the encoder, at the columns of those that the others went into; in the decoder none."""
        if window.cut.where == "llm":
            return None
        assert window.sources is not None
        first, scores = self.geometry.vision_cls, self.score(window)
        key = window.taps[-1].key.float().mean(dim=1)  # (B, T, d)
        padding = None if window.padding is None else window.padding[:, first:]
        goes = merge_redundant(key[:, first:], scores[:, first:] ** self.options.importance, window.cut.keep, padding)
        columns = torch.arange(first, device=goes.device).expand(len(goes), -1)
        into = torch.cat([columns, torch.where(goes < 0, -1, goes + first)], dim=1)
        hidden = mean_by_size(window.hidden, into, sizes(window.sources, window.patch))
        return Merged(hidden, into, scores=scores)


def between(patches: int, keep: int) -> int:
    """Tokens of an image that leave the encoder, so that `keep` remain in the end."""
    return min(patches, max(keep, 80))


def rounds(tokens: int, keep: int) -> list[int]:
    """Tokens before and after each round of merging, none of which takes more than half of them."""
    counts = [tokens]
    while counts[-1] > keep:
        counts.append(max(keep, (counts[-1] + 1) // 2))
    return counts


def merge_redundant(metric: Tensor, weight: Tensor, keep: int, padding: Tensor | None = None) -> Tensor:
    """Which of the tokens (B, N) each goes into, its own index where it is one of the `keep` that stay.

    The tokens are split in turn; those of the first half with the smallest `weight` (B, N) times 1 - best cosine of
    their `metric` (B, N, d) with one of the second half go into that one. `padding` (B, N) bool leaves first, into
    nothing (-1), and takes nothing in while anything else is left.
    """
    batch, tokens, _ = metric.shape
    unit = nn.functional.normalize(metric.float(), dim=-1)
    goes = torch.arange(tokens, device=metric.device).expand(batch, -1)
    left = goes if padding is None else padding.to(torch.uint8).argsort(dim=1, stable=True)  # padding at the end
    for count in rounds(tokens, keep)[1:]:
        target, stay = _round(unit, weight, left, count, padding)
        goes = torch.where(goes < 0, -1, target.gather(1, goes.clamp_min(0)))
        left = left.gather(1, stay)
    return goes


def _round(unit: Tensor, weight: Tensor, left: Tensor, keep: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """A round among the tokens `left` (B, n): where each of all tokens goes (B, N), and which places stay (B, k)."""
    first, second = left[:, ::2], left[:, 1::2]
    cosine = take(unit, first) @ take(unit, second).transpose(1, 2)
    if padding is not None:
        cosine = cosine.masked_fill(padding.gather(1, second).unsqueeze(1), -2.0)
    best, partner = cosine.max(dim=2)
    loss = torch.full(left.shape, float("inf"), device=left.device)
    loss[:, ::2] = weight.gather(1, first) * (1 - best)
    target = left.clone()
    target[:, ::2] = second.gather(1, partner)
    if padding is not None:
        hidden = padding.gather(1, left)
        loss, target = loss.masked_fill(hidden, float("-inf")), target.masked_fill(hidden, -1)
    stay = highest(loss, keep).sort(dim=1).values
    target = target.scatter(1, stay, left.gather(1, stay))
    columns = torch.arange(unit.shape[1], device=left.device).expand(len(left), -1)
    return columns.scatter(1, left, target), stay


METHOD = IvtpPlus
