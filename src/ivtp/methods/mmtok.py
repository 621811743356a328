"""MMTok: tokens that cover the question and the image (Dong et al., ICLR 2026, arXiv 2508.18264)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivtp.core.diversity import cosine, coverage
from ivtp.core.select import ranks
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`alpha`: weight of the image's coverage; temperatures of the softmax over the patches, for words and patches."""

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ConfigError(f"alpha={self.alpha!r} is no weight; use a number from 0 up")
        for name in ("text_temperature", "vision_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is no temperature; use a number above 0")


class MmTok(Method):
    """Chooses, one by one, the token that adds most to the coverage of the question's tokens and of all patches.

    A target is covered as well as by the chosen token most similar to it (Eq. 1). Words are compared with projected
    tokens, in the decoder's space, patches with one another by the features that the projector reads. Either similarity
    becomes a softmax over all patches, at a temperature of 0.02 for words and 0.2 for patches (Sec. 3.1.3); the
    objective is the mean over the words plus `alpha` times the mean over the patches (Eq. 2, Algorithm 2). Raster
    order. Our reading: words are the question's tokens as they enter the decoder, patches are compared by their cosine
    as the words are, and without any words the patches alone count. The paper's optional agent, which answers
    first to give more words, is not here.
    """

    info = MethodInfo(
        title="MMTok",
        year=2025,
        stage="vision",
        guided=True,
        paper="https://arxiv.org/abs/2508.18264",
    )
    Options = Options
    reads_words = True

    def make_plan(self) -> Plan:
        """One cut behind the projector."""
        return one_cut(self.geometry, self.keep, "projected")

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs of patches, and of patches and words: as if the question were the whole text."""
        size = self.geometry
        return ChoiceCost(2.0 * entering * (entering * size.vision_hidden + text_tokens * size.text_hidden))

    def score(self, window: Window) -> Tensor:
        """The order of the choice."""
        assert window.words is not None
        assert window.features is not None
        options = self.options
        shares = covering_shares(
            window.words,
            window.hidden,
            window.features,
            options.alpha,
            options.text_temperature,
            options.vision_temperature,
        )
        chosen = coverage(shares, torch.ones_like(shares[:, :, 0]), window.cut.keep)
        return ranks(chosen, window.hidden.shape[1])


def covering_shares(
    words: Tensor, tokens: Tensor, features: Tensor, alpha: float, text_temperature: float, vision_temperature: float
) -> Tensor:
    """What each token adds to MMTok's objective by covering each word and each patch alone: (B, N, W + N), float32.

    `words` (B, W, D), zeros behind each row's last, `tokens` (B, N, D) projected, `features` (B, N, D_vision) before.
    """
    there = (words != 0).any(dim=2, keepdim=True)  # (B, W, 1)
    unit = nn.functional.normalize(tokens.float(), dim=-1)
    to_words = nn.functional.normalize(words.float(), dim=-1) @ unit.transpose(1, 2)  # (B, W, N)
    by_word = (to_words / text_temperature).softmax(dim=2) * there / there.sum(dim=1, keepdim=True).clamp_min(1)
    by_patch = (cosine(features) / vision_temperature).softmax(dim=2) * (alpha / features.shape[1])
    return torch.cat([by_word, by_patch], dim=1).transpose(1, 2)


METHOD = MmTok
