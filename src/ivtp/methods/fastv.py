"""FastV: one cut behind an early decoder layer (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ivtp.core.rollout import attention_row
from ivtp.methods.base import Cut, Method, MethodInfo, Plan, Window, check_layer


@dataclass(frozen=True)
class Options:
    """`layer`: the paper's K, the number of decoder layers that see all tokens (2 or 3)."""

    layer: int = 2


class FastV(Method):
    """Keeps the visual tokens that the last prompt token attends to most in the K-th decoder layer, head mean.

    Tokens leave behind that layer, the others keep their order and their positions.
    """

    info = MethodInfo(
        title="FastV",
        year=2024,
        stage="llm",
        guided=True,
        paper="https://arxiv.org/abs/2403.06764",
    )
    Options = Options
    reads = frozenset({"budget"})

    def make_plan(self) -> Plan:
        """One cut behind layer K (0-based: K - 1)."""
        layer = check_layer("layer", self.options.layer, self.geometry) - 1
        return Plan((Cut("llm", layer, self.keep, place="behind", taps=(layer,)),))

    def score(self, window: Window) -> Tensor:
        """Attention of the last prompt token."""
        return attention_row(window.taps[-1], window.reference)


METHOD = FastV
