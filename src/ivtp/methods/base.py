"""What every pruning method shares: options, a plan that is known beforehand, and scores that the tensors decide."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ivtp.config import PruneConfig
from ivtp.core.schedule import linear, quarters
from ivtp.errors import ConfigError
from ivtp.files.sidecar import TRAINED
from ivtp.methods.window import Merged, Window
from ivtp.plan import ChoiceCost, Cut, Geometry, Place, Plan

__all__ = [
    "ChoiceCost",
    "Cut",
    "GuideOptions",
    "Merged",
    "Method",
    "MethodInfo",
    "NoOptions",
    "Plan",
    "Window",
    "check_choice",
    "check_layer",
    "one_cut",
    "quarters_of",
    "vision_only_plan",
]

Guide = Literal["instruction", "text", "clip", "weighted", "visual"]
READS_CLIP: tuple[Guide, ...] = ("instruction", "weighted", "clip")
"""Guides that read the instruction with CLIP's text side."""
_FOR_ALL = frozenset({"method", "keep", "positions", "cache", "logits", "repruning", "seed", "options"})
"""Fields of `PruneConfig` that no method refuses."""


@dataclass(frozen=True)
class MethodInfo:
    """The line of a method in `ivtp methods`."""

    title: str
    year: int
    stage: Literal["vision", "llm", "both"]
    paper: str
    guided: bool = False
    trainable: bool = False
    merges: bool = False
    note: str = ""
    """What a user must know before trusting an answer, with the options' defaults; empty where there is nothing."""


@dataclass(frozen=True)
class NoOptions:
    """For methods that have no options of their own."""


@dataclass(frozen=True)
class GuideOptions:
    """Options of a method whose plan has `guide_layers`; such a method adds its own to them."""

    threshold: float = 0.2
    """tau: words with a relevance above it make the pseudo CLS token (Eq. 7)."""
    guide: Guide = "instruction"
    """What the pseudo CLS token is made of: the paper's OTT+TE+RT, OTT, TE, OTT+TE, or no instruction."""

    def __post_init__(self) -> None:
        value = self.threshold
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1.0 <= value <= 1.0:
            raise ConfigError(f"threshold={value!r} is not a cosine; use a number from -1 to 1 (default 0.2)")
        check_choice("guide", self.guide, get_args(Guide))


