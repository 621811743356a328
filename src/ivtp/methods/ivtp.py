"""IVTP: instruction-guided visual token pruning (Huang et al., ECCV 2024, doi 10.1007/978-3-031-72643-9_13)."""

from __future__ import annotations

from torch import Tensor

from ivtp.core.rollout import importance, rollout_row
from ivtp.core.schedule import groups, uniform_ratio
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window


class Ivtp(Method):
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
        trainable=False,
        merges=False,
        paper="https://doi.org/10.1007/978-3-031-72643-9_13",
    )
    needs = frozenset({"cls", "text_side"})
    reads = frozenset(
        {"stages", "schedule", "budget", "group_layers", "llm_layers", "threshold", "aggregation", "guide"}
    )

    @property
    def needed(self) -> frozenset[str]:
        """Without a text side where the guide reads none; the CLS token is also what stands in for the guide."""
        return self.needs if self.reads_text_side else self.needs - {"text_side"}

    def make_plan(self) -> Plan:
        """One cut at the end of each group, with as many tokens as the schedule says."""
        size, config = self.geometry, self.config
        group_layers, llm_layers = config.group_layers, config.llm_layers
        assert group_layers is not None
        assert llm_layers is not None
        if llm_layers > size.text_layers:
            raise ConfigError(
                f"llm_layers={llm_layers} exceeds the {size.text_layers} decoder layers of this model; "
                f"use 1..{size.text_layers}"
            )
        guide_layers = 0 if config.stages == "vision" else llm_layers
        vision = [] if config.stages == "llm" else groups(size.vision_layers, group_layers)
        llm = groups(guide_layers, group_layers)
        counts = self._counts(len(vision), len(llm))
        places = [("vision", group) for group in vision] + [("llm", group) for group in llm]
        cuts = tuple(
            Cut(where, group[-1], keep, taps=tuple(group))  # type: ignore[arg-type]
            for (where, group), keep in zip(places, counts, strict=True)
        )
        return Plan(cuts, guide_layers=guide_layers)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """A row of the last layer's attention and, where maps are multiplied, all rows of the layers before it."""
        products = self.config.aggregation in ("residual", "multiply")
        return ChoiceCost(rows=(*("all" if products else "one" for _ in cut.taps[:-1]), "one"))

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 over the group's layers."""
        row = rollout_row(window.taps, window.reference, self.config.aggregation)
        return importance(row, window.taps[-1].value, window.visual)

    def _counts(self, vision_groups: int, llm_groups: int) -> list[int]:
        """Tokens after each group: the uniform ratio, an explicit list, or (two numbers) a target for each stage."""
        total, given = vision_groups + llm_groups, self.config.schedule
        patches = self.geometry.num_patches
        if given is None:
            return uniform_ratio(patches, self.keep, total)
        if given[0] > patches:
            raise ConfigError(f"schedule={given} starts above the {patches} visual tokens of this model; start lower")
        if len(given) == total:
            counts = list(given)
        elif len(given) == 2 and vision_groups and llm_groups:
            counts = uniform_ratio(patches, given[0], vision_groups) + uniform_ratio(given[0], given[1], llm_groups)
        else:
            raise ConfigError(
                f"schedule={given} has {len(given)} entries; give one for each of the {total} groups "
                f"({vision_groups} in the encoder, {llm_groups} in the decoder), or two: a target for each stage"
            )
        return counts


METHOD = Ivtp
