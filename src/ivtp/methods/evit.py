"""EViT: keep the patches that CLS attends to, fuse the rest (Liang et al., ICLR 2022, arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ivtp.core.rollout import attention_row
from ivtp.core.schedule import linear, uniform_ratio
from ivtp.core.select import highest, others, put, take
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window, check_choice, quarters_of


@dataclass(frozen=True)
class Options:
    """`places`: a cut in every layer, the same number less each time, or the paper's three at one keep ratio."""

    places: Literal["layers", "three"] = "layers"

    def __post_init__(self) -> None:
        check_choice("places", self.places, ("layers", "three"))


class Evit(Method):
    """Between attention and MLP, keeps the tokens with the highest CLS attention and fuses the others into one.

    The fused token is their sum weighted by that attention, not normalised; it counts among the `keep` and may be
    kept or fused again by the next cut. Tokens leave in the order of their scores, the fused one last, and it stands
    at the place of its most attended patch. The paper cuts 3 of 12 layers (`places="three"`: at one, two and three
    quarters); the cost that the IVTP paper prints for EViT is that of a cut in every layer, the default here.
    """

    info = MethodInfo(
        title="EViT",
        year=2022,
        stage="vision",
        merges=True,
        paper="https://arxiv.org/abs/2202.07800",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """Cuts inside the encoder's layers."""
        size = self.geometry
        layers: tuple[int, ...] = tuple(range(size.vision_layers))
        counts = linear(size.num_patches, self.keep, size.vision_layers)
        if self.options.places == "three":
            layers = quarters_of(size.vision_layers, "evit")
            counts = uniform_ratio(size.num_patches, self.keep, len(layers))
        return Plan(tuple(Cut("vision", i, k, taps=(i,)) for i, k in zip(layers, counts, strict=True)))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """An attention row, and the sum of the tokens that are fused."""
        fused = entering - cut.keep + 1 if cut.keep < entering else 0
        return ChoiceCost(2.0 * fused * self.geometry.vision_hidden)

    def merge(self, window: Window) -> Merged:
        """The kept tokens in the order of their scores, then the fused one."""
        first = self.geometry.vision_cls
        tokens = window.hidden[:, first:]
        attention = attention_row(window.taps[-1], window.reference)[:, first:]
        if window.cut.keep == tokens.shape[1]:
            columns = torch.arange(window.hidden.shape[1], device=tokens.device)
            return Merged(window.hidden, columns.expand(window.patch.shape))
        kept, rest, fused = keep_and_fuse(tokens, attention, window.cut.keep - 1)
        leader = rest.gather(1, attention.gather(1, rest).argmax(dim=1, keepdim=True)) + first  # (B, 1)
        hidden = put(window.hidden, leader, fused)
        into = leader.expand(window.patch.shape).scatter(1, kept + first, kept + first)
        return Merged(hidden, into, order=torch.cat([kept + first, leader], dim=1))


def keep_and_fuse(tokens: Tensor, attention: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """EViT's step on `tokens` (B, N, D) with their CLS `attention` (B, N).

    Returns the indices (B, count) kept, in the order of their scores, those of the others (B, N - count), ascending,
    and the sum of the others weighted by their attention (B, 1, D).
    """
    kept = highest(attention, count)
    rest = others(kept, tokens.shape[1])
    weights = attention.gather(1, rest).to(tokens.dtype)
    return kept, rest, weights.unsqueeze(1) @ take(tokens, rest)


METHOD = Evit
