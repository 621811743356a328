"""IVTP: instruction-guided visual token pruning (Huang et al., ECCV 2024, doi 10.1007/978-3-031-72643-9_13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ivtp.core.rollout import importance, rollout_row
from ivtp.core.schedule import groups
from ivtp.methods.base import ChoiceCost, Cut, MethodInfo, Plan, Window, check_choice
from ivtp.methods.groups import GroupOptions, GroupWise

Aggregation = Literal["residual", "mean", "max", "multiply", "layer"]
Stages = Literal["both", "vision", "llm"]


@dataclass(frozen=True)
class Options(GroupOptions):
    """The paper's ablations beside what all group-wise methods have."""

    aggregation: Aggregation = "residual"
    """How a group's attention maps become one (Eq. 3 and its ablations)."""
    stages: Stages = "both"
    """Prune inside the vision encoder, inside the decoder, or in both."""

    def __post_init__(self) -> None:
        check_choice("aggregation", self.aggregation, get_args(Aggregation))
        check_choice("stages", self.stages, get_args(Stages))
        super().__post_init__()


class Ivtp(GroupWise):
    """Group-wise pruning by attention rollout, in the encoder and, led by a pseudo CLS token, in the decoder.

    Keeps the visual tokens with the largest share of the group's rolled-out attention from the CLS token (stage 1)
    or from the pseudo CLS token made of the instruction's relevant words (stage 2), weighted by value norms
    (Eq. 2-4). Parameters with the paper's values: `group_layers` 3, `llm_layers` 12, `threshold` 0.2,
    `aggregation` "residual", `guide` "instruction". The paper prints no schedule; one keep ratio for all groups
    reproduces its published cost.
    """

    info = MethodInfo(
        title="IVTP",
        year=2024,
        stage="both",
        guided=True,
        paper="https://doi.org/10.1007/978-3-031-72643-9_13",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut at the end of each group, with as many tokens as the schedule says."""
        options = self.options
        vision = [] if options.stages == "llm" else groups(self.geometry.vision_layers, options.group_layers)
        llm = [] if options.stages == "vision" else groups(options.llm_layers, options.group_layers)
        return self.group_plan(vision, llm)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """A row of the last layer's attention and, where maps are multiplied, all rows of the layers before it."""
        if self.options.aggregation in ("residual", "multiply"):
            return self.rollout_cost(cut)
        return ChoiceCost()

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 over the group's layers."""
        row = rollout_row(window.taps, window.reference, self.options.aggregation)
        return importance(row, window.taps[-1].value, window.visual)


METHOD = Ivtp
