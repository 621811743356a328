"""Two methods on one model: one for the vision encoder, one for the decoder, as in "visionzip+fastv"."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window
from ivtp.plan import Geometry


def compose(first: type[Method], second: type[Method], name: str) -> type[Method]:
    """The method that does what `first` does in the encoder and `second` in the decoder.

    Raises `ConfigError` where the two do not work in different stages.
    """
    if first.info.stage != "vision" or second.info.stage != "llm":
        raise ConfigError(
            f"method {name!r} joins a {first.info.stage!r} and a {second.info.stage!r} method; "
            'a "vision" method and then an "llm" one can be joined, see `ivtp methods`'
        )
    a, b = first.info, second.info

    class Joined(Composed):
        __doc__ = f"{a.title} in the vision encoder, then {b.title} in the decoder."
        parts = first, second
        info = MethodInfo(
            title=f"{a.title} + {b.title}",
            year=max(a.year, b.year),
            stage="both",
            paper=f"{a.paper} {b.paper}",
            guided=a.guided or b.guided,
            trainable=a.trainable or b.trainable,
            merges=a.merges or b.merges,
            note="; ".join(filter(None, (a.note, b.note))),
        )
        reads = (first.reads | second.reads) - {"schedule"}  # two methods would read it in two ways
        needs = first.needs | second.needs
        reads_clip, reads_words = first.reads_clip, first.reads_words
        reads_text, reads_states = second.reads_text, second.reads_states
        keeps_all = first.keeps_all and second.keeps_all

    return Joined


class Composed(Method):
    """One method for each stage; `keep` is a budget for each, "192+64", or the final one alone.

    The encoder then keeps the geometric mean of all and the final tokens.
    """

    parts: ClassVar[tuple[type[Method], type[Method]]]

    def __init__(self, config: PruneConfig, geometry: Geometry) -> None:
        """Raises `ConfigError` for what one of the two refuses, and for an option that is of both or of neither."""
        self._refuse_unread(config)
        self.config = config
        self._sized = {}
        self._divide(geometry)

    def _divide(self, geometry: Geometry) -> None:
        """The two parts, for one number of patches."""
        config, self.geometry = self.config, geometry
        budgets = config.budgets(geometry.num_patches)
        self.keep = budgets[-1]
        between = budgets[0] if len(budgets) == 2 else round((geometry.num_patches * self.keep) ** 0.5)
        vision, llm = self.parts
        self.vision = vision(self._config_of(vision, config, between), geometry)
        handed_on = self.vision.plan.cuts[-1].keep  # pooling keeps the nearest grid
        if handed_on < self.keep:
            raise ConfigError(f"keep={config.keep!r} gives the encoder less than the decoder; give it at least as much")
        self.llm = llm(self._config_of(llm, config, self.keep), dataclasses.replace(geometry, num_patches=handed_on))
        self.options = (self.vision.options, self.llm.options)
        self.plan = Plan(self.vision.plan.cuts + self.llm.plan.cuts)

    def _resized(self, geometry: Geometry) -> Method:
        """A copy for another number of patches, whose parts are resized ones of these; a smaller image keeps less."""
        other = copy.copy(self)
        other.geometry, other._sized = geometry, {}
        cuts = self.vision.plan.cuts[-1].keep, self.llm.keep
        handed_on, other.keep = (min(count, geometry.num_patches) for count in cuts)
        if isinstance(self.config.keep, str) and "%" in self.config.keep:
            other._divide(geometry)
            return other
        other.vision, other.llm = self.vision.sized(geometry.num_patches), self.llm.sized(handed_on)
        other.plan = Plan(other.vision.plan.cuts + other.llm.plan.cuts)
        return other

    def tiled(self, patches: int, visible: tuple[int, ...]) -> Method:
        """The part of the encoder by tiles."""
        if visible == (patches,) and patches == self.geometry.num_patches:
            return self
        other = copy.copy(self)
        other.vision = self.vision.tiled(patches, visible)
        other.geometry = other.vision.geometry
        other.plan = Plan(other.vision.plan.cuts + self.llm.plan.cuts)
        return other

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of both parts."""
        return self.vision.notes + self.llm.notes

    @classmethod
    def options_of(cls, config: PruneConfig) -> Any:
        """Those of both parts."""
        return tuple(part.options_of(cls._config_of(part, config, config.keep)) for part in cls.parts)

    @classmethod
    def recommended_options(cls, geometry: Geometry, told: Mapping[str, Any]) -> dict[str, Any]:
        """Those of both parts."""
        first, second = cls.parts
        return {**first.recommended_options(geometry, told), **second.recommended_options(geometry, told)}

    @property
    def needed(self) -> frozenset[str]:
        """What either part needs."""
        return self.vision.needed | self.llm.needed

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """What the stage's method says."""
        return self._of(cut).cost(cut, entering, text_tokens)

    def score(self, window: Window) -> Tensor:
        """The score of the stage's method."""
        return self._of(window.cut).score(window)

    def merge(self, window: Window) -> Merged | None:
        """What the stage's method merges."""
        return self._of(window.cut).merge(window)

    def read_text(self, entry: Tensor, visual: Tensor, text: Tensor, tail: int) -> Tensor:
        """What the decoder's method will know of the question."""
        return self.llm.read_text(entry, visual, text, tail)

    def _of(self, cut: Cut) -> Method:
        return self.vision if cut.where == "vision" else self.llm

    @classmethod
    def _config_of(cls, part: type[Method], config: PruneConfig, keep: int | str) -> PruneConfig:
        """A part's share of the config: its budget, what it reads, and its own options."""
        names = [{f.name for f in dataclasses.fields(p.Options)} for p in cls.parts]
        for option in config.options:
            if (option in names[0]) == (option in names[1]):
                whose = "both parts have" if option in names[0] else "no part has"
                known = ", ".join(sorted(names[0] ^ names[1])) or "none"
                raise ConfigError(f"method {config.method!r}: {whose} an option {option!r}; use one of {known}")
        own = names[cls.parts.index(part)]
        options = {name: value for name, value in config.options.items() if name in own}
        budget = config.budget if "budget" in part.reads else PruneConfig.budget
        return dataclasses.replace(config, keep=keep, options=options, budget=budget)
