"""What IVTP and its variants share: groups of layers that end in a cut, and attention rolled out over each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ivtp.core.rollout import importance, rollout_row
from ivtp.core.schedule import uniform_ratio
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, GuideOptions, Method, Plan, Window
from ivtp.plan import Geometry, Rows


@dataclass(frozen=True)
class GroupOptions(GuideOptions):
    """`threshold` and `guide` make the pseudo CLS token; a checkpoint may recommend other values than the paper's."""

    group_layers: int = 3
    """G: consecutive layers that share one token set and one rollout (Eq. 3)."""
    llm_layers: int = 12
    """W: decoder layers that take part in stage 2."""

    def __post_init__(self) -> None:
        for name in ("group_layers", "llm_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a number of layers; use a whole number from 1 up")
        super().__post_init__()


class GroupWise(Method):
    """Cuts at the end of groups of layers, led by CLS and in the decoder by a pseudo CLS token (IVTP and IVTP+)."""

    Options = GroupOptions
    needs = frozenset({"text_side"})
    reads = frozenset({"schedule", "budget"})

    @classmethod
    def recommended_options(cls, geometry: Geometry, told: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's layers and threshold, or else the paper's, in no more decoder layers than there are."""
        names = ("group_layers", "llm_layers", "threshold")
        layers = min(cls.Options.llm_layers, geometry.text_layers)
        return {"llm_layers": layers, **{name: told[name] for name in names if name in told}}

    @property
    def needed(self) -> frozenset[str]:
        """A text side, unless the guide reads none."""
        return self.needs if self.reads_text_side else self.needs - {"text_side"}

    def group_plan(self, vision: list[range], llm: list[range], between: int | None = None) -> Plan:
        """A cut inside the last layer of each group. `between`: tokens after the encoder; None: one ratio for all."""
        asked, there = self.options.llm_layers, self.geometry.text_layers
        if asked > there:
            raise ConfigError(f"llm_layers={asked} exceeds the {there} decoder layers of this model; use 1..{there}")
        counts = self._counts(len(vision), len(llm), between)
        places = [("vision", group) for group in vision] + [("llm", group) for group in llm]
        cuts = tuple(
            Cut(where, group[-1], keep, taps=tuple(group))  # type: ignore[arg-type]
            for (where, group), keep in zip(places, counts, strict=True)
        )
        return Plan(cuts, guide_layers=asked if llm else 0)

    def rollout_cost(self, cut: Cut) -> ChoiceCost:
        """A row of the last layer's attention, and all rows of the layers before it."""
        before: list[Rows] = ["all" for _ in cut.taps[:-1]]
        return ChoiceCost(rows=(*before, "one"))

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 over the group's layers."""
        return importance(rollout_row(window.taps, window.reference), window.taps[-1].value, window.visual)

    def _counts(self, vision_groups: int, llm_groups: int, between: int | None) -> list[int]:
        """Tokens after each group: an explicit list, or a target for each stage (also as two numbers), or one ratio."""
        total, given = vision_groups + llm_groups, self.config.schedule
        patches = self.geometry.num_patches
        if given is None and between is None:
            return uniform_ratio(patches, self.keep, total)
        if given is None:
            assert between is not None
            given = (between, self.keep)
        if given[0] > patches:
            raise ConfigError(f"schedule={given} starts above the {patches} visual tokens of this model; start lower")
        if len(given) == total:
            return list(given)
        if len(given) != 2 or not (vision_groups and llm_groups):
            raise ConfigError(
                f"schedule={given} has {len(given)} entries; give one for each of the {total} groups "
                f"({vision_groups} in the encoder, {llm_groups} in the decoder), or two: a target for each stage"
            )
        return uniform_ratio(patches, given[0], vision_groups) + uniform_ratio(given[0], given[1], llm_groups)
