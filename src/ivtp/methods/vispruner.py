"""VisPruner: important tokens, then distinct ones (Zhang et al., ICCV 2025, arXiv 2412.01818 v2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core.diversity import drop_duplicates
from ivtp.core.rollout import attention_row
from ivtp.core.select import highest, ranks, take
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`important`: share of the kept tokens that CLS attention chooses (0.5 to 0.75); `step`: duplicates a round."""

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ConfigError(f"important={self.important!r} is no share; use a number from 0 to 1")
        if self.step < 1:
            raise ConfigError(f"step={self.step!r} removes nothing; use a whole number from 1 up")


class VisPruner(Method):
    """Keeps the patches that CLS attends to most, and of the rest those that are least alike.

    The rest, in the order of their attention, is split in turn into two halves; the tokens of the first that are most
    similar to one of the second go, a few a round, until as many are left as `keep` still takes. Features and attention
    are those of the last layer whose output the projector reads. Raster order.
    """

    info = MethodInfo(
        title="VisPruner",
        year=2025,
        stage="vision",
        paper="https://arxiv.org/abs/2412.01818",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        return one_cut(self.geometry, self.keep, "behind", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """An attention row, and in every round the cosines of the two halves."""
        important = self._important(cut.keep)
        rounds = range(entering - important, cut.keep - important, -self.options.step)
        return ChoiceCost(sum(2.0 * (left / 2) ** 2 * self.geometry.vision_hidden for left in rounds))

    def score(self, window: Window) -> Tensor:
        """Important tokens first, then distinct ones."""
        first = self.geometry.vision_cls
        attention = attention_row(window.taps[-1], window.reference)[:, first:]
        chosen = important_and_distinct(
            window.hidden[:, first:],
            attention,
            window.cut.keep,
            self._important(window.cut.keep),
            self.options.step,
        )
        return ranks(chosen + first, window.hidden.shape[1])

    def _important(self, keep: int) -> int:
        return int(keep * self.options.important)


def important_and_distinct(features: Tensor, attention: Tensor, keep: int, important: int, step: int) -> Tensor:
    """VisPruner's choice (B, keep) of `features` (B, N, D) by CLS `attention` (B, N): `important` ones, then others."""
    ranked = highest(attention, attention.shape[1])
    rest = ranked[:, important:]
    distinct = rest.gather(1, drop_duplicates(take(features, rest), keep - important, step))
    return torch.cat([ranked[:, :important], distinct], dim=1)


METHOD = VisPruner
