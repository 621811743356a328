"""TOPS: relevance, coverage and diversity in one greedy choice (Wang et al., 2026, arXiv 2606.27161)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core.diversity import cosine
from ivtp.core.rollout import attention_row
from ivtp.core.select import ranks
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`diversity` and `coverage`: their weights beside relevance (the paper's alpha_1 and lambda_1)."""

    diversity: float = 0.5
    coverage: float = 0.5

    def __post_init__(self) -> None:
        for name in ("diversity", "coverage"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is no weight; use a number from 0 up")


class Tops(Method):
    """TOPS's first stage: expands a set of projected tokens by the best sum of three criteria (Algorithm 1, Eq. 8).

    The first token has the highest relevance, the CLS attention. Each next one has the highest sum of its relevance,
    its diversity 1 - max over the set of its similarity, times `diversity`, and its coverage, times `coverage`: the
    sum over all tokens outside the set, itself among them, of max(0, their similarity with it - their highest with the
    set). In every step each criterion is divided by its mean over the tokens outside the set. Raster order. The second
    stage, which prunes again in the decoder, is not here. Our reading: similarity is the cosine, CLS attention that of
    the last layer whose output the projector reads, and criteria are normalised as Algorithm 1 says, by their means,
    where the text to Eq. 6 says min-max.
    """

    info = MethodInfo(
        title="TOPS",
        year=2026,
        stage="vision",
        paper="https://arxiv.org/abs/2606.27161",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut behind the projector that reads CLS attention."""
        return one_cut(self.geometry, self.keep, "projected", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs, and an attention row."""
        return ChoiceCost(2.0 * entering**2 * self.geometry.text_hidden)

    def score(self, window: Window) -> Tensor:
        """The order of the choice."""
        relevance = attention_row(window.taps[-1], window.reference)[:, self.geometry.vision_cls :]
        options = self.options
        chosen = preservation_set(
            cosine(window.hidden), relevance, window.cut.keep, options.diversity, options.coverage
        )
        return ranks(chosen, window.hidden.shape[1])


def preservation_set(similarity: Tensor, relevance: Tensor, count: int, diversity: float, coverage: float) -> Tensor:
    """TOPS's choice (B, count), in its order, by `similarity` (B, N, N) and `relevance` (B, N) (Algorithm 1)."""
    rows = torch.arange(similarity.shape[0], device=similarity.device)
    point = relevance.argmax(dim=1)  # (B,)
    chosen, free = [point], torch.ones_like(relevance, dtype=torch.bool)
    nearest = similarity[rows, point]  # (B, N) of every token its highest similarity with the set
    for _ in range(count - 1):
        free[rows, point] = False
        # of every candidate; nothing is nearer to a token of the set than itself, so that these gain nothing
        reach = (similarity - nearest.unsqueeze(1)).clamp_min(0).sum(dim=2)
        score = _by_mean(relevance, free) + diversity * _by_mean(1 - nearest, free) + coverage * _by_mean(reach, free)
        point = score.masked_fill(~free, float("-inf")).argmax(dim=1)
        chosen.append(point)
        nearest = torch.maximum(nearest, similarity[rows, point])
    return torch.stack(chosen, dim=1)


def _by_mean(values: Tensor, free: Tensor) -> Tensor:
    """`values` (B, N) in units of their mean over the `free` (B, N) ones; 0 where that is 0."""
    mean = (values * free).sum(dim=1, keepdim=True) / free.sum(dim=1, keepdim=True)
    return values / torch.where(mean > 0, mean, float("inf"))


METHOD = Tops
