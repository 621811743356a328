"""PyramidDrop: a cut behind each quarter of the decoder (Xing et al., CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ivtp.core.rollout import attention_row
from ivtp.core.schedule import ratio_of_mean, uniform_ratio
from ivtp.errors import ConfigError
from ivtp.methods.base import Cut, Method, MethodInfo, Plan, Window, check_choice, quarters_of


@dataclass(frozen=True)
class Options:
    """`keep_is`: whether `keep` is what remains at the end or the mean over the decoder's layers."""

    keep_is: Literal["final", "mean"] = "final"

    def __post_init__(self) -> None:
        check_choice("keep_is", self.keep_is, ("final", "mean"))


class PyramidDrop(Method):
    """Keeps, at the end of each of the first three quarters, what the last prompt token attends to most.

    The attention is that of the next layer, whose queries and keys are computed in advance. One keep ratio for all
    cuts: 72 of 576 tokens is the paper's 0.5, and `schedule` gives other counts.
    """

    info = MethodInfo(
        title="PyramidDrop",
        year=2024,
        stage="llm",
        guided=True,
        paper="https://arxiv.org/abs/2410.17247",
    )
    Options = Options
    reads = frozenset({"schedule", "budget"})

    def make_plan(self) -> Plan:
        """Three cuts behind layers."""
        size = self.geometry
        layers = [layer - 1 for layer in quarters_of(size.text_layers, "pyramiddrop")]
        counts = self.explicit_counts(len(layers)) or self._counts(layers)
        return Plan(
            tuple(
                Cut("llm", layer, count, place="behind", taps=(layer + 1,), peek=True)
                for layer, count in zip(layers, counts, strict=True)
            )
        )

    def score(self, window: Window) -> Tensor:
        """Attention of the last prompt token in the layer behind the cut."""
        return attention_row(window.taps[-1], window.reference)

    def _counts(self, layers: list[int]) -> list[int]:
        patches, depth = self.geometry.num_patches, self.geometry.text_layers
        if self.options.keep_is == "final":
            return uniform_ratio(patches, self.keep, len(layers))
        bounds = [-1, *layers, depth - 1]
        spans = [b - a for a, b in pairwise(bounds)]  # layers at each count
        counts = ratio_of_mean(patches, self.keep, spans)
        if counts is None:
            least = -(-patches * spans[0] // depth) + 1
            raise ConfigError(
                f'keep={self.keep} is below what the first {spans[0]} layers alone need with keep_is="mean"; '
                f"use {least} up"
            )
        return counts


METHOD = PyramidDrop
