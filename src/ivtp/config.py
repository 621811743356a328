"""What the user asks for."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from ivtp.errors import ConfigError

Positions = Literal["original", "compact"]
CacheMode = Literal["evict", "layered"]
Logits = Literal["full", "kept"]
Budget = Literal["image", "prompt"]
Repruning = Literal["first", "turn"]


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. Immutable and valid once it exists; `ConfigError` otherwise."""

    method: str | type[Any] = "ivtp"
    """A registered method, see `ivtp.list_methods()`, or a `Method` class of your own."""
    keep: int | str = 64
    """Visual tokens of each image that remain at the end: 1..N, or a fraction of N such as "11%". For two
    methods in one "192+64" is a budget for each."""
    schedule: tuple[int, ...] | None = None
    """Tokens after each cut, the encoder's first; of IVTP and IVTP+ also two numbers: after stage 1 and after stage 2,
    each reached at a uniform ratio. Its last number then takes the place of `keep`. None is one ratio down to `keep`,
    and for IVTP+ one for each stage."""
    budget: Budget = "image"
    """In the decoder every image of a prompt keeps `keep` tokens of its own, or all its visual tokens are ranked
    together under the total, so that the question may favour one image and another may vanish."""
    positions: Positions = "original"
    """Surviving tokens keep their position ids, or are renumbered after stage 1."""
    cache: CacheMode = "evict"
    """After the prefill every layer's cache holds the final tokens, or each layer what it saw."""
    logits: Logits = "full"
    """A forward gives logits for every column of the prompt, as losses and metrics of trainers expect (a pruned token's
    column repeats the one before it), or for the tokens that are left. `generate` reads the last column alone."""
    repruning: Repruning = "first"
    """Of a cache that `generate` is handed back for the next turn of a conversation what was kept stays, and the new
    turn is read behind it; or the new question chooses again, the decoder reads the whole conversation again, and the
    answer is what it would be without that cache."""
    seed: int = 0
    """Seed of the methods that draw at random."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the method itself, checked by the method's own `Options`."""

    def __post_init__(self) -> None:
        for name in ("keep", "seed"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        _check_keep(self.keep)
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed!r} is not a seed; use a whole number from 0 up to 2**64 - 1")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(accepted)}")
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _check_schedule(self.schedule))
        object.__setattr__(self, "options", _check_options(self.options))

    @classmethod
    def of(cls, /, **values: Any) -> PruneConfig:
        """Build a config from flat keywords; what is no field of `PruneConfig` becomes a method option."""
        names = {f.name for f in dataclasses.fields(cls)}
        options = _check_options(values.pop("options", {})) | {k: v for k, v in values.items() if k not in names}
        return cls(**{k: v for k, v in values.items() if k in names}, options=options)

    def changed(self, **options: Any) -> PruneConfig:
        """The same with other fields or options of the method; another method begins with what is for all methods."""
        names = [f.name for f in dataclasses.fields(self)]
        if options.get("method", self.method) != self.method:
            names = ["keep", "positions", "cache", "logits", "repruning", "seed"]
        kept = {name: getattr(self, name) for name in names}
        own = kept.pop("options", {})
        return PruneConfig.of(**{**kept, **own, **options})

    def tokens(self, num_patches: int) -> int:
        """`keep` as a number of tokens of an image with `num_patches` patches. Raises `ConfigError` above N."""
        counts = self.budgets(num_patches)
        if len(counts) > 1:
            raise ConfigError(f"keep={self.keep!r} is two budgets, for a method in two parts; give one number")
        return counts[0]

    def budgets(self, num_patches: int) -> tuple[int, ...]:
        """`keep` as one number of tokens or, where it is given for two stages, as two. Raises `ConfigError` above N."""
        parts = self.keep.split("+") if isinstance(self.keep, str) else [str(self.keep)]
        counts = tuple(
            max(1, round(num_patches * float(part[:-1]) / 100)) if part.endswith("%") else int(part) for part in parts
        )
        if max(counts) > num_patches:
            raise ConfigError(
                f"keep={self.keep} exceeds the {num_patches} visual tokens of this model; use 1..{num_patches}"
            )
        return counts


def check_none(config: PruneConfig) -> None:
    """Refuse options beside the method "none", which has none. Raises `ConfigError`."""
    if config.options:
        name = next(iter(config.options))
        raise ConfigError(f"method 'none' has no option {name!r}; leave it out or name a method")


_CHOICES: dict[str, tuple[str, ...]] = {
    "positions": get_args(Positions),
    "cache": get_args(CacheMode),
    "logits": get_args(Logits),
    "budget": get_args(Budget),
    "repruning": get_args(Repruning),
}
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)
_BUDGETS = re.compile(r"(\d+(?:\.\d+)?%|[1-9]\d*)\+(\d+(?:\.\d+)?%|[1-9]\d*)", re.ASCII)


def _plain(value: Any) -> Any:
    """Numbers of numpy and the like as Python's own, text without blanks around it; anything else as it is."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keep(keep: object) -> None:
    hint = 'use a number of tokens from 1 up, or a fraction such as "11%"'
    if isinstance(keep, str):
        pair = _BUDGETS.fullmatch(keep)
        if pair:
            for part in pair.groups():
                _check_keep(part if part.endswith("%") else int(part))
            return
        match = _PERCENT.fullmatch(keep)
        if not match or not 0 < float(match[1]) <= 100:
            kind = "share from above 0% to 100%" if keep.endswith("%") else "number of tokens or a share of them"
            raise ConfigError(f"keep={keep!r} is no {kind}; {hint}")
    elif not _is_int(keep):
        kind = "NaN" if isinstance(keep, float) and math.isnan(keep) else repr(keep)
        raise ConfigError(f"keep={kind} is not a number of tokens; {hint}")
    elif keep < 1:  # type: ignore[operator]  # _is_int has made it an int
        raise ConfigError(f"keep={keep} leaves no visual token; {hint}")


def _check_schedule(schedule: Any) -> tuple[int, ...]:
    if callable(getattr(schedule, "tolist", None)):  # an array
        schedule = schedule.tolist()
    if not isinstance(schedule, Sequence) or isinstance(schedule, str | bytes):
        raise ConfigError(f"schedule={schedule!r} is no list of token counts; use one such as (133, 64)")
    counts = tuple(map(_plain, schedule))
    if not counts or not all(_is_int(k) and k >= 1 for k in counts):
        raise ConfigError(f"schedule={counts} has an entry that is no token count; use whole numbers from 1 up")
    if any(a < b for a, b in pairwise(counts)):
        raise ConfigError(f"schedule={counts} grows; pruning only removes, so use counts that never increase")
    return counts


def _check_options(options: object) -> dict[str, Any]:
    """A copy, so that the caller's own dictionary cannot change a config; numbers are Python's own."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"options={options!r} are no names with values; use a dictionary")
    return {name: _plain(value) for name, value in options.items()}
