"""IVTP: instruction-guided visual token pruning (Huang et al., ECCV 2024, doi 10.1007/978-3-031-72643-9_13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ivtp.core.rollout import importance, rollout_row
from ivtp.core.schedule import groups, uniform_ratio
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, GuideOptions, Method, MethodInfo, Plan, Window, check_choice
from ivtp.plan import Geometry

Aggregation = Literal["residual", "mean", "max", "multiply", "layer"]
Stages = Literal["both", "vision", "llm"]


@dataclass(frozen=True)
class Options(GuideOptions):
    """`threshold` and `guide` make the pseudo CLS token; a checkpoint may recommend other values than the paper's."""

    group_layers: int = 3
    """G: consecutive layers that share one token set and one rollout (Eq. 3)."""
    llm_layers: int = 12
    """W: decoder layers that take part in stage 2."""
    aggregation: Aggregation = "residual"
    """How a group's attention maps become one (Eq. 3 and its ablations)."""
    stages: Stages = "both"
    """Prune inside the vision encoder, inside the decoder, or in both."""

    def __post_init__(self) -> None:
        for name in ("group_layers", "llm_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a number of layers; use a whole number from 1 up")
        check_choice("aggregation", self.aggregation, get_args(Aggregation))
        check_choice("stages", self.stages, get_args(Stages))
        super().__post_init__()


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
        paper="https://doi.org/10.1007/978-3-031-72643-9_13",
    )
    Options = Options
    needs = frozenset({"cls", "text_side"})
    reads = frozenset({"schedule", "budget"})

    @classmethod
    def recommended_options(cls, geometry: Geometry, told: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's layers and threshold, or else the paper's, in no more decoder layers than there are."""
        names = ("group_layers", "llm_layers", "threshold")
        layers = min(cls.Options.llm_layers, geometry.text_layers)
        return {"llm_layers": layers, **{name: told[name] for name in names if name in told}}

    @property
    def needed(self) -> frozenset[str]:
        """Without a text side where the guide reads none; the CLS token is also what stands in for the guide."""
        return self.needs if self.reads_text_side else self.needs - {"text_side"}

    def make_plan(self) -> Plan:
        """One cut at the end of each group, with as many tokens as the schedule says."""
        size, options = self.geometry, self.options
        group_layers, llm_layers = options.group_layers, options.llm_layers
        if llm_layers > size.text_layers:
            raise ConfigError(
                f"llm_layers={llm_layers} exceeds the {size.text_layers} decoder layers of this model; "
                f"use 1..{size.text_layers}"
            )
        guide_layers = 0 if options.stages == "vision" else llm_layers
        vision = [] if options.stages == "llm" else groups(size.vision_layers, group_layers)
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
        products = self.options.aggregation in ("residual", "multiply")
        return ChoiceCost(rows=(*("all" if products else "one" for _ in cut.taps[:-1]), "one"))

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 over the group's layers."""
        row = rollout_row(window.taps, window.reference, self.options.aggregation)
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