class Method:
    """One way to choose visual tokens. A subclass plans its cuts and scores the tokens at each of them."""

    info: ClassVar[MethodInfo]
    Options: ClassVar[type[Any]] = NoOptions
    reads: ClassVar[frozenset[str]] = frozenset()
    """Common options that shape this method, beside those that are for all."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a family has to give, of `NEEDS`; `needed` says what it is with the options that are set."""
    keeps_all: ClassVar[bool] = True
    """Whether `keep` = N leaves the model as it is; not where tokens that are no patches count among the kept."""
    reads_text: ClassVar[bool] = False
    """Whether `score` or `merge` reads `Window.text`, in the decoder."""
    reads_states: ClassVar[bool] = False
    """Whether `score` or `merge` reads `Window.normed` or `Window.keys`, in the decoder."""
    reads_clip: ClassVar[bool] = False
    """Whether `score` or `merge` reads `Window.relevance`."""
    reads_words: ClassVar[bool] = False
    """Whether `score` or `merge` reads `Window.words`, in the encoder."""
    heeds_padding: ClassVar[bool] = False
    """Whether `merge` lets `Window.padding` leave first, into nothing, and gives `Merged.scores`: of an image whose
    tiles together hold more than it keeps, the lowest leave."""

    def __init__(self, config: PruneConfig, geometry: Geometry) -> None:
        """Raises `ConfigError` for an option that the method does not read, or a keep that does not fit the model."""
        self._refuse_unread(config)
        self.config = config
        self.geometry = geometry
        self.keep = config.schedule[-1] if config.schedule else config.tokens(geometry.num_patches)
        self.options = self.options_of(config)
        self._sized: dict[int, Method] = {}
        self.plan = self.make_plan()

    @classmethod
    def options_of(cls, config: PruneConfig) -> Any:
        """Its own options. Raises `ConfigError` for one that it does not have, and for a bad value."""
        accepted = [f.name for f in dataclasses.fields(cls.Options)]
        unknown = sorted(set(config.options) - set(accepted))
        if unknown:
            raise ConfigError(
                f"method {config.method!r} has no option {unknown[0]!r}; its own options: "
                f"{', '.join(accepted) or 'none'}; "
                f"common options: {', '.join(f.name for f in dataclasses.fields(PruneConfig))}"
            )
        return cls.Options(**config.options)

    @classmethod
    def recommended_options(cls, geometry: Geometry, told: Mapping[str, Any]) -> dict[str, Any]:
        """Values of its own options for a model of these sizes, whose checkpoint tells the options `told`; here none.

        They hold where nothing else is asked for.
        """
        return {}

    @classmethod
    def filled(cls, config: PruneConfig, geometry: Geometry, told: Mapping[str, Any]) -> PruneConfig:
        """What was not said, as it is recommended for a model, see `recommended_options`, or as it was trained."""
        trained = told.get(TRAINED, {})
        learned = trained.get("options", {}) if trained.get("method") == config.method else {}
        options = {**cls.recommended_options(geometry, told), **learned, **config.options}
        return dataclasses.replace(config, options=options)

    @property
    def guide_options(self) -> GuideOptions | None:
        """What its pseudo CLS token is made of; None where it has none."""
        return self.options if self.plan.guide_layers else None

    @property
    def reads_text_side(self) -> bool:
        """Whether the instruction is read with CLIP's text side: for `Window.relevance`, or by the guide."""
        options = self.guide_options
        return self.reads_clip or (options is not None and options.guide in READS_CLIP)

    @property
    def needed(self) -> frozenset[str]:
        """What a family has to give, with the options that are set."""
        return self.needs

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know before trusting an answer, with the options that are set."""
        return (self.info.note,) if self.info.note else ()

    def sized(self, patches: int) -> Method:
        """This method for an image with so many patches; where `keep` is more, all stay. Raises `ConfigError`."""
        if patches == self.geometry.num_patches:
            return self
        if patches not in self._sized:
            self._sized[patches] = self._resized(dataclasses.replace(self.geometry, num_patches=patches))
        return self._sized[patches]

    def tiled(self, patches: int, visible: tuple[int, ...]) -> Method:
        """This method of an image for its tiles of `patches` tokens each, of which so many are `visible` in each tile.

        Every tile keeps the same number at a cut, just so many that all together show at least what the image keeps.
        """
        if visible == (patches,) and patches == self.geometry.num_patches:
            return self
        cuts = tuple(
            dataclasses.replace(cut, keep=_share(cut.keep, visible)) if cut.where == "vision" else cut
            for cut in self.plan.cuts
        )
        other = copy.copy(self)
        other.geometry = dataclasses.replace(self.geometry, num_patches=patches)
        other.plan = dataclasses.replace(self.plan, cuts=cuts)
        return other

    def _resized(self, geometry: Geometry) -> Method:
        """A copy for another number of patches; modules that a method has are shared."""
        other = copy.copy(self)
        other.geometry, other._sized = geometry, {}
        other.keep = min(self._final(geometry), geometry.num_patches)
        other.plan = other.make_plan()
        return other

    def _final(self, geometry: Geometry) -> int:
        """Tokens that remain at the end, of the largest image or of a smaller one."""
        if self.config.schedule:
            return self.config.schedule[-1]
        share = isinstance(self.config.keep, str)
        return self.config.tokens(geometry.num_patches) if share else self.keep

    def make_plan(self) -> Plan:
        """The cuts, from sizes alone."""
        raise NotImplementedError

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """What choosing costs at a cut of the plan that `entering` visual tokens of each image come to.

        `text_tokens` are those of the prompt. Here one attention row of each tap.
        """
        return ChoiceCost()

    def score(self, window: Window) -> Tensor:
        """Importance (B, T) of every token of the window; only visual ones are read, the highest stay.

        Not asked where `merge` answers.
        """
        raise NotImplementedError

    def merge(self, window: Window) -> Merged | None:
        """New visual tokens in place of the window's, for methods that merge; None selects by `score`."""
        return None

    def read_text(self, entry: Tensor, visual: Tensor, text: Tensor, tail: int) -> Tensor:
        """What cuts in the decoder will know of the question: (B, T) weights, here 1 for each of its tokens.

        Asked once, with the embeddings `entry` (B, T, D) that enter the decoder, its `visual` columns and `text`
        (B, T) bool, what the user asks, which lies in the last `tail` columns: the tokens of the last user turn, or
        else (without a processor, or where nothing is asked) the prompt's text behind its last image.
        """
        return text.float()

    def explicit_counts(self, cuts: int) -> list[int] | None:
        """The `schedule`, where there is one. Raises `ConfigError` unless it has a count for each cut."""
        given, patches = self.config.schedule, self.geometry.num_patches
        if given is None:
            return None
        if len(given) != cuts or given[0] > patches:
            raise ConfigError(
                f"schedule={given}: method {self.config.method!r} needs {cuts} counts, none above {patches}"
            )
        return list(given)

    def _refuse_unread(self, config: PruneConfig) -> None:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in self.reads | _FOR_ALL and value != field.default:
                read = ", ".join(sorted(self.reads | _FOR_ALL - {"options"}))
                raise ConfigError(
                    f"method {config.method!r} does not read {field.name}={value!r}; leave it out. It reads {read}"
                )


def _share(keep: int, visible: tuple[int, ...]) -> int:
    """The smallest number a tile that shows at least `keep` tokens of all tiles."""
    return next(k for k in range(1, max(visible) + 1) if sum(min(k, v) for v in visible) >= keep)


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(accepted)}")


def check_layer(name: str, layers: int, size: Geometry) -> int:
    """Raise `ConfigError` unless a cut behind the first `layers` decoder layers leaves at least one behind it."""
    if not isinstance(layers, int) or not 1 <= layers < size.text_layers:
        raise ConfigError(f"{name}={layers!r} is no layer with another one behind it; use 1..{size.text_layers - 1}")
    return layers


def quarters_of(layers: int, name: str) -> tuple[int, ...]:
    """`core.schedule.quarters`. Raises `ConfigError` where there are too few layers."""
    if layers < 4:
        raise ConfigError(f"method {name!r} cuts three times and needs at least 4 layers; this model has {layers}")
    return quarters(layers)


def one_cut(size: Geometry, keep: int, place: Place, *, tapped: bool = False) -> Plan:
    """One cut behind the encoder or the projector, which reads the attention of the last layer before it or none."""
    last = size.vision_layers - 1
    return Plan((Cut("vision", last, keep, place, taps=(last,) if tapped else ()),))


def vision_only_plan(size: Geometry, keep: int, *, every_layer: bool, tapped: bool) -> Plan:
    """One cut behind the encoder, or one in each layer that removes (nearly) the same number of tokens."""
    if not every_layer:
        return one_cut(size, keep, "behind", tapped=tapped)
    counts = linear(size.num_patches, keep, size.vision_layers)
    return Plan(tuple(Cut("vision", i, k, taps=(i,) if tapped else ()) for i, k in enumerate(counts)))
