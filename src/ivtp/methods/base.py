"""What every pruning method shares: options, a plan that is known beforehand, and scores that the tensors decide."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ivtp.config import PruneConfig
from ivtp.core.merge import take_up_neighbours
from ivtp.core.rollout import full_width_row, importance, rollout_row
from ivtp.core.schedule import linear, quarters, uniform_ratio
from ivtp.core.tap import AttentionTap
from ivtp.errors import ConfigError
from ivtp.plan import ChoiceCost, Cut, Geometry, Plan, Rows

__all__ = [
    "ChoiceCost",
    "Cut",
    "GroupOptions",
    "GroupWise",
    "GuideOptions",
    "Merged",
    "Method",
    "MethodInfo",
    "NoOptions",
    "OutlierMerging",
    "Plan",
    "Window",
    "check_choice",
    "check_layer",
    "quarters_of",
    "vision_only_plan",
]

Guide = Literal["instruction", "text", "clip", "weighted", "visual"]
READS_CLIP: tuple[Guide, ...] = ("instruction", "weighted", "clip")
"""Guides that read the instruction with CLIP's text side."""
_FOR_ALL = frozenset({"method", "keep", "positions", "cache", "logits", "seed", "options"})
"""Fields of `PruneConfig` that no method refuses."""


@dataclass(frozen=True)
class Window:
    """What a method sees at a cut.

    `taps` as `Cut.taps` names them. `hidden` (B, T, D) is cut. `patch` (B, T) is the original patch index of every
    token, -1 for CLS, text, padding and the guide. `reference` is the index in T of the row whose attention counts, or
    one for each sample (B,): 0, the CLS token, in the encoder, and in the decoder the pseudo CLS token or else the last
    prompt token.
    """

    cut: Cut
    taps: tuple[AttentionTap, ...]
    hidden: Tensor
    patch: Tensor
    reference: int | Tensor
    images: tuple[int, ...] = ()
    """Images in each row, in the decoder; a row of the encoder is one image."""
    entered: tuple[tuple[int, ...], ...] = ()
    """Tokens of each image of each row that came to the cut, in the decoder."""
    keeps: tuple[tuple[int, ...], ...] = ()
    """Tokens of each image of each row that stay behind it, in the decoder."""
    segment: Tensor | None = None
    """(B, T) the number within its row of the image that a visual token is of, -1 for others, in the decoder where
    every image has a budget of its own; None where the images of a row share one, or there are no two."""
    sources: Tensor | None = None
    """(B, N) the patch that stands for every original patch so far, -1 where it was dropped."""
    text: Tensor | None = None
    """(B, T) what `Method.read_text` made of the question, for methods with `Method.reads_text`."""
    normed: Tensor | None = None
    """(B, T, D) what the decoder's last norm makes of `hidden`, for methods with `Method.reads_states`."""
    keys: Tensor | None = None
    """(B, H_kv, T, d) keys of the last tap, turned as if the first token of each row stood at position 0 (likewise)."""
    tail: int = 0
    """At most so many columns at the end hold the question."""
    relevance: Tensor | None = None
    """(B, N) cosine of every patch with the instruction, both as CLIP sees them (`Method.reads_clip`)."""
    padding: Tensor | None = None
    """(B, T) bool: visual tokens of the encoder that show a tile's padding, which no prompt sees; None without any."""

    @property
    def visual(self) -> Tensor:
        """(B, T) bool: the tokens that may be cut."""
        return self.patch >= 0

    @property
    def budgets(self) -> list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
        """The visual tokens (B, T) bool that share a budget, how many of them came in each row, and how many stay.

        In the decoder, where `merge`, or a choice that is no ranking, has to keep to them.
        """
        if self.segment is None:
            return [(self.visual, tuple(map(sum, self.entered)), tuple(map(sum, self.keeps)))]

        def of_image(counts: tuple[tuple[int, ...], ...], m: int) -> tuple[int, ...]:
            return tuple(row[m] if m < len(row) else 0 for row in counts)

        most = max(map(len, self.keeps))
        return [(self.segment == m, of_image(self.entered, m), of_image(self.keeps, m)) for m in range(most)]


@dataclass(frozen=True)
class Merged:
    """Visual tokens that stand for others.

    `hidden` (B, T, D) is the window's, new where a token stands for others; `into` (B, T) is the column that every
    visual column went into: its own where it stays, -1 where it is dropped. `order` (B, k) lists the columns that stay
    in the method's own order; None: as they come. `stand_ins` (B, m) are the columns that stay whose token is made of
    something else than of the columns that went into them: CLS, a sum over what is dropped; None: there are none.
    `scores` (B, T) rank the columns, where the method has a ranking.
    """

    hidden: Tensor
    into: Tensor
    order: Tensor | None = None
    stand_ins: Tensor | None = None
    scores: Tensor | None = None


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
        """What was not said, as it is recommended for a model, see `recommended_options`."""
        return dataclasses.replace(config, options={**cls.recommended_options(geometry, told), **config.options})

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


class OutlierMerging(Method):
    """Keeps some patches by their similarity to CLS, and merges the others into them (PruMerge and PruMerge+).

    Similarity is softmax(q k^T) over the full width, not head by head, in the encoder's last layer; features are those
    that the projector reads. One of `keep` is an extra token that takes up all dropped ones.
    """

    needs = frozenset({"cls"})
    keeps_all = False

    def choose(self, similarity: Tensor, count: int) -> Tensor:
        """Indices (B, count) of the patches that stay, in their order, by `similarity` (B, N) to CLS."""
        raise NotImplementedError

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        last = self.geometry.vision_depth - 1  # also where the projector reads an earlier layer
        return Plan((Cut("vision", self.geometry.vision_layers - 1, self.keep, place="behind", taps=(last,)),))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """Similarity of keys, and the weighted sums."""
        kept = cut.keep - 1
        sums = kept * entering + entering - kept  # neighbours of the kept ones, and all dropped ones
        return ChoiceCost(2.0 * (kept * entering + sums) * self.geometry.vision_hidden)

    def merge(self, window: Window) -> Merged:
        """Kept tokens with their neighbours, and the extra one."""
        tap = window.taps[-1]
        similarity = full_width_row(tap, 0)[:, 1:]
        kept = self.choose(similarity, window.cut.keep - 1)
        hidden, into, order = take_up_neighbours(window.hidden, tap.key, similarity, kept)
        return Merged(hidden, into, order, stand_ins=order[:, -1:])


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


def vision_only_plan(size: Geometry, keep: int, *, every_layer: bool, tapped: bool) -> Plan:
    """One cut behind the encoder, or one in each layer that removes (nearly) the same number of tokens."""
    last = size.vision_layers - 1
    if not every_layer:
        return Plan((Cut("vision", last, keep, taps=(last,) if tapped else (), place="behind"),))
    counts = linear(size.num_patches, keep, size.vision_layers)
    return Plan(tuple(Cut("vision", i, k, taps=(i,) if tapped else ()) for i, k in enumerate(counts)))
